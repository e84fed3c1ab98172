"""What the sessions of both sides take in and what they give back beside the protocol's messages: plain values.

A session is one item of one request; (`request_id`, `item`, `attempt`) names one try at it.
"""

from __future__ import annotations

import msgspec

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.allocator import Lease
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Attempt,
    Cancel,
    Frame,
    Grant,
    Header,
    ItemFailed,
    ItemLost,
    ItemReceived,
    RequestFailed,
    Resume,
)


class SessionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, and how much an encode rank keeps."""

    beat_s: float = 1.0
    suspend_s: float = 5.0
    """How long an item waits for a lost link to come back before it is given up."""
    grant_s: float = 3600.0
    """From a grant to its header. Queueing and encoding are in it, so this only backs up the request's own deadline."""
    payload_s: float = 10.0
    """One payload on its link, beside what its bytes take (`payload_time`)."""
    answer_s: float = 15.0
    """From a header or a payload to its answer."""
    lease_s: float = 180.0
    """How long encoded rows are kept while nobody asks for them: longer than any grant."""
    forget_s: float = 120.0
    """How long the epoch of a link that is gone is remembered: longer than a handshake that is still under way."""
    max_items: int = 8
    """Items that an encode rank encodes at a time. Where it has several language ranks, one may have half as many in
    memory on their way from bytes to acknowledged rows, so that a silent one does not take the places of others."""
    max_urgent: int = 4
    """So many more, of either, for those that are more urgent than what has a place."""
    max_clips: int = 4
    """Clips among those being encoded: the other places are for images. `max_urgent` more as above."""
    max_parked: int = 4
    """Items that besides wait there for a resume, for each language rank; the one that has waited longest goes first.
    A language rank has one at a time, more only after failures."""


class _Value(msgspec.Struct, frozen=True):
    pass


class _OfAttempt(_Value, frozen=True):
    """About one try at one item."""

    request_id: str
    item: int
    attempt: int

    @property
    def key(self) -> Attempt:
        return self.request_id, self.item, self.attempt


# ---- events of both sides ----


class LinkUp(_Value, frozen=True):
    peer: int
    epoch: int


class LinkDown(_Value, frozen=True):
    peer: int
    epoch: int
    reason: str


class FrameIn(_Value, frozen=True):
    peer: int
    frame: Frame


class Tick(_Value, frozen=True):
    """Time has passed: look at the deadlines."""


# ---- events of the language side ----


class Expect(_Value, frozen=True):
    """A request takes its place in the order of grants; these of its items are lacking. `items`: all of them.

    Rows below `first_rows[k]` of item `lacking[k]` are not needed; an empty list: all rows of all of them are. A second
    one for the same request: what it had it has no more, and this is what it needs now. `due`: its first token.
    """

    request_id: str
    items: list[VisualItem]
    lacking: list[int]
    deadline: float
    first_rows: list[int] = []
    due: float = FIRST_COME


class PayloadEnd(_OfAttempt, frozen=True):
    """A `Receive` has returned. `error` None: all runs are there and right. `is_broken`: the link is of no more use."""

    encode_rank: int
    epoch: int
    error: str | None = None
    is_broken: bool = False


class Consumed(_OfAttempt, frozen=True):
    """The rows below `rows` are in the key-value cache and will not be read again."""

    rows: int


class Returned(_OfAttempt, frozen=True):
    """Answer to `Recall`: nobody reads rows of this attempt any more."""


class Prolong(_Value, frozen=True):
    """The request has another deadline."""

    request_id: str
    deadline: float


_OfRequests = Expect | Assign | Cancel | Prolong
LanguageEvent = LinkUp | LinkDown | FrameIn | Tick | _OfRequests | PayloadEnd | Consumed | Returned


# ---- events of the encode side ----


class Encoded(_Value, frozen=True):
    """The rows are in memory."""

    attempt: Attempt


class PayloadSent(_Value, frozen=True):
    """A `SendPayload` has returned; `error` None: everything is on its way."""

    language_rank: int
    epoch: int
    attempt: Attempt
    error: str | None = None


EncodeEvent = LinkUp | LinkDown | FrameIn | Tick | Encoded | ItemFailed | PayloadSent


# ---- actions of both sides ----


class SendFrame(_Value, frozen=True):
    peer: int
    frame: Frame


class BreakLink(_Value, frozen=True):
    """Close the link's connection; for the sessions it is down already."""

    peer: int
    epoch: int
    reason: str


class Tell(_Value, frozen=True):
    """Tell the router. On the language side a `RequestFailed` is of a request that the sessions have forgotten, because
    its deadline has passed."""

    message: ItemReceived | ItemLost | ItemFailed | RequestFailed


# ---- actions of the language side ----


class Receive(_Value, frozen=True):
    """Post the receives of a payload; answer with one `PayloadEnd`, whatever happens.

    `room` holds the blocks of the granted rows (with their DeepStack when that is ranged), `hold` what the item has
    for its whole life: its aux slot and, unless ranged, its DeepStack blocks. `payload_s`: how long it may take.
    """

    encode_rank: int
    epoch: int
    header: Header
    grant: Grant | Resume
    visual: VisualItem
    room: Lease
    hold: Lease
    payload_s: float


class RowsReady(_OfAttempt, frozen=True):
    """The engine may read rows [start, stop) until it says `Consumed` or `Returned`."""

    start: int
    stop: int


class Recall(_OfAttempt, frozen=True):
    """The engine has to forget what it took from this attempt, then `Returned`."""


LanguageAction = SendFrame | BreakLink | Receive | RowsReady | Recall | Tell


# ---- actions of the encode side ----


class StartEncode(_Value, frozen=True):
    """Fetch, decode and encode; answer with `Encoded` or `ItemFailed`. `is_alone`: beside nothing else. `waited_s`:
    since the grant."""

    attempt: Attempt
    visual: VisualItem
    is_alone: bool
    due: float = FIRST_COME
    waited_s: float = 0.0


class SendHeader(_Value, frozen=True):
    """Send the header of what `grant` asks for, as frame `seq` of `epoch`."""

    peer: int
    epoch: int
    seq: int
    grant: Grant | Resume


class SendPayload(_Value, frozen=True):
    """Send what `grant` asks for, in `payload_s` at most; answer with one `PayloadSent`, whatever happens."""

    language_rank: int
    epoch: int
    grant: Grant | Resume
    payload_s: float


class Release(_Value, frozen=True):
    """Stop working on the attempt, if that is still going on, and forget its rows."""

    attempt: Attempt


EncodeAction = SendFrame | BreakLink | StartEncode | SendHeader | SendPayload | Release | Tell
