"""What the HTTP surface needs of whoever runs the requests. The hub is one; tests have another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from qwen3vl_disagg.cluster.loads import Load
from qwen3vl_disagg.cluster.media_store import MediaStore
from qwen3vl_disagg.cluster.registry import RankKey
from qwen3vl_disagg.cluster.traces import Watched
from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.core.requests import FinishReason, RequestTimings, SamplingParams, TokenLogprob, VisualItem
from qwen3vl_disagg.protocol.messages import PromptLogprobs


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests can be served. `degraded`: served, but a role or a rank is missing; `reasons` name what is."""

    ready: bool
    degraded: bool = False
    reasons: list[str] = msgspec.field(default_factory=list)


class AllDecoded(msgspec.Struct, frozen=True):
    """All media of the request are good (at once, if it has none): the answer may begin."""


class TokenEvent(msgspec.Struct, frozen=True):
    """`timings` come with the first token: all stages but `decode`."""

    token_id: int
    logprob: TokenLogprob | None = None
    timings: RequestTimings | None = None


class FinishedEvent(msgspec.Struct, frozen=True):
    """The last event of a request that was answered. `vector`: as in `Finished`."""

    finish_reason: FinishReason
    timings: RequestTimings
    vector: bytes = b""


Event = AllDecoded | PromptLogprobs | TokenEvent | FinishedEvent


class PromptCall(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and how it is answered, `sampling.n` times. `token_ids`: little-endian int32. `target_s`: as in
    `Admit`, `keep_as`: as in `Submit`."""

    token_ids: bytes
    items: list[VisualItem]
    sampling: SamplingParams
    target_s: float = FIRST_COME
    keep_as: str = ""


class RequestHandle(Protocol):
    """One answer that is being made. Iterated once: AllDecoded and PromptLogprobs (of a prompt's first answer), then
    tokens, then FinishedEvent; or a DisaggError is raised (InputError for a broken image or clip)."""

    request_id: str
    """Of the answer's prompt."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self) -> None:
        """The client is gone, has all it wants, or the time is up. May be called at any stage and more than once."""


class Backend(Protocol):
    media: MediaStore

    def readiness(self) -> Readiness: ...

    def refusal(self, num_coming: int = 0) -> DisaggError | None:
        """Why a request would not be taken now, whatever it is. `num_coming`: those that will be submitted before."""

    def submit(self, prompts: Sequence[PromptCall], timeout_s: float) -> Sequence[RequestHandle]:
        """Start a request whose bytes `media` holds; it may take `timeout_s` seconds in all. Does not wait.

        All of its prompts are taken, or none. A handle for each answer, those to one prompt behind one another. What
        ends one answer to a prompt with an error ends all to it.

        The bytes of a prompt are released when the last answer to it ends, or it is not taken: OverloadedError,
        UnavailableError or InputError.
        """

    def rank_loads(self) -> Mapping[RankKey, Load | None]:
        """What each rank has to do, as it last said; None for one that is missing."""

    async def spans(self, after: int = 0) -> Watched:
        """What ranks did lately, of that what has a number from `after` on; asks them, and waits a second at most."""

    def debug_processes(self) -> list[dict[str, Any]]:
        """Pids and roles of all processes of the job."""
