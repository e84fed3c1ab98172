"""An answer taken apart as it comes: what the model thinks, what it says, which tools it calls.

    <think>\\nREASONING\\n</think>\\n\\nCONTENT\\n<tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>

Reasoning begins where the prompt left `<think>` open, or where the answer begins with it; a later `<think>` is text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

import msgspec

from qwen3vl_disagg.core.requests import FinishReason, SamplingParams
from qwen3vl_disagg.processing.answer_text import AnswerText
from qwen3vl_disagg.processing.json_values import is_json_object, read_json
from qwen3vl_disagg.processing.tokenizer import Tokenizer
from qwen3vl_disagg.processing.tool_use import is_call_name

AnswerReason = Literal["stop", "length", "tool_calls"]

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
_MAX_HEAD = 64
"""Tokens between the last special token of a prompt and the answer: the role's name, and what opens reasoning."""


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """`arguments`: a JSON object as a string."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


@dataclass
class Parts:
    """A stretch of an answer; joined, the stretches are the whole."""

    reasoning: str = ""
    content: str = ""
    calls: list[FunctionCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)

    def __iadd__(self, other: Parts) -> Parts:
        self.reasoning += other.reasoning
        self.content += other.content
        self.calls += other.calls
        return self


class _Lines:
    """Passes text on, without the line breaks at its beginning if `strips_start`; those at its end are held back."""

    def __init__(self, *, strips_start: bool) -> None:
        self._strips = strips_start
        self._num_held = 0

    def push(self, text: str) -> str:
        if self._strips:
            text = text.lstrip("\n")
            self._strips = not text
        body = text.rstrip("\n")
        held, new = self._num_held, len(text) - len(body)
        self._num_held = new if body else held + new
        return "\n" * held + body if body else ""

    def drop(self) -> None:
        self._num_held = 0

    def take(self) -> str:
        held, self._num_held = self._num_held, 0
        return "\n" * held


class _State(Enum):
    BEGINNING = auto()
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


class AnswerSplitter:
    """Splits a text that comes in pieces; where the borders of the pieces are makes no difference.

    `in_reasoning`: the prompt left `<think>` open. `with_tools`: calls are looked for; what is between the tags and is
    no call stays text, and so does one that does not end. Line breaks around reasoning, and before a call or after
    the last one, are dropped, as a template puts them there. An answer with none of all this comes out as it is.
    """

    def __init__(self, *, in_reasoning: bool = False, with_tools: bool = False) -> None:
        self._in_reasoning, self._with_tools = in_reasoning, with_tools
        self._state = _State.BEGINNING
        self._held = ""
        self._thoughts = _Lines(strips_start=True)
        self._content = _Lines(strips_start=False)
        self._call: list[str] = []
        self._is_after_call = False

    @property
    def is_reasoning(self) -> bool:
        return self._state is _State.REASONING or (self._in_reasoning and self._state is _State.BEGINNING)

    def push(self, piece: str) -> Parts:
        """What became certain."""
        self._held += piece
        new = Parts()
        while self._step(new):
            pass
        return new

    def finish(self) -> Parts:
        """What was held back: nothing comes after it."""
        new = Parts()
        if self._state is _State.BEGINNING:
            self._begin()
        rest, self._held = self._held, ""
        if self._state is _State.REASONING:
            new.reasoning = self._thoughts.push(rest)
            self._thoughts.drop()
            return new
        if self._state is _State.CALL:
            rest = CALL + "".join(self._call) + rest
            self._call = []
            self._state = _State.CONTENT
        self._say(rest, new)
        new.content += "" if self._is_after_call else self._content.take()
        return new

    def _step(self, new: Parts) -> bool:
        """Take in what is held, up to the next tag; whether there was one."""
        match self._state:
            case _State.BEGINNING:
                return self._look_for_beginning()
            case _State.REASONING:
                before, self._held, is_there = _cut(self._held, END_THINK)
                new.reasoning += self._thoughts.push(before)
                if is_there:
                    self._state, self._content = _State.CONTENT, _Lines(strips_start=True)
                return is_there
            case _State.CONTENT:
                before, self._held, is_there = _cut(self._held, CALL) if self._with_tools else (self._held, "", False)
                self._say(before, new)
                if is_there:
                    self._state = _State.CALL
                return is_there
            case _State.CALL:
                before, self._held, is_there = _cut(self._held, END_CALL)
                self._call.append(before)
                if is_there:
                    self._end_call(new)
                return is_there

    def _look_for_beginning(self) -> bool:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held, self._state = text[len(THINK) :], _State.REASONING
            return True
        if THINK.startswith(text):
            return False
        self._begin()
        return True

    def _begin(self) -> None:
        """There is no tag at the beginning."""
        self._state = _State.REASONING if self._in_reasoning else _State.CONTENT

    def _say(self, text: str, new: Parts) -> None:
        if not self._with_tools:
            new.content += self._content.push(text) + self._content.take()
            return
        said = self._content.push(text)
        if said:
            self._is_after_call = False
        new.content += said

    def _end_call(self, new: Parts) -> None:
        text = "".join(self._call)
        self._call, self._state = [], _State.CONTENT
        call = read_call(text)
        if call is None:
            self._say(CALL + text + END_CALL, new)
            return
        new.calls.append(call)
        self._content.drop()
        self._is_after_call = True


def _cut(text: str, tag: str) -> tuple[str, str, bool]:
    """What is before the tag, what is after it, whether it is there; if not: what cannot be part of it, the rest."""
    before, found, after = text.partition(tag)
    if found:
        return before, after, True
    num_held = next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
    certain = len(text) - num_held
    return text[:certain], text[certain:], False


def read_call(text: str) -> FunctionCall | None:
    """What is between the tags: `{"name": .., "arguments": {..}}`. None if it is something else."""
    found = read_json(text)
    if not isinstance(found, dict):
        return None
    name, arguments = found.get("name"), found.get("arguments")
    if not isinstance(name, str) or not is_call_name(name):
        return None
    if arguments in (None, ""):
        arguments = {}
    if isinstance(arguments, dict):
        # In the form that the template gives it back to the model.
        return FunctionCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
    if isinstance(arguments, str) and is_json_object(arguments):
        return FunctionCall(name=name, arguments=arguments)
    return None


def opens_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether the prompt ends with an open `<think>`: the template wrote it, and the answer begins inside."""
    specials = frozenset(tokenizer.special_ids.values())
    end = list(prompt_ids[-_MAX_HEAD:])
    last = max((i for i, token_id in enumerate(end) if token_id in specials), default=len(end))
    return tokenizer.decode(end[last + 1 :]).rstrip().endswith(THINK)


