"""A chat request as a value, checked field by field. What may stand in one at all: `processing/request_fields.py`."""

from __future__ import annotations

from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.sampling_bounds import LIMITS, check_logit_bias, check_number, check_stop
from qwen3vl_disagg.processing import GenerationDefaults, parse_tools
from qwen3vl_disagg.processing.prompt_options import PromptOptions
from qwen3vl_disagg.processing.request_fields import check_fields, is_one_of

# Row in the table of bounds -> its spellings, the first that is given wins; and what clients send for "not set".
_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "max_new_tokens": (("max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict"), (-1, -2)),
    "min_tokens": (("min_tokens", "min_new_tokens"), (-1,)),
    "temperature": (("temperature",), ()),
    "top_p": (("top_p",), ()),
    "top_k": (("top_k",), ()),
    "min_p": (("min_p",), ()),
    "presence_penalty": (("presence_penalty",), ()),
    "frequency_penalty": (("frequency_penalty",), ()),
    "repetition_penalty": (("repetition_penalty", "repeat_penalty"), ()),
    "seed": (("seed",), (-1,)),
    "logprobs": (("top_logprobs",), ()),
}
_PASSED = tuple(name for name in _NUMBERS if name not in ("max_new_tokens", "logprobs"))
"""Handed on as they are; what is not given is the checkpoint's."""


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request, without its messages and tools: they are large, and the prompt made of them lives on.

    `logprobs`: None for none, else how many alternatives each token comes with.
    """

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"
    """Which spelling said it."""
    numbers: dict[str, Any] = msgspec.field(default_factory=dict)
    """Those of `_PASSED` that were given."""
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    stop: list[str] = msgspec.field(default_factory=list)
    logprobs: int | None = None
    return_token_ids: bool = False
    ignore_eos: bool = False
    has_tools: bool = False
    """The model is shown some."""
    prompt: PromptOptions = PromptOptions()

    def sampling(
        self,
        defaults: GenerationDefaults,
        *,
        num_prompt: int,
        context: int,
        vocab_size: int,
        max_answer_tokens: int | None = None,
    ) -> SamplingParams:
        """What the engine needs. InputError if the prompt and the tokens asked for do not fit the context.

        `max_answer_tokens`: bound of an answer whose request names none.
        """
        room = context - num_prompt
        if self.max_tokens is not None and self.max_tokens > room:
            raise InputError(
                f"a prompt of {num_prompt} tokens and {self.max_tokens} new ones: the context is {context}",
                param=self.max_tokens_param,
                code="context_length_exceeded",
            )
        if max(self.logit_bias, default=0) >= vocab_size:
            raise InputError(f"logit_bias takes token ids from 0 to {vocab_size - 1}", param="logit_bias")
        bound = min(room, max_answer_tokens or room, int(LIMITS["max_new_tokens"][1]))
        return defaults.sampling(
            max_new_tokens=bound if self.max_tokens is None else self.max_tokens,
            is_open_ended=self.max_tokens is None,
            logit_bias=self.logit_bias,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            cache_salt=self.prompt.cache_salt,
            **self.numbers,
        )


def parse_chat_request(raw: dict[str, Any], *, model_name: str) -> tuple[ChatRequest, list[dict[str, Any]]]:
    """The request, every field checked, and the tools that the model is shown. The processor checks the messages.

    InputError with `param`; 404 for another model's name.
    """
    model = raw.get("model")
    if model is not None and not isinstance(model, str):
        raise InputError("model must be a string", param="model")
    if model is not None and model != model_name:
        raise InputError(f"there is no model {model!r} here", param="model", status=404, code="model_not_found")
    if "messages" not in raw:
        raise InputError("messages is missing", param="messages")
    check_fields(raw, "request")
    numbers, spelled = _numbers(raw)
    options = raw.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise InputError("stream_options must be an object", param="stream_options")
    options = options or {}
    wants_logprobs = _flag(raw, "logprobs")
    if numbers.get("logprobs") and not wants_logprobs:
        raise InputError("top_logprobs needs logprobs: true", param="top_logprobs")
    tools = _tools(raw)
    request = ChatRequest(
        stream=_flag(raw, "stream"),
        include_usage=_flag(options, "include_usage", "stream_options."),
        continuous_usage=_flag(options, "continuous_usage_stats", "stream_options."),
        max_tokens=numbers.get("max_new_tokens"),
        max_tokens_param=spelled.get("max_new_tokens", "max_tokens"),
        numbers={name: numbers[name] for name in _PASSED if name in numbers},
        logit_bias=check_logit_bias({} if raw.get("logit_bias") is None else raw["logit_bias"]),
        stop=check_stop([] if raw.get("stop") is None else raw["stop"]),
        logprobs=numbers.get("logprobs", 0) if wants_logprobs else None,
        return_token_ids=_flag(raw, "return_token_ids"),
        ignore_eos=_flag(raw, "ignore_eos"),
        has_tools=bool(tools),
        prompt=PromptOptions.read(raw),
    )
    return request, tools


def _numbers(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Row of the table of bounds -> value, and -> the spelling it came in. Each spelling is checked."""
    values, spelled = dict[str, Any](), dict[str, str]()
    for row, (names, not_set) in _NUMBERS.items():
        for name in names:
            value = raw.get(name)
            if value is None or is_one_of(value, not_set):
                continue
            if LIMITS[row][2] and isinstance(value, float) and value.is_integer():
                value = int(value)  # as languages without whole numbers write them
            if row == "top_k" and is_one_of(value, (-1,)):
                value = 0  # off, in either spelling
            if row == "top_p" and is_one_of(value, (0,)):
                value = LIMITS[row][0]  # the most likely token alone
            if row == "seed" and isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 0:
                value += 2**63  # as good a seed as any
            value = check_number(row, value, param=name)
            if row not in values:
                values[row], spelled[row] = value, name
    return values, spelled


def _tools(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools that the model is shown: with `tool_choice` none it sees none."""
    choice = raw.get("tool_choice")
    if choice is not None and not is_one_of(choice, ("none", "auto")):
        raise NotBuiltYet("tool_choice", param="tool_choice")
    tools = [] if raw.get("tools") is None else parse_tools(raw["tools"])
    return [] if choice == "none" else tools


def _flag(raw: dict[str, Any], name: str, prefix: str = "") -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{prefix}{name} must be true or false", param=f"{prefix}{name}")
    return bool(value)
