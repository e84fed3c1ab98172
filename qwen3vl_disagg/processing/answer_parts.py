"""An answer taken apart as it comes: what the model thinks, what it says, which tools it calls.

    <think>\\nREASONING\\n</think>\\n\\nCONTENT\\n<tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>

Reasoning begins where the prompt left `<think>` open, or where the answer begins with it, behind at most MAX_SPACE
characters of white space; a later `<think>` is text.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

import msgspec

from qwen3vl_disagg.core.requests import FinishReason, SamplingParams
from qwen3vl_disagg.processing.answer_calls import CALL, END_CALL, CallReader, FunctionCall, read_call
from qwen3vl_disagg.processing.answer_text import AnswerText
from qwen3vl_disagg.processing.tokenizer import Tokenizer

AnswerReason = Literal["stop", "length", "tool_calls"]

THINK, END_THINK = "<think>", "</think>"
MAX_SPACE = 64
"""White space before a `<think>` at the beginning of an answer: what is held back until something else comes."""
_MAX_HEAD = 64
"""Tokens between the last special token of a prompt and the answer: the role's name, and what opens reasoning."""


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

    `in_reasoning`: the prompt left `<think>` open. `with_tools`: calls are looked for. A call is `<tool_call>`, an
    object that `read_call` knows, and `</tool_call>`; a `<tool_call>` that begins none is text, and the search goes on
    right behind it. Line breaks around reasoning, and before a call or after the last one, are dropped, as a template
    puts them there. An answer with none of all this comes out as it is. Each push takes time for its own length, save
    that what was held for a call is read again where it is none.
    """

    def __init__(self, *, in_reasoning: bool = False, with_tools: bool = False) -> None:
        self._in_reasoning, self._with_tools = in_reasoning, with_tools
        self._state = _State.BEGINNING
        self._text, self._at = "", 0
        self._thoughts = _Lines(strips_start=True)
        self._content = _Lines(strips_start=False)
        self._call = CallReader()
        self._held: list[str] = []
        """Of the call that is being read: what came in earlier pieces."""
        self._is_after_call = False
        self._thought: list[str] = []
        self._said: list[str] = []
        self._called: list[FunctionCall] = []
        """What became certain in this push."""

    @property
    def is_reasoning(self) -> bool:
        return self._state is _State.REASONING or (self._in_reasoning and self._state is _State.BEGINNING)

    def push(self, piece: str) -> Parts:
        """What became certain."""
        self._text, self._at = self._text[self._at :] + piece, 0
        self._read()
        return self._take()

    def finish(self) -> Parts:
        """What was held back: nothing comes after it."""
        if self._state is _State.BEGINNING:
            self._begin()
            self._read()
        while self._state is _State.CALL:
            self._drop_call()
            self._read()
        rest, self._text, self._at = self._text[self._at :], "", 0
        if self._state is _State.REASONING:
            self._think(rest)
            self._thoughts.drop()
        else:
            self._say(rest)
            self._said.append("" if self._is_after_call else self._content.take())
        return self._take()

    def _take(self) -> Parts:
        new = Parts("".join(self._thought), "".join(self._said), self._called)
        self._thought, self._said, self._called = [], [], []
        return new

    def _read(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Take in the text up to the next border of a part; whether there was one."""
        match self._state:
            case _State.BEGINNING:
                return self._look_for_beginning()
            case _State.REASONING:
                before, is_there = self._cut(END_THINK)
                self._think(before)
                if is_there:
                    self._state, self._content = _State.CONTENT, _Lines(strips_start=True)
                return is_there
            case _State.CONTENT if self._with_tools:
                before, is_there = self._cut(CALL)
                self._say(before)
                if is_there:
                    self._state, self._call, self._held = _State.CALL, CallReader(), []
                return is_there
            case _State.CONTENT:
                self._say(self._text[self._at :])
                self._at = len(self._text)
                return False
            case _State.CALL:
                return self._read_call()

    def _look_for_beginning(self) -> bool:
        text = self._text.lstrip()
        num_space = len(self._text) - len(text)
        if num_space <= MAX_SPACE:
            if text.startswith(THINK):
                self._at, self._state = num_space + len(THINK), _State.REASONING
                return True
            if THINK.startswith(text):
                return False
        self._begin()
        return True

    def _begin(self) -> None:
        """There is no tag at the beginning."""
        self._state = _State.REASONING if self._in_reasoning else _State.CONTENT

    def _cut(self, tag: str) -> tuple[str, bool]:
        """Take the text up to the tag, and whether it is there; if not, what cannot be the beginning of one."""
        text, start = self._text, self._at
        found = text.find(tag, start)
        if found >= 0:
            self._at = found + len(tag)
            return text[start:found], True
        num_held = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n], start)), 0)
        self._at = len(text) - num_held
        return text[start : self._at], False

    def _think(self, text: str) -> None:
        self._thought.append(self._thoughts.push(text))

    def _say(self, text: str) -> None:
        said = self._content.push(text)
        if said:
            self._is_after_call = False
        self._said.append(said if self._with_tools else said + self._content.take())

    def _read_call(self) -> bool:
        for at in range(self._at, len(self._text)):
            if not self._call.take(self._text[at]):
                self._drop_call()
                return True
            if self._call.is_complete:
                self._end_call(at + 1)
                return True
        self._held.append(self._text[self._at :])
        self._at = len(self._text)
        return False

    def _end_call(self, end: int) -> None:
        """`</tool_call>` ends there."""
        text = "".join([*self._held, self._text[self._at : end]])
        call = read_call(text.removesuffix(END_CALL))
        if call is None:
            self._drop_call()
            return
        self._called.append(call)
        self._state, self._at = _State.CONTENT, end
        self._content.drop()
        self._is_after_call = True

    def _drop_call(self) -> None:
        """It is none: its tag is text, and what follows is read again."""
        if self._held:
            self._text, self._at = "".join([*self._held, self._text[self._at :]]), 0
        self._state = _State.CONTENT
        self._say(CALL)


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
        in_reasoning = opens_reasoning(tokenizer, prompt_ids)
        self._splitter = AnswerSplitter(in_reasoning=in_reasoning, with_tools=with_tools)
        self._written = AnswerSplitter(in_reasoning=in_reasoning)
        """Reads along without holding text back for stop strings, so the tag is seen with the token that ends it."""
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self.calls: list[ToolCall] = []
        self.reasoning_tokens = 0
        """Those before the one that completes the tag, or the end token."""

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
        self._written.push(self._text.written)
        if self._written.is_reasoning and token_id not in self._eos_ids:
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
