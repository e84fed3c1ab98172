"""What the router takes in, gives back and remembers; its limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import DisaggError, InputError
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.protocol.messages import Decoded, Finished, KeptRequest, Message, PromptLogprobs, Tokens
from qwen3vl_disagg.protocol.placement import encode_work
from qwen3vl_disagg.protocol.session_events import Tick

Role = Literal["encode", "language"]
TOKEN_ID_BYTES = 4


# ---- events ----


@dataclass(frozen=True)
class Admit:
    """A new request: a prompt and `sampling.n` answers. `token_ids` are little-endian int32; `num_tokens` counts prompt
    and one answer at most. `target_s`: until the first token, before the price is added. `keep_as`: as in `Submit`."""

    request_id: str
    token_ids: bytes
    num_tokens: int
    items: list[VisualItem]
    sampling: SamplingParams
    timeout_s: float
    target_s: float = FIRST_COME
    keep_as: str = ""


@dataclass(frozen=True)
class AdmitTogether:
    """All of these, or none."""

    admits: Sequence[Admit]


@dataclass(frozen=True)
class Abandon:
    """The client no longer wants the request, or this one of its answers."""

    request_id: str
    sample: int | None = None


@dataclass(frozen=True)
class RankUp:
    """`kv_tokens`: keys and values that a language rank has room for. `kept`: requests of an earlier frontend that it
    goes on with."""

    role: Role
    rank: int
    kv_tokens: int = 0
    kept: Sequence[KeptRequest] = ()


@dataclass(frozen=True)
class RankDown:
    role: Role
    rank: int


@dataclass(frozen=True)
class FromRank:
    role: Role
    rank: int
    message: Message


@dataclass(frozen=True)
class Drain:
    """Admit nothing more."""


@dataclass(frozen=True)
class EndAll:
    """End every request with this error."""

    error: DisaggError


Event = Admit | AdmitTogether | Abandon | RankUp | RankDown | FromRank | Tick | Drain | EndAll


# ---- actions ----


@dataclass(frozen=True)
class Send:
    """Post the message to a rank that is up."""

    role: Role
    rank: int
    message: Message


@dataclass(frozen=True)
class Deliver:
    """Pass the message on to whoever waits for the request."""

    request_id: str
    message: Decoded | PromptLogprobs | Tokens | Finished


@dataclass(frozen=True)
class End:
    """The request is over, once: free what it holds. With an error, tell the client."""

    request_id: str
    error: DisaggError | None = None


Action = Send | Deliver | End


# ---- tables ----


@dataclass(frozen=True)
class RouterLimits:
    max_waiting: int = 1024
    """Requests that have no token yet."""
    max_waiting_tokens: int = 1 << 20
    """Their cost (`Admission`); or, if that is more,"""
    max_waiting_fills: int = 8
    """so many times what the language ranks hold at once."""
    max_attempts: int = 3
    """Encodings of one item that may fail before its request does. Deaths of encode ranks are not among these."""
    relief_s: float = 2.0
    relief_factor: float = 5.0
    """An item that has been at an encode rank for `relief_s`, and so many times as long as the fastest rank would have
    taken with all that was before it, goes to one that has nothing to do."""
    encode_wait_s: float = 30.0
    """How long an item waits for an encode rank when none is there."""
    max_deaths: int = 3
    """Encode ranks that may die over an image or clip alone before it is refused."""
    suspect_s: float = 600.0
    """How long that is remembered."""
    max_suspects: int = 1024
    """Images and clips of which it is remembered."""


@dataclass
class Item:
    visual: VisualItem
    state: Literal["idle", "waiting", "encoding", "received"] = "idle"
    attempt: int = 0
    encode_rank: int = -1
    failures: int = 0
    failed_on: set[tuple[int, int]] = field(default_factory=set)
    """(encode rank, its incarnation) of failed attempts."""
    lost_with: set[tuple[int, int]] = field(default_factory=set)
    """Those of whom nothing is known but that a link is gone."""
    relieved: set[tuple[int, int]] = field(default_factory=set)
    """Those that were too slow with it."""
    assigned_at: float = 0.0
    work_ahead: int = 0
    """Of the rank when it was assigned, with its own."""
    wait_until: float = math.inf
    is_decoded: bool = False

    @property
    def work(self) -> int:
        return encode_work(self.visual)


@dataclass
class Request:
    language_rank: int
    items: list[Item]
    num_tokens: int
    deadline: float
    num_received: dict[int, int]
    """Tokens of each answer that has not ended."""
    num_prompt: int
    again: Admit | None = None
    """Of one that is adopted, until its language rank has said something of it: how to begin it anew."""


def harmful(visual: VisualItem) -> InputError:
    """What is said of an image or clip that encode ranks died over."""
    message = f"this {visual.modality} ended the process that encodes it, each time it was tried"
    return InputError(message, param=visual.param, code="harmful_media")
