"""One end of an established link as the sessions see it: an epoch, and frames that are counted. Pure.

The control connection is TCP, which loses nothing; so a gap in the count, or a frame that comes twice, says that
something between is broken. A gap ends the link (its sessions are resumed under the next epoch), a repetition changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen3vl_disagg.protocol.messages import Beat, Frame
from qwen3vl_disagg.protocol.payload_time import LinkPace
from qwen3vl_disagg.protocol.session_events import SendFrame


@dataclass(slots=True)
class LinkState:
    peer: int
    epoch: int
    sent_at: float
    num_sent: int = 0
    num_received: int = 0
    pace: LinkPace = field(default_factory=LinkPace)
    """Of payloads that came over it."""

    def next_seq(self, now: float) -> int:
        self.num_sent += 1
        self.sent_at = now
        return self.num_sent

    def send(self, body: object, now: float) -> SendFrame:
        return SendFrame(self.peer, Frame(epoch=self.epoch, seq=self.next_seq(now), body=body))  # type: ignore[arg-type]

    def beat(self, now: float) -> SendFrame:
        self.sent_at = now
        return SendFrame(self.peer, Frame(epoch=self.epoch, seq=self.num_sent, body=Beat()))

    def take(self, frame: Frame) -> bool | None:
        """True: the next frame, to be handled. False: nothing to do. None: frames were lost."""
        expected = self.num_received if type(frame.body) is Beat else self.num_received + 1
        if frame.seq > expected:
            return None
        if frame.seq < expected or type(frame.body) is Beat:
            return False
        self.num_received = frame.seq
        return True
