"""What the HTTP surface needs of whoever runs the requests. The hub is one; tests have another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec

from qwen3vl_disagg.cluster.media_store import MediaStore
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


class RequestHandle(Protocol):
    """A running request. Iterated once: AllDecoded and PromptLogprobs, then tokens, then FinishedEvent; or a
    DisaggError is raised (InputError for a broken image or clip)."""

    request_id: str

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self) -> None:
        """The client is gone, has all it wants, or the time is up. May be called at any stage and more than once."""


class Backend(Protocol):
    media: MediaStore

    def readiness(self) -> Readiness: ...

    def refusal(self, num_coming: int = 0) -> DisaggError | None:
        """Why a request would not be taken now, whatever it is. `num_coming`: those that will be submitted before."""

    def submit(
        self,
        token_ids: list[int],
        items: list[VisualItem],
        sampling: SamplingParams,
        timeout_s: float,
        more: Sequence[tuple[int, SamplingParams]] | None = (),
    ) -> RequestHandle:
        """Start a request whose bytes `media` holds; it may take `timeout_s` seconds in all. Does not wait.

        `more`: lengths and sampling of its further prompts, which are submitted after it, each with None, and are
        not refused for what waits if this one is not.

        The bytes are released when the request ends, or is not taken: OverloadedError, UnavailableError or InputError.
        """

    def debug_processes(self) -> list[dict[str, Any]]:
        """Pids and roles of all processes of the job."""
