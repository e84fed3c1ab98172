"""`POST /v1/responses`: an answer as a list of items, whole or as typed events. Form and events are OpenAI's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from qwen3vl_disagg.cluster.backend import FinishedEvent
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams
from qwen3vl_disagg.processing import Parts, ToolCall
from qwen3vl_disagg.serving.answer import Answer
from qwen3vl_disagg.serving.chat_forms import TypedEvent
from qwen3vl_disagg.serving.errors import ErrorEnvelope
from qwen3vl_disagg.serving.response_request import ResponseRequest
from qwen3vl_disagg.serving.types import LogprobEntry

ItemStatus = Literal["in_progress", "completed", "incomplete"]


# ---- the answer ----


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str = ""
    annotations: list[str] = msgspec.field(default_factory=list)
    """There are none."""
    logprobs: list[LogprobEntry] = msgspec.field(default_factory=list)


class ReasoningText(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str = ""


class MessageItem(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: ItemStatus = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = msgspec.field(default_factory=list)


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    status: ItemStatus = "in_progress"
    summary: list[str] = msgspec.field(default_factory=list)
    """There is none: the reasoning itself is told."""
    content: list[ReasoningText] = msgspec.field(default_factory=list)


class CallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"


OutputItem = MessageItem | ReasoningItem | CallItem


class InputTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(msgspec.Struct, kw_only=True):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(msgspec.Struct, kw_only=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseBody(msgspec.Struct, kw_only=True):
    """Fields of type Raw repeat what was asked for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: Literal[False] = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: msgspec.Raw
    max_output_tokens: msgspec.Raw
    metadata: msgspec.Raw
    model: str
    output: list[OutputItem] = msgspec.field(default_factory=list)
    parallel_tool_calls: msgspec.Raw
    previous_response_id: None = None
    reasoning: msgspec.Raw
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float
    text: msgspec.Raw
    tool_choice: msgspec.Raw
    tools: msgspec.Raw
    top_logprobs: msgspec.Raw
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    timings: RequestTimings | msgspec.UnsetType = msgspec.UNSET


# ---- how it grows ----


