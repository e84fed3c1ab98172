"""Every message that crosses a process border, as tagged msgspec structs: never pickle, never code.

Two kinds of connection carry them, both TCP with the framing of `control.py`:

* **hub**: each rank <-> the frontend process, which routes. A rank opens it with `RankHello`.
* **link**: each encode rank <-> each language rank, beside the 2-rank process group that carries the rows. The encode
  rank opens it with `LinkHello`.

A session is one item of one request: (`request_id`, `item`). Each try on an encode rank is one `attempt`, counted from
1 by the router; whatever belongs to an older attempt changes nothing.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import Failure
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams, TokenLogprob, VisualItem
from qwen3vl_disagg.core.spans import Span

PROTOCOL_VERSION = 19


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base: the struct's name is its tag on the wire."""


Attempt = tuple[str, int, int]
"""request id, item, attempt"""


class OfAttempt(Message, frozen=True):
    """About one try at one item."""

    request_id: str
    item: int
    attempt: int

    @property
    def key(self) -> Attempt:
        return self.request_id, self.item, self.attempt


# ---- on both kinds of connection ----


class Heartbeat(Message, frozen=True):
    """Sent when nothing else was for a while; a connection silent for longer than its limit is dead."""


class Refused(Message, frozen=True):
    """Answer to a hello that does not fit; the connection is closed after it."""

    field: str
    expected: str
    got: str


# ---- hub: rank -> frontend ----


class KeptRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that a language rank goes on with, or whose answers it has, while nobody hears them.

    `name`: what it was kept as (`Submit`). `last_attempt`: no attempt at an item of it has had a higher number; a run
    that begins anew under its id counts on.
    """

    name: str
    request_id: str
    last_attempt: int = 0


class RankHello(Message, frozen=True):
    """First message of a rank. `link_address` (host, port) is where a language rank listens for encode ranks.

    `rank` is None for an encode rank that joins: the answer says its number, which it states from then on, and the
    `job`, which all that come again state. `host` is where `pid` means something (`rendezvous.host_id`).
    `weight_bytes`: of the model that is in this process. `kv_tokens`: keys and values it has room for. `kept`: what an
    earlier frontend has left.
    """

    token: str
    role: Literal["encode", "language"]
    rank: int | None
    pid: int
    fingerprint: dict[str, str]
    host: str = ""
    job: str = ""
    link_address: tuple[str, int] | None = None
    weight_bytes: int = 0
    kv_tokens: int = 0
    kept: list[KeptRequest] = []


class LinksUp(Message, frozen=True):
    """An encode rank's current links; it can be given items for these language ranks. `epochs` in the same order."""

    language_ranks: list[int]
    epochs: list[int] = []


class Leaving(Message, frozen=True):
    """An encode rank wants to go: no new items. The answer is `Stop`, when nothing of it is needed any more."""


class Decoded(OfAttempt, frozen=True):
    """The item's bytes are a good image or clip: a streamed answer may begin."""


class ItemFailed(OfAttempt, frozen=True):
    """An encode rank gives an item up; unless the failure is final, another one may try."""

    failure: Failure


class EncodingBegun(Message, frozen=True):
    """An encode rank works on this content from now on: if it dies before `EncodingEnded`, that may be why."""

    digest: str


class EncodingEnded(Message, frozen=True):
    """Nothing of the content is under way any more. `is_well`: there are rows."""

    digest: str
    is_well: bool


class LanguageLoad(Message, frozen=True):
    """What a language rank has to do, sent every so often where it changes. Counts are of its whole life.

    `running`: answers that have pages, `waiting`: those that wait for some; `kv_pages_used` of its `kv_pages`, without
    those that are only remembered. `longest_step_s`: of a step that ended, with what was posted before it.
    """

    running: int = 0
    waiting: int = 0
    kv_pages_used: int = 0
    kv_pages: int = 0
    num_steps: int = 0
    longest_step_s: float = 0.0
    num_preemptions: int = 0
    can_step: bool = False
    """There is something that could be computed now: if `num_steps` stands still, something is wrong."""


class EncodeLoad(Message, frozen=True):
    """The same of an encode rank. `waiting`: items without a place; `running`: those that are pulled, decoded or in the
    tower; `cache_bytes`: of rows that are kept; `num_items` went through the tower in `num_batches`."""

    running: int = 0
    waiting: int = 0
    cache_bytes: int = 0
    num_items: int = 0
    num_batches: int = 0


class Spans(Message, frozen=True):
    """What a rank did: the answer to `TellSpans`. `next`: what to ask for after it, `num_gone`: spans that the rank no
    longer had, `now`: on its monotonic clock."""

    spans: list[Span]
    next: int
    num_gone: int
    now: float


