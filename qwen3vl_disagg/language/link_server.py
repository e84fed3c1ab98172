"""The language side of all links: lets encode ranks in, and carries out what the sessions decide.

One event loop for the control connections and the sessions; for each link one thread that receives payloads in the
order of their headers. A link is gone when its control connection ends or a payload fails; its sessions go on when the
same rank is back under a new epoch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from qwen3vl_disagg.cluster.registry import Fingerprint, check_fingerprint
from qwen3vl_disagg.core.errors import DisaggError, HandshakeError, TransferError
from qwen3vl_disagg.core.faults import fault_point
from qwen3vl_disagg.core.spans import span
from qwen3vl_disagg.language.link_canary import receive_canary
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.messages import (
    Abort,
    Ack,
    Cancel,
    Frame,
    Goodbye,
    ItemLost,
    LinkAccept,
    LinkCanary,
    LinkHello,
    LinkMessage,
    LinkReady,
    Message,
    Refused,
    RequestFailed,
    Resume,
)
from qwen3vl_disagg.protocol.pump import Pump
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    BreakLink,
    FrameIn,
    LanguageAction,
    LanguageEvent,
    LinkDown,
    LinkUp,
    PayloadEnd,
    Recall,
    Receive,
    RowsReady,
    SendFrame,
    SessionLimits,
    Tell,
)
from qwen3vl_disagg.transport.control import MAX_LINK_FRAME, Connection, ConnectionLost
from qwen3vl_disagg.transport.doorkeeper import Doorkeeper
from qwen3vl_disagg.transport.links import MEET_S, Link, LinkBroken, LinkFactory, meet, process_group_links, while_there
from qwen3vl_disagg.transport.refusals import Refusals
from qwen3vl_disagg.transport.sockets import Address, listen
from qwen3vl_disagg.transport.ticks import tick
from qwen3vl_disagg.transport.tls import Tls

logger = logging.getLogger(__name__)
MAX_EPOCHS = 2**32
"""That a peer may have had more than this rank knows of."""


@dataclass
class _PeerLink:
    """One encode rank's link."""

    encode_rank: int
    epoch: int
    control: Connection
    payload: Link
    thread: ThreadPoolExecutor


