"""The shapes of answers."""

from __future__ import annotations

from typing import Literal

import msgspec

from qwen3vl_disagg.core.requests import RequestTimings
from qwen3vl_disagg.processing import AnswerReason, ToolCall
from qwen3vl_disagg.serving.errors import ErrorBody
from qwen3vl_disagg.serving.prompt_scores import PromptToken


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int


class ChatUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET
    """Given when there was reasoning."""


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    token_id: int
    logprob: float
    bytes: list[int]


class LogprobEntry(TopLogprob, kw_only=True):
    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct, kw_only=True):
    content: list[LogprobEntry]


class AnswerMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    """None beside tool calls if nothing else was said."""
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    """The same, as vLLM's newer versions call it."""
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class Choice(msgspec.Struct, kw_only=True):
    index: int = 0
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: AnswerReason
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    timings: RequestTimings
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[dict[str, PromptToken] | None] | msgspec.UnsetType = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """A list for each thing, an entry for each token; null where nothing can be said of a prompt's first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: AnswerReason | None
    timings: RequestTimings | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[dict[str, PromptToken] | None] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: ChatUsage


class CompletionChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: ChatUsage | msgspec.UnsetType | None = msgspec.UNSET


class ToolCallDelta(ToolCall, frozen=True, kw_only=True):
    """A whole call; `index` counts them."""

    index: int


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same."""
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: AnswerReason | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: ChatUsage | msgspec.UnsetType | None = msgspec.UNSET
    timings: RequestTimings | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class PoolingUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, num_tokens: int) -> PoolingUsage:
        return cls(prompt_tokens=num_tokens, total_tokens=num_tokens)


class Embedding(msgspec.Struct, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """A text: base64 of little-endian float32."""


class Embeddings(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: PoolingUsage


class RankedDocument(msgspec.Struct, kw_only=True):
    text: str | None


class RankingResult(msgspec.Struct, kw_only=True):
    index: int
    document: RankedDocument | msgspec.UnsetType = msgspec.UNSET
    relevance_score: float


class Ranking(msgspec.Struct, kw_only=True):
    id: str
    model: str
    results: list[RankingResult]
    usage: PoolingUsage


class ScoreOfPair(msgspec.Struct, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class Scores(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreOfPair]
    usage: PoolingUsage


class Model(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen3vl-disagg"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Version(msgspec.Struct, kw_only=True):
    version: str


class Health(msgspec.Struct, kw_only=True):
    status: Literal["ok"] = "ok"


class ReadyState(msgspec.Struct, kw_only=True):
    status: Literal["ready", "degraded", "not_ready"]
    ready: bool
    degraded: bool
    reasons: list[str]


class NotReady(ReadyState, kw_only=True):
    error: ErrorBody


class TokenizedText(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizedText(msgspec.Struct, kw_only=True):
    prompt: str
