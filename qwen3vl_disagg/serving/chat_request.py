"""A chat request as a value, checked field by field. What may stand in one at all: `processing/request_fields.py`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.sampling_params import Route
from qwen3vl_disagg.processing import parse_tools
from qwen3vl_disagg.processing.prompt_options import PromptOptions
from qwen3vl_disagg.processing.request_fields import check_fields, no_choice
from qwen3vl_disagg.serving.grammar_fields import read_grammar, read_tool_choice
from qwen3vl_disagg.serving.sampling_fields import SamplingFields


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """A checked request, without its messages and tools: they are large, and the prompt made of them lives on."""

    sampling: SamplingFields
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    has_tools: bool = False
    """The model is shown some."""
    grammar: Grammar | None = None
    prompt: PromptOptions = PromptOptions()


def check_model(model: object, names: Collection[str]) -> None:
    """InputError, 404 for another model's name; null is any."""
    if model is not None and not isinstance(model, str):
        raise InputError("model must be a string", param="model")
    if model is not None and model not in names:
        raise InputError(f"there is no model {model!r} here", param="model", status=404, code="model_not_found")


def parse_chat_request(
    raw: dict[str, Any], *, model_names: Collection[str], route: Route = "chat"
) -> tuple[ChatRequest, list[dict[str, Any]]]:
    """The request, every field checked, and the tools that the model is shown; with `tool_choice` none it sees none.
    The processor checks the messages. Other routes than chat check which fields may be there.

    InputError with `param`; 404 for another model's name.
    """
    check_model(raw.get("model"), model_names)
    if "messages" not in raw:
        raise InputError("messages is missing", param="messages")
    if route == "chat":
        check_fields(raw, "request", besides=no_choice(raw))
    sampling = SamplingFields.read(raw, route)
    options = raw.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise InputError("stream_options must be an object", param="stream_options")
    options = options or {}
    tools = [] if raw.get("tools") is None else parse_tools(raw["tools"])
    choice, name = read_tool_choice(raw.get("tool_choice"), tools)
    shown = [] if choice == "none" else tools
    if _flag(raw, "stream") and "prompt_logprobs" in sampling.values:
        raise InputError("prompt_logprobs are not streamed", param="prompt_logprobs")
    request = ChatRequest(
        sampling=sampling,
        stream=_flag(raw, "stream"),
        include_usage=_flag(options, "include_usage", "stream_options."),
        continuous_usage=_flag(options, "continuous_usage_stats", "stream_options."),
        return_token_ids=_flag(raw, "return_token_ids"),
        has_tools=bool(shown),
        grammar=read_grammar(raw, shown, choice, name),
        prompt=PromptOptions.read(raw),
    )
    return request, shown


def _flag(raw: dict[str, Any], name: str, prefix: str = "") -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{prefix}{name} must be true or false", param=f"{prefix}{name}")
    return bool(value)