class LinkServer:
    """Set the sinks before the first request; all are called on the event loop."""

    on_rows: Callable[[Attempt], None]
    """Rows of the attempt are here: `receiver.hand_over` gives them to the engine."""
    on_recall: Callable[[Recall], None]
    """The engine must drop the attempt's rows and go back behind them; `handle(Returned(..))` when it has."""
    on_tell: Callable[[Message], None]
    """What the router should hear: items that arrived or were lost, requests whose time is up."""
    on_short_of_room: Callable[[bool], None]
    """Whether items wait for blocks, whenever that changes."""

    def __init__(
        self,
        receiver: Receiver,
        *,
        fingerprint: Fingerprint,
        token: str,
        language_rank: int,
        host: str = "127.0.0.1",
        make_link: LinkFactory | None = None,
        limits: SessionLimits | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.limits = limits or SessionLimits()
        buffers = receiver.buffers
        self.sessions = LanguageSessions(buffers.allocator, buffers.block_size, buffers.row_sizes, self.limits)
        self.receiver, self._fingerprint, self._token = receiver, fingerprint, token
        self._language_rank = language_rank
        self._links: dict[tuple[int, int], _PeerLink] = {}
        self._pump = Pump[LanguageEvent, LanguageAction](self._decide, self._perform, time.monotonic)
        self._was_short_of_room = False
        self._last_epoch = 0
        self._host, self._make_link, self._tls = host, make_link or process_group_links(host), tls
        self._server: Doorkeeper | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._refusals = Refusals()

    async def serve(self) -> Address:
        """Listen for encode ranks on a free port."""
        sock = listen(self._host)
        self._server = Doorkeeper(
            sock,
            self._accept,
            token=self._token,
            messages=LinkMessage,
            max_frame=MAX_LINK_FRAME,
            name="links",
            tls=self._tls,
        )
        self.start()
        return sock.getsockname()[:2]

    def start(self) -> None:
        """Let time pass. (`serve` does it, too.)"""
        self._ticker = asyncio.create_task(tick(self.handle))

    async def welcome(self, control: Connection) -> None:
        """Serve a connection that came by another way than the door, as far as it goes."""
        await self._accept(await control.receive(), control)
        await control.close()

    @property
    def is_idle(self) -> bool:
        """No session, all pools full."""
        return self.sessions.is_idle

    async def left_over(self, patience_s: float) -> str:
        """What is still held when nobody wants anything any more, after waiting a little for it to come back; "" for
        nothing."""
        end = time.monotonic() + patience_s
        while not self.is_idle and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self.is_idle:
            return ""
        sessions = self.sessions
        counts = {pool: sessions.allocator.counts(pool) for pool in ("rows", "deepstack", "slots")}
        quarantined = [*sessions.pending, *sessions.recalled]
        return f"requests {list(sessions.requests)}, in quarantine {quarantined}, {counts}"

    async def close(self) -> None:
        """Say goodbye and let go of everything."""
        if self._ticker is not None:
            self._ticker.cancel()
        if self._server is not None:
            self._server.close()
        fault_point("in-drain")
        for link in list(self._links.values()):
            if not link.control.is_closed:
                link.control.post(Goodbye())
            self._drop(link, "the language rank leaves")
            await link.control.close()

    # -- sessions

    def handle(self, event: LanguageEvent) -> None:
        """Let the sessions decide, and do what they say."""
        self._pump.handle(event)
        if self._was_short_of_room != self.sessions.is_short_of_room:
            self._was_short_of_room = self.sessions.is_short_of_room
            self.on_short_of_room(self._was_short_of_room)

    def _decide(self, event: LanguageEvent, now: float) -> list[LanguageAction]:
        if isinstance(event, Cancel):
            self.receiver.forget(event.request_id)
        return self.sessions.handle(event, now)

    def _perform(self, action: LanguageAction) -> None:
        match action:
            case SendFrame():
                self._post(action)
            case Receive():
                self._start_receiving(action)
            case RowsReady():
                self.on_rows(action.key)
            case BreakLink():
                link = self._links.get((action.peer, action.epoch))
                if link is not None:
                    link.control.abort()  # its reader drops the link
            case Recall():
                self.on_recall(action)
            case Tell(message):
                if isinstance(message, ItemLost):
                    self.receiver.forget(message.request_id, message.item)
                elif isinstance(message, RequestFailed):
                    self.receiver.forget(message.request_id)
                self.on_tell(message)

    def _post(self, action: SendFrame) -> None:
        link = self._links.get((action.peer, action.frame.epoch))
        if link is None:
            return
        try:
            if isinstance(action.frame.body, Resume):
                fault_point("blocks-full")
            link.control.post(action.frame)
            if isinstance(action.frame.body, Ack):
                fault_point("ack-sent")
        except ConnectionLost:
            return  # its reader finds out and drops the link
        except Exception as error:  # a frame that does not go out leaves a gap: this link is over, and no other
            logger.error("a frame did not go out", exc_info=error)
            link.control.abort()

    # -- payloads

    def _start_receiving(self, job: Receive) -> None:
        grant = job.grant
        link = self._links.get((job.encode_rank, job.epoch))
        ends = PayloadEnd(*grant.key, job.encode_rank, job.epoch)
        if link is None:
            self.handle(msgspec.structs.replace(ends, error="the link is gone", is_broken=True))
            return
        work = asyncio.get_running_loop().run_in_executor(link.thread, self._receive, link.payload, job)
        work.add_done_callback(lambda done: self._received(ends, done))

    def _receive(self, payload: Link, job: Receive) -> None:
        grant = job.grant
        with span("receive", rows=grant.row_stop - grant.row_start, items=[(grant.request_id, grant.item)]):
            self.receiver.receive(payload, job, job.payload_s)
        fault_point("payload-received")
        if grant.row_stop == job.visual.num_rows:
            fault_point("last-row")

    def _received(self, ends: PayloadEnd, done: asyncio.Future) -> None:
        self._end_receive(ends, done)
        attempt = ends.key
        if self.sessions.find(*attempt) is None:  # given up meanwhile, and forgotten before this was remembered
            self.receiver.forget_attempt(attempt)

    def _end_receive(self, ends: PayloadEnd, done: asyncio.Future) -> None:
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is not None:
            # Whatever is not about the rows themselves leaves the stream of payloads in an unknown place.
            is_broken = not isinstance(error, TransferError) or isinstance(error, LinkBroken)
            reason = str(error) or type(error).__name__
            self.handle(msgspec.structs.replace(ends, error=reason, is_broken=is_broken))
            return
        self.handle(ends)

    # -- links coming and going

    async def _accept(self, hello: Message, control: Connection) -> None:
        try:
            link = await self._handshake(hello, control)
        except (DisaggError, OSError):
            return
        except RuntimeError as error:  # a GPU, threads; it is tried again
            peer = f"encode rank {hello.encode_rank}" if isinstance(hello, LinkHello) else "a stranger"
            self._refusals.say(peer, f"no link with {peer}: {type(error).__name__}: {error}")
            return
        control.keep_alive()
        self._links[link.encode_rank, link.epoch] = link
        reason = "the encode rank left"
        try:
            control.post(LinkReady())
            self.handle(LinkUp(link.encode_rank, link.epoch))
            while not isinstance(message := await control.receive(), Goodbye):
                self._take(link, message)
        except TransferError as error:
            reason = str(error)
        except Exception as error:  # one link's failure is not the rank's
            reason = f"{type(error).__name__}: {error}"
        self._drop(link, reason)

    def _take(self, link: _PeerLink, message: Message) -> None:
        if isinstance(message, Frame):
            if isinstance(message.body, Abort):
                fault_point("in-abort")
            self.handle(FrameIn(link.encode_rank, message))

    async def _handshake(self, hello: Message, control: Connection) -> _PeerLink:
        if not isinstance(hello, LinkHello):
            raise TransferError(f"{type(hello).__name__} in place of a hello")
        try:
            check_fingerprint(self._fingerprint, hello.fingerprint)
            if hello.last_epoch > self._last_epoch + MAX_EPOCHS:  # it would be everybody's
                raise HandshakeError("last_epoch", f"at most {self._last_epoch + MAX_EPOCHS}", hello.last_epoch)
            return await self._make_link_with(hello, control)
        except HandshakeError as error:
            await control.send(Refused(field=error.field, expected=str(error.expected), got=str(error.got)))
            raise

    async def _make_link_with(self, hello: LinkHello, control: Connection) -> _PeerLink:
        """HandshakeError names the part of the canary that did not arrive as it was sent."""
        fault_point("in-handshake")
        encode_rank, language_rank = hello.encode_rank, self._language_rank
        for old in [link for link in self._links.values() if link.encode_rank == encode_rank]:
            old.control.abort()  # an earlier incarnation of that rank, or of this link
            self._drop(old, "the encode rank made a new link")
        # One count for all links: none has the epoch of another. The peer's is above it after a restart of this rank.
        epoch = self._last_epoch = max(self._last_epoch, hello.last_epoch) + 1
        await control.send(LinkAccept(epoch=epoch, language_rank=language_rank))
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"link-{encode_rank}")
        try:
            payload = await meet(control, thread, self._make_link, "language", encode_rank, language_rank, epoch)
            if hello.has_canary:
                said = await control.receive(timeout=MEET_S)
                if not isinstance(said, LinkCanary):
                    raise TransferError(f"{type(said).__name__} in place of a canary")
                await while_there(control.lost(), thread, receive_canary, payload, said, self.receiver, MEET_S)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return _PeerLink(encode_rank, epoch, control, payload, thread)

    def _drop(self, link: _PeerLink, reason: str) -> None:
        if self._links.pop((link.encode_rank, link.epoch), None) is not None:
            link.payload.close()
            link.thread.shutdown(wait=False)
            self.handle(LinkDown(link.encode_rank, link.epoch, reason))
