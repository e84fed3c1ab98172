"""What comes of requests, as `LLM` gives it back."""

from __future__ import annotations

from typing import Any

import msgspec

from qwen3vl_disagg.core.pooling import read_score, read_vector
from qwen3vl_disagg.core.requests import RequestTimings, TokenLogprob
from qwen3vl_disagg.llm.requests import Ended, LocalAnswer
from qwen3vl_disagg.processing import AnswerReason, Prompt, ToolCall


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One answer, as `generate --json` prints it. `token_ids` ends with the end token if it came; `text` has none.

    `text` is without what the model thought and the tools it called; `token_ids` and `logprobs` have all of it.
    """

    text: str
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: AnswerReason
    usage: Usage
    timings: RequestTimings
    logprobs: list[TokenLogprob] | None = None
    others: list[ChatResult] | None = None
    """With `SamplingParams(n=..)`: the further answers to the same conversation, whose prompt was computed once."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; each logprobs entry is `{"token_id", "logprob", "top": [[id, logprob], ..]}`."""
        return msgspec.to_builtins(self)


def chat_result(ended: Ended) -> ChatResult:
    first, *others = (_of_answer(ended.prompt, answer) for answer in ended.answers)
    first.others = others or None
    return first


def _of_answer(prompt: Prompt, answer: LocalAnswer) -> ChatResult:
    parts = answer.parts
    num_prompt, num_new = len(prompt.token_ids), len(parts.token_ids)
    return ChatResult(
        text=parts.content,
        reasoning_content=parts.reasoning or None,
        tool_calls=parts.calls or None,
        token_ids=parts.token_ids,
        prompt_token_ids=prompt.token_ids,
        finish_reason=parts.reason(answer.finish_reason or "stop"),
        usage=Usage(prompt_tokens=num_prompt, completion_tokens=num_new, total_tokens=num_prompt + num_new),
        timings=answer.timings,
        logprobs=answer.logprobs or None,
    )


class EmbedResult(msgspec.Struct, kw_only=True):
    embedding: list[float]
    """Of length 1."""
    usage: Usage
    timings: RequestTimings


class ScoreResult(msgspec.Struct, kw_only=True):
    score: float
    """From 0 to 1."""
    usage: Usage
    timings: RequestTimings


def _usage(ended: Ended) -> Usage:
    num_prompt = len(ended.prompt.token_ids)
    return Usage(prompt_tokens=num_prompt, completion_tokens=0, total_tokens=num_prompt)


def embed_result(ended: Ended) -> EmbedResult:
    [pooled] = ended.answers
    return EmbedResult(embedding=list(read_vector(pooled.vector)), usage=_usage(ended), timings=pooled.timings)


def score_result(ended: Ended) -> ScoreResult:
    [pooled] = ended.answers
    return ScoreResult(score=read_score(pooled.vector), usage=_usage(ended), timings=pooled.timings)
