"""`POST /v1/messages` and `/v1/messages/count_tokens`: an answer as blocks, whole or as events, in Anthropic's form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
from starlette.types import Receive, Scope, Send

from qwen3vl_disagg.cluster.backend import FinishedEvent
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams
from qwen3vl_disagg.processing import Parts
from qwen3vl_disagg.serving.answer import Answer
from qwen3vl_disagg.serving.chat_forms import TypedEvent
from qwen3vl_disagg.serving.errors import ErrorEnvelope, JSONResponse, messages_error
from qwen3vl_disagg.serving.intake import Arrived, Intake
from qwen3vl_disagg.serving.messages_request import MessagesRequest

# ---- the answer ----


class TextBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    text: str = ""


class ThinkingBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str = ""
    signature: str = ""
    """There is none."""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: msgspec.Raw


class MessagesUsage(msgspec.Struct, kw_only=True):
    """`input_tokens`: of the prompt, but those that were cached."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int


class MessagesBody(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock] = msgspec.field(default_factory=list)
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage
    timings: RequestTimings | msgspec.UnsetType = msgspec.UNSET


class TokenCount(msgspec.Struct, kw_only=True):
    input_tokens: int


# ---- how it grows ----


class MessagesWriter:
    """Reasoning, text and calls of an answer -> blocks, in the order in which they come, and events about them."""

    def __init__(
        self, request: MessagesRequest, answer: Answer, sampling: SamplingParams, request_id: str, model: str
    ) -> None:
        self._answer = answer
        usage = MessagesUsage(input_tokens=len(answer.prompt_ids), output_tokens=0)
        self.whole = MessagesBody(id=f"msg_{request_id}", model=model, usage=usage)
        self._open: TextBlock | ThinkingBlock | None = None
        """The last block, while there may be more of it."""
        self._texts: list[str] = []
        """Of the open block."""

    def begin(self) -> Iterator[TypedEvent]:
        yield {"type": "message_start", "message": self.whole}
        yield {"type": "ping"}

    def silence(self) -> Iterator[TypedEvent]:
        yield {"type": "ping"}

    def take(self, new: Parts) -> Iterator[TypedEvent]:
        if new.reasoning:
            if not isinstance(self._open, ThinkingBlock):
                yield from self._begin_block(ThinkingBlock())
            yield self._delta("thinking_delta", thinking=self._kept(new.reasoning))
        if new.content:
            if not isinstance(self._open, TextBlock):
                yield from self._begin_block(TextBlock())
            yield self._delta("text_delta", text=self._kept(new.content))
        calls = self._answer.parts.calls
        for call in calls[len(calls) - len(new.calls) :]:
            yield from self._close()
            block = ToolUseBlock(id=call.id, name=call.function.name, input=msgspec.Raw(b"{}"))
            self.whole.content.append(block)
            yield {"type": "content_block_start", "index": self._index, "content_block": block}
            yield self._delta("input_json_delta", partial_json=call.function.arguments)
            block.input = msgspec.Raw(call.function.arguments.encode())
            yield {"type": "content_block_stop", "index": self._index}

    def end(self, event: FinishedEvent) -> Iterator[TypedEvent]:
        yield from self._close()
        whole, parts = self.whole, self._answer.parts
        if parts.calls and parts.reason(event.finish_reason) == "tool_calls":
            whole.stop_reason = "tool_use"
        elif parts.is_stopped:
            whole.stop_reason, whole.stop_sequence = "stop_sequence", parts.stop_string
        else:
            whole.stop_reason = "max_tokens" if event.finish_reason == "length" else "end_turn"
        chat, num_cached = self._answer.usage(), event.timings.cached_tokens
        whole.usage = MessagesUsage(
            input_tokens=chat.prompt_tokens - num_cached,
            cache_read_input_tokens=num_cached,
            output_tokens=chat.completion_tokens,
        )
        whole.timings = event.timings
        delta = {"stop_reason": whole.stop_reason, "stop_sequence": whole.stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": whole.usage, "timings": whole.timings}
        yield {"type": "message_stop"}

    def failed(self, status: int, body: ErrorEnvelope) -> TypedEvent:
        return {"type": "error", "error": messages_error(status, body).error}

    lost = failed

    def _begin_block(self, block: TextBlock | ThinkingBlock) -> Iterator[TypedEvent]:
        yield from self._close()
        self._open, self._texts = block, []
        self.whole.content.append(block)
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _kept(self, text: str) -> str:
        self._texts.append(text)
        return text

    def _close(self) -> Iterator[TypedEvent]:
        block, self._open = self._open, None
        if isinstance(block, ThinkingBlock):
            block.thinking = "".join(self._texts)
            yield self._delta("signature_delta", signature=block.signature)
        elif isinstance(block, TextBlock):
            block.text = "".join(self._texts)
        if block is not None:
            yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, kind: str, **fields: str) -> TypedEvent:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **fields}}

    @property
    def _index(self) -> int:
        return len(self.whole.content) - 1


class CountTokens:
    """Tokens of the prompt that a request would make."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(arrived: Arrived) -> None:
            count = TokenCount(input_tokens=len(arrived.prepared.prompt.token_ids))
            await JSONResponse(count)(scope, receive, send)

        await self._intake.run("count", scope, receive, answer)
