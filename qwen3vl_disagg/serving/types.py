"""Chat completions as values: the request, checked field by field, and the shapes of the answers."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams
from qwen3vl_disagg.processing import AnswerReason, GenerationDefaults, ToolCall, parse_tools
from qwen3vl_disagg.processing.generation import check_logit_bias, check_number, check_stop

DEFAULT_MAX_TOKENS = 128
"""As on the command line."""

# Fields that would change the answer and are not built, each with the values that ask for nothing. null is always fine.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}

_PASSED = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("min_tokens", "seed"),
)
"""Numbers that are handed on as they are; what is not given is the checkpoint's."""

_NUMBERS = {
    "max_completion_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "top_logprobs": "logprobs",
    **{name: name for name in _PASSED},
}
"""Field -> its row in the table of bounds."""


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request, without its messages: they are large, and the prompt made of them is what lives on.

    `logprobs`: None for none, else how many alternatives each token comes with.
    """

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    max_tokens: int | None = None
    numbers: dict[str, Any] = msgspec.field(default_factory=dict)
    """Those of `_PASSED` that were given."""
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    stop: list[str] = msgspec.field(default_factory=list)
    logprobs: int | None = None
    return_token_ids: bool = False
    ignore_eos: bool = False
    tools: list[dict[str, Any]] = msgspec.field(default_factory=list)
    """What the model may call."""

    def sampling(
        self, defaults: GenerationDefaults, *, num_prompt: int, context: int, vocab_size: int
    ) -> SamplingParams:
        """What the engine needs. InputError if the prompt and the tokens asked for do not fit the context."""
        room = context - num_prompt
        if self.max_tokens is not None and self.max_tokens > room:
            raise InputError(
                f"a prompt of {num_prompt} tokens and {self.max_tokens} new ones: the context is {context}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if max(self.logit_bias, default=0) >= vocab_size:
            raise InputError(f"logit_bias takes token ids from 0 to {vocab_size - 1}", param="logit_bias")
        return defaults.sampling(
            max_new_tokens=min(DEFAULT_MAX_TOKENS, room) if self.max_tokens is None else self.max_tokens,
            logit_bias=self.logit_bias,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            **self.numbers,
        )


def parse_chat_request(raw: dict[str, Any], *, model_name: str) -> ChatRequest:
    """Check every field that is known; unknown ones are tolerated. The messages are checked by the processor.

    InputError with `param`; 404 for another model's name.
    """
    model = raw.get("model")
    if model is not None and not isinstance(model, str):
        raise InputError("model must be a string", param="model")
    if model is not None and model != model_name:
        raise InputError(f"there is no model {model!r} here", param="model", status=404, code="model_not_found")
    if "messages" not in raw:
        raise InputError("messages is missing", param="messages")
    for name, neutral in UNSUPPORTED.items():
        value = raw.get(name)
        if value is not None and not any(_same(value, other) for other in neutral):
            raise NotBuiltYet(name, param=name)
    numbers = {
        name: check_number(row, raw[name], param=name) for name, row in _NUMBERS.items() if raw.get(name) is not None
    }
    stream = _flag(raw, "stream")
    options = _stream_options(raw, stream)
    wants_logprobs = _flag(raw, "logprobs")
    if "top_logprobs" in numbers and not wants_logprobs:
        raise InputError("top_logprobs needs logprobs: true", param="top_logprobs")
    return ChatRequest(
        stream=stream,
        include_usage=_flag(options, "include_usage", "stream_options."),
        continuous_usage=_flag(options, "continuous_usage_stats", "stream_options."),
        max_tokens=numbers.get("max_completion_tokens", numbers.get("max_tokens")),
        numbers={name: numbers[name] for name in _PASSED if name in numbers},
        logit_bias=check_logit_bias({} if raw.get("logit_bias") is None else raw["logit_bias"]),
        stop=check_stop([] if raw.get("stop") is None else raw["stop"]),
        logprobs=numbers.get("top_logprobs", 0) if wants_logprobs else None,
        return_token_ids=_flag(raw, "return_token_ids"),
        ignore_eos=_flag(raw, "ignore_eos"),
        tools=_tools(raw),
    )


def _tools(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools that the model is shown: with `tool_choice` none it sees none."""
    tools = [] if raw.get("tools") is None else parse_tools(raw["tools"])
    return [] if raw.get("tool_choice") == "none" else tools


def _same(value: Any, other: Any) -> bool:
    """Equal, and not a number that passes for a truth value."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _flag(raw: dict[str, Any], name: str, prefix: str = "") -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{prefix}{name} must be true or false", param=f"{prefix}{name}")
    return bool(value)


def _stream_options(raw: dict[str, Any], stream: bool) -> dict[str, Any]:
    options = raw.get("stream_options")
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise InputError("stream_options must be an object", param="stream_options")
    if not stream:
        raise InputError("stream_options needs stream: true", param="stream_options")
    return options


# ---- answers ----


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
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


class Message(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    """None beside tool calls if nothing else was said."""
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class Choice(msgspec.Struct, kw_only=True):
    index: int = 0
    message: Message
    logprobs: Logprobs | None = None
    finish_reason: AnswerReason
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: RequestTimings
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(ToolCall, frozen=True, kw_only=True):
    """A whole call; `index` counts them."""

    index: int


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
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
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: RequestTimings | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Model(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen3vl-disagg"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]
