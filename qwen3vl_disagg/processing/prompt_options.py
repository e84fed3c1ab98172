"""What a request says about its prompt beside messages and tools."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.processing.media_options import NO_OPTIONS, MediaOptions
from qwen3vl_disagg.processing.request_fields import OneOf, check_object, read_flag

_TEMPLATES_OWN = frozenset(
    {"messages", "tools", "documents", "tokenize", "chat_template", "return_dict", "return_tensors", "_marks"}
)
"""What no client may give a template."""
MAX_VALUE_CHARS = 4096
MAX_SALT_CHARS = 1024
_read_effort = OneOf(("none", "minimal", "low", "medium", "high", "xhigh", "max"))


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model shall think before it answers, and which field says so."""

    is_wanted: bool
    param: str
    effort: str | None = None
    """For templates that know one."""


class PromptOptions(msgspec.Struct, frozen=True, kw_only=True):
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The answer goes on where the last message, the assistant's, ends."""
    variables: dict[str, Any] = msgspec.field(default_factory=dict)
    """More of the template's, each of which it must know."""
    thinking: Thinking | None = None
    cache_salt: str = ""
    """A digest of whose request it is; see `VisualItem.salt`."""
    image: MediaOptions = NO_OPTIONS
    clip: MediaOptions = NO_OPTIONS

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> PromptOptions:
        """Of a chat request. InputError with `param`."""
        variables = dict(check_object(raw.get("chat_template_kwargs"), "chat_template_kwargs"))
        for name, value in variables.items():
            where = f"chat_template_kwargs.{name[:64]}"
            if name in _TEMPLATES_OWN:
                raise InputError(f"{name} is not the request's to say", param="chat_template_kwargs")
            if not isinstance(value, (str, int, float, type(None))) or len(str(value)) > MAX_VALUE_CHARS:
                raise InputError(f"{where} must be a number, true, false or a short text", param=where)
        flags = dict[str, bool]()
        for name, default in (("continue_final_message", False), ("add_generation_prompt", True)):
            where, value = name, raw.get(name)
            if variables.get(name) is not None:
                where, value = f"chat_template_kwargs.{name}", variables[name]
            variables.pop(name, None)
            if value is not None:
                read_flag(value, where)
            if name == "add_generation_prompt" and flags["continue_final_message"]:
                if value:
                    raise InputError(f"{where} and continue_final_message exclude one another", param=where)
                value = False
            flags[name] = default if value is None else value
        thinking = _thinking(raw, variables)
        image, clip = MediaOptions.of_request(raw)
        variables = {name: value for name, value in variables.items() if value is not None}
        return cls(
            **flags,
            variables=variables,
            thinking=thinking,
            cache_salt=_salt(raw.get("cache_salt")),
            image=image,
            clip=clip,
        )


def _salt(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_SALT_CHARS:
        raise InputError(f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters", param="cache_salt")
    return hashlib.sha256(value.encode()).hexdigest()


def _thinking(raw: Mapping[str, Any], variables: dict[str, Any]) -> Thinking | None:
    """What is said in any spelling, of each kind the first: flags say whether, an effort how much, and whether where no
    flag does. Those in `variables` are taken out of it."""
    kwargs = {f"chat_template_kwargs.{name}": variables.pop(name, None) for name in ("enable_thinking", "thinking")}
    effort_in_kwargs = variables.pop("reasoning_effort", None)
    reasoning = check_object(raw.get("reasoning"), "reasoning")
    for name, value in reasoning.items():
        if name not in ("effort", "enabled", "summary", "generate_summary") and value not in (None, False):
            raise NotBuiltYet(f"reasoning.{name[:64]}", param=f"reasoning.{name[:64]}")
    flags = {
        **kwargs,
        "enable_thinking": raw.get("enable_thinking"),
        "think": raw.get("think"),
        "reasoning.enabled": reasoning.get("enabled"),
    }
    efforts = {
        "chat_template_kwargs.reasoning_effort": effort_in_kwargs,
        "reasoning_effort": raw.get("reasoning_effort"),
        "reasoning.effort": reasoning.get("effort"),
    }
    wanted = [(param, read_flag(value, param)) for param, value in flags.items() if value is not None]
    how_much = [(param, _read_effort(value, param)) for param, value in efforts.items() if value is not None]
    said, effort = next(iter(wanted), None), next(iter(how_much), None)
    if said is None:
        return effort and Thinking(is_wanted=effort[1] != "none", param=effort[0], effort=effort[1])
    if effort is None or not said[1]:
        return Thinking(is_wanted=said[1], param=said[0])
    if effort[1] == "none":
        raise InputError(f"{said[0]} is true, and {effort[0]} none", param=effort[0])
    return Thinking(is_wanted=True, param=effort[0], effort=effort[1])