class ResponseWriter:
    """Reasoning, text and calls of an answer -> items, in the order in which they come, and events about them."""

    def __init__(
        self, request: ResponseRequest, answer: Answer, sampling: SamplingParams, request_id: str, model: str
    ) -> None:
        self._answer, self._wants_logprobs, self._id = answer, request.wants_logprobs, request_id
        repeated: dict[str, Any] = {name: msgspec.Raw(text.encode()) for name, text in request.repeated.items()}
        self.whole = ResponseBody(
            id=f"resp_{request_id}",
            created_at=int(time.time()),
            model=model,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            **repeated,
        )
        self._number = self._num_entries = 0
        self._entries: list[LogprobEntry] = []
        """Of text that is held back."""
        self._open: MessageItem | ReasoningItem | None = None
        """The last item, while there may be more of it."""
        self._texts: list[str] = []
        """Of the open item."""

    def begin(self) -> Iterator[TypedEvent]:
        yield self._event("response.created", response=self.whole)
        yield self._event("response.in_progress", response=self.whole)

    def silence(self) -> Iterator[TypedEvent]:
        body = msgspec.structs.replace(self.whole, output=[])
        yield self._event("response.in_progress", response=body)

    def take(self, new: Parts) -> Iterator[TypedEvent]:
        if self._wants_logprobs:
            self._take_entries()
        if new.reasoning:
            if not isinstance(self._open, ReasoningItem):
                yield from self._close()
                yield from self._begin_item(ReasoningItem(id=self._item_id("rs"), content=[ReasoningText()]))
            yield from self._more("response.reasoning_text.delta", new.reasoning)
        if new.content:
            yield from self._say(new.content)
        calls = self._answer.parts.calls
        for call in calls[len(calls) - len(new.calls) :]:
            yield from self._close()
            yield from self._call(call)

    def end(self, event: FinishedEvent) -> Iterator[TypedEvent]:
        """An answer that was not cut has a message, or calls."""
        whole, parts = self.whole, self._answer.parts
        is_cut = event.finish_reason == "length" and not parts.is_stopped
        if not is_cut and not any(isinstance(item, (MessageItem, CallItem)) for item in whole.output):
            yield from self._say("")
        yield from self._close("incomplete" if is_cut else "completed")
        whole.status = "incomplete" if is_cut else "completed"
        whole.incomplete_details = IncompleteDetails() if is_cut else None
        whole.completed_at = None if is_cut else int(time.time())
        whole.usage, whole.timings = self._usage(event.timings.cached_tokens), event.timings
        yield self._event(f"response.{whole.status}", response=whole)

    def failed(self, status: int, body: ErrorEnvelope) -> TypedEvent:
        self.whole.status = "failed"
        code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"] = "server_error"
        if status < 500:
            code = "rate_limit_exceeded" if status == 429 else "invalid_prompt"
        self.whole.error = ResponseFailure(code=code, message=body.error.message)
        return self._event("response.failed", response=self.whole)

    def lost(self, status: int, body: ErrorEnvelope) -> TypedEvent:
        """OpenAI's other event of errors: this one needs nothing of the answer, and says no number it cannot know."""
        return {"type": "error", "code": body.error.code, "message": body.error.message, "param": None}

    def _say(self, text: str) -> Iterator[TypedEvent]:
        if not isinstance(self._open, MessageItem):
            yield from self._close()
            yield from self._begin_item(MessageItem(id=self._item_id("msg"), content=[OutputText()]))
        entries, self._entries = self._entries, []
        if isinstance(self._open, MessageItem):
            self._open.content[0].logprobs += entries
        if text:
            yield from self._more("response.output_text.delta", text, logprobs=entries)

    def _take_entries(self) -> None:
        """One with each token, so that there is no burst of them where much text was held back."""
        num_reasoning = self._answer.parts.reasoning_tokens
        start = num_reasoning + 1 if num_reasoning else 0  # behind the one that ends it
        if start > self._num_entries:
            self._entries = []
        self._entries += self._answer.entries(max(start, self._num_entries))
        self._num_entries = len(self._answer.logprobs)

    def _begin_item(self, item: MessageItem | ReasoningItem) -> Iterator[TypedEvent]:
        """`item` has its one part, which is told apart."""
        self._open, self._texts = item, []
        self.whole.output.append(item)
        empty = msgspec.structs.replace(item, content=[])
        yield self._event("response.output_item.added", output_index=self._index, item=empty)
        yield self._part("response.content_part.added", item, part=item.content[0])

    def _more(self, kind: str, text: str, **fields: object) -> Iterator[TypedEvent]:
        self._texts.append(text)
        if self._open is not None:
            yield self._part(kind, self._open, delta=text, **fields)

    def _close(self, status: ItemStatus = "completed") -> Iterator[TypedEvent]:
        item, self._open = self._open, None
        if item is None:
            return
        part = item.content[0]
        part.text, item.status = "".join(self._texts), status
        if isinstance(part, OutputText):
            yield self._part("response.output_text.done", item, text=part.text, logprobs=part.logprobs)
        else:
            yield self._part("response.reasoning_text.done", item, text=part.text)
        yield self._part("response.content_part.done", item, part=part)
        yield self._event("response.output_item.done", output_index=self._index, item=item)

    def _call(self, call: ToolCall) -> Iterator[TypedEvent]:
        name, arguments = call.function.name, call.function.arguments
        item = CallItem(id=self._item_id("fc"), call_id=call.id, name=name)
        self.whole.output.append(item)
        where = {"output_index": self._index, "item_id": item.id}
        yield self._event("response.output_item.added", output_index=self._index, item=msgspec.structs.replace(item))
        yield self._event("response.function_call_arguments.delta", **where, delta=arguments)
        yield self._event("response.function_call_arguments.done", **where, name=name, arguments=arguments)
        item.arguments, item.status = arguments, "completed"
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self._entries = []  # those until here are of the call

    def _usage(self, cached_tokens: int) -> ResponseUsage:
        chat, num_reasoning = self._answer.usage(), self._answer.parts.reasoning_tokens
        return ResponseUsage(
            input_tokens=chat.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=cached_tokens),
            output_tokens=chat.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=num_reasoning),
            total_tokens=chat.total_tokens,
        )

    @property
    def _index(self) -> int:
        return len(self.whole.output) - 1

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._id}_{len(self.whole.output)}"

    def _part(self, kind: str, item: MessageItem | ReasoningItem, **fields: object) -> TypedEvent:
        return self._event(kind, item_id=item.id, output_index=self._index, content_index=0, **fields)

    def _event(self, kind: str, **fields: object) -> TypedEvent:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}
