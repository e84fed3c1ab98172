"""What the router takes in and what it gives back: plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.protocol.messages import Decoded, Finished, Message, Tokens

Role = Literal["encode", "language"]
TOKEN_ID_BYTES = 4


# ---- events ----


@dataclass(frozen=True)
class Admit:
    """A new request. `token_ids` are little-endian int32; `num_tokens` counts prompt and output at most."""

    request_id: str
    token_ids: bytes
    num_tokens: int
    items: list[VisualItem]
    sampling: SamplingParams
    timeout_s: float


@dataclass(frozen=True)
class Abandon:
    """The client no longer wants the request."""

    request_id: str


@dataclass(frozen=True)
class RankUp:
    """`kv_tokens`: keys and values that a language rank has room for."""

    role: Role
    rank: int
    kv_tokens: int = 0


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
class Tick:
    """Time has passed: look at the deadlines."""


@dataclass(frozen=True)
class Drain:
    """Admit nothing more."""


@dataclass(frozen=True)
class EndAll:
    """End every request with this error."""

    error: DisaggError


Event = Admit | Abandon | RankUp | RankDown | FromRank | Tick | Drain | EndAll


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
    message: Decoded | Tokens | Finished


@dataclass(frozen=True)
class End:
    """The request is over, once: free what it holds. With an error, tell the client."""

    request_id: str
    error: DisaggError | None = None


Action = Send | Deliver | End