class AnswerParts:
    """Tokens -> parts, piece by piece; end tokens are no text, and after a stop string nothing counts.

    Stop strings are looked for in the text as the model writes it, tags and reasoning included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        sampling: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        with_tools: bool = False,
    ) -> None:
        self._text, self._eos_ids = AnswerText(tokenizer, eos_ids, sampling), eos_ids
        self._splitter = AnswerSplitter(in_reasoning=opens_reasoning(tokenizer, prompt_ids), with_tools=with_tools)
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self.calls: list[ToolCall] = []
        self.reasoning_tokens = 0
        """Those before the tag that ends it, or the end token."""

    @property
    def is_stopped(self) -> bool:
        """A stop string is complete: the answer ends here, with reason `stop`."""
        return self._text.is_stopped

    @property
    def token_ids(self) -> list[int]:
        """All tokens, the end token and the one that completed a stop string included."""
        return self._text.token_ids

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(self._content)

    def reason(self, reason: FinishReason) -> AnswerReason:
        """Why the answer ended, given why the tokens did."""
        if self.is_stopped or reason == "stop":
            return "tool_calls" if self.calls else "stop"
        return reason

    def push(self, token_id: int) -> Parts:
        """Take a token; returns what became certain with it, often nothing."""
        if self.is_stopped:
            return Parts()
        new = self._splitter.push(self._text.push(token_id))
        if self._splitter.is_reasoning and token_id not in self._eos_ids:
            self.reasoning_tokens = len(self.token_ids)
        if self.is_stopped:
            new += self._splitter.finish()
        return self._keep(new)

    def finish(self) -> Parts:
        """The rest of the answer."""
        new = self._splitter.push(self._text.finish())
        new += self._splitter.finish()
        return self._keep(new)

    def _keep(self, new: Parts) -> Parts:
        self._reasoning.append(new.reasoning)
        self._content.append(new.content)
        self.calls += [ToolCall(id=f"call_{secrets.token_hex(12)}", function=call) for call in new.calls]
        return new