class NeedItems(Message, frozen=True):
    """A language rank has room for these items of a request and lacks their rows.

    Rows below `first_rows[k]` of `items[k]` are not needed; an empty list: all rows of all of them are.
    """

    request_id: str
    items: list[int]
    first_rows: list[int] = []


class ItemLost(OfAttempt, frozen=True):
    """A transfer to a language rank failed; the item has to be assigned again.

    `dead_epoch`: the link of that epoch, and of all earlier ones, is gone; 0 when the link itself is sound.
    """

    reason: str
    dead_epoch: int = 0


class ItemReceived(OfAttempt, frozen=True):
    """Nothing more is needed of an attempt: all rows arrived and were checked, or its request gave up what it had."""


class PromptLogprobs(Message, frozen=True):
    """Log probabilities of a prompt's tokens from `index` on, each once, in order and before the answer's first token.

    Little-endian arrays: of each token its own (float32) and its rank from 1 (int32), and ids (int32) and log
    probabilities (float32) of as many of the most likely ones as were asked for.
    """

    request_id: str
    index: int
    own: bytes
    ranks: bytes
    top_ids: bytes
    top: bytes


class Tokens(Message, frozen=True):
    """New tokens of an answer, in order; `index` is the number of the first one, from 0. `timings` come with the first
    token: a client's end (a stop string, which ranks do not know) has no other.

    `sample`: which of the `sampling.n` answers to the request's prompt, from 0."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    timings: RequestTimings | None = None
    sample: int = 0


class Finished(Message, frozen=True):
    """The end of an answer; that of the last one is the request's.

    `vector`: of a request for a vector or a score, which has no tokens: little-endian float32."""

    request_id: str
    finish_reason: Literal["stop", "length"]
    timings: RequestTimings
    vector: bytes = b""
    sample: int = 0


class RequestFailed(Message, frozen=True):
    """A request ended with an error."""

    request_id: str
    failure: Failure


# ---- hub: frontend -> rank ----


class Welcome(Message, frozen=True):
    """The frontend took the rank in, under this number; the answer to `StoreAt` has none."""

    rank: int | None = None
    job: str = ""


class Peers(Message, frozen=True):
    """To encode ranks: which language ranks to link to (rank, host, port)."""

    language_ranks: list[tuple[int, str, int]]


class Submit(Message, frozen=True):
    """To a language rank: a whole request. `token_ids` are little-endian int32, placeholders expanded. `due_s`: until
    its first token is due (`core/due.py`). `keep_as`: it outlives the frontend for a while, under this name; empty: it
    does not."""

    request_id: str
    token_ids: bytes
    items: list[VisualItem]
    sampling: SamplingParams
    timeout_s: float
    due_s: float = FIRST_COME
    keep_as: str = ""


class Adopt(Message, frozen=True):
    """To a language rank: say all that there is to say of this kept request, from its beginning on. One that is gone
    has failed. `timeout_s`: what its new client gives it, from now on."""

    request_id: str
    timeout_s: float


class Assign(OfAttempt, frozen=True):
    """To a language rank: `item` comes from `encode_rank`; the grant over that link asks for it.

    `is_alone`: nothing else is to be encoded at that time, because a rank died when this was under way.
    """

    encode_rank: int
    is_alone: bool = False


class Cancel(Message, frozen=True):
    """To a language rank: the request is no longer wanted, or this one of its answers."""

    request_id: str
    sample: int | None = None


class TellSpans(Message, frozen=True):
    """Somebody watches: say what you did, from the span of this number on."""

    number: int


class Stop(Message, frozen=True):
    """Leave: the job is going down. The rank says `Goodbye` on its links and exits 0."""


# ---- first messages of connections of their own to the frontend: one question, one answer ----


class StoreAt(Message, frozen=True):
    """Here is the store in which ranks meet; answered with `Welcome`. Also the answer to `FindStore`."""

    token: str
    address: tuple[str, int]


class FindStore(Message, frozen=True):
    """Where is the store? Answered when it is known."""

    token: str


class EndJob(Message, frozen=True):
    """A node was asked to end, and with it the job: as SIGTERM to the frontend. No answer. `lost`: the number of a rank
    that failed for good, maybe before its hello: nobody has to wait for it."""

    token: str
    lost: int | None = None


class Pull(Message, frozen=True):
    """First message: send me the bytes under this SHA-256 (hex)."""

    token: str
    digest: str


class Blob(Message, frozen=True):
    """Answer: `num_bytes` raw bytes follow; -1 when there is nothing under that digest."""

    num_bytes: int


# ---- link: encode rank <-> language rank ----


class LinkHello(Message, frozen=True):
    """`last_epoch`: of the last link between the two; the next one is above it, also if the other end was started
    again."""

    token: str
    encode_rank: int
    pid: int
    fingerprint: dict[str, str]
    last_epoch: int = 0
    has_canary: bool = False
    """`LinkCanary` follows as soon as there is a group."""


class LinkAccept(Message, frozen=True):
    """The fingerprints agree. Both ends now build the 2-rank group under `link/{encode}-{language}/{epoch}` in the
    store at this address (None: they are in one process)."""

    epoch: int
    language_rank: int
    store_address: tuple[str, int] | None = None


class LinkCanary(Message, frozen=True):
    """Encode -> language: rows of a picture follow in the grants of `protocol/canary.py`, with a header for each. What
    arrives has to have these `digests`: of the main rows, and of each DeepStack level."""

    visual: VisualItem
    headers: list[Header]
    digests: list[int]


class LinkReady(Message, frozen=True):
    """Language -> encode: this side has the group too and takes items from now on."""


class Room(OfAttempt, frozen=True):
    """Language -> encode: room for rows [row_start, row_stop) and DeepStack rows [deepstack_start, deepstack_stop).

    `row_runs` and `deepstack_runs` are the lengths of the contiguous runs to send them in.
    """

    row_start: int
    row_stop: int
    deepstack_start: int
    deepstack_stop: int
    row_runs: list[int]
    deepstack_runs: list[int]


class Grant(Room, frozen=True):
    """Fetch the bytes under `visual.digest`, encode them, and send the first rows that are needed, which may lie in the
    middle of the item. The initial transfer of an attempt carries aux, the granted rows, and the DeepStack of these and
    of all behind them. `timeout_s`: until the request's deadline. `is_alone`: see `Assign`, `due_s`: see
    `Submit`."""

    visual: VisualItem
    timeout_s: float
    is_alone: bool = False
    due_s: float = FIRST_COME


class Resume(Room, frozen=True):
    """Rows below `row_start` are here and used; room for more. DeepStack rows are asked for only when an item's
    DeepStack is larger than its whole pool."""


class Header(OfAttempt, frozen=True):
    """Encode -> language, before the rows: what follows on the process group, and the item as the encoder saw it.

    Payload order: aux (of an initial transfer), DeepStack run by run, then for each run of rows embeddings, fill_ids,
    positions. `row_digests` and `deepstack_digests`: one for each run. `preprocess_ms` and `encode_ms` are the
    encoder's wall times, `batch` is the number of the tower's run; all 0 when the rows were `cached`. `queue_ms`: what
    the item waited for besides. `note`: what of the item's file is missing, and therefore in no row.
    """

    total_rows: int
    row_start: int
    row_stop: int
    deepstack_start: int
    deepstack_stop: int
    grid: tuple[int, int, int]
    row_digests: list[int]
    deepstack_digests: list[int]
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    queue_ms: float = 0.0
    cached: bool = False
    batch: int = 0
    note: str = ""


class HeaderOk(OfAttempt, frozen=True):
    """Language -> encode: the header is as it should be, send. The link's thread posts the receives, maybe later, and
    waits `payload_s` seconds for the payload; 0: as long as usual."""

    row_start: int
    payload_s: float = 0.0


class Ack(OfAttempt, frozen=True):
    """Language -> encode: rows below `received` arrived and are right. With all of them the sender may forget."""

    received: int


class Nack(OfAttempt, frozen=True):
    """Either way: that cannot be done, with the reason; the attempt is over."""

    reason: str


class Abort(OfAttempt, frozen=True):
    """Either way: the attempt is no longer wanted."""

    reason: str


class Stale(Message, frozen=True):
    """Answer to a frame of an old epoch, which changed nothing: this is the current one."""

    epoch: int


class Beat(Message, frozen=True):
    """Nothing new; the frame's `seq` is that of the last one, so that a lost frame is noticed."""


class Goodbye(Message, frozen=True):
    """The sender leaves on purpose; not a failure."""


class Frame(Message, frozen=True):
    """What travels on an established link: each direction counts its frames from 1; a gap ends the link."""

    epoch: int
    seq: int
    body: Grant | Resume | Header | HeaderOk | Ack | Nack | Abort | Stale | Beat


_OfItems = Decoded | ItemFailed | EncodingBegun | EncodingEnded | NeedItems | ItemLost | ItemReceived
_OfAnswers = PromptLogprobs | Tokens | Finished | RequestFailed
_FromRank = RankHello | LinksUp | Leaving | LanguageLoad | EncodeLoad | Spans | _OfItems | _OfAnswers
_ToRank = Welcome | Peers | Submit | Adopt | Assign | Cancel | TellSpans | Stop
_OneQuestion = StoreAt | FindStore | EndJob | Pull | Blob

HubMessage = Heartbeat | Refused | _FromRank | _ToRank | _OneQuestion
LinkMessage = Heartbeat | Refused | LinkHello | LinkAccept | LinkCanary | LinkReady | Frame | Goodbye
