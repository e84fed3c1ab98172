"""An answer taken apart as it comes: what the model thinks, what it says, which tools it calls.

    <think>\\nREASONING\\n</think>\\n\\nCONTENT\\n<tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>

Reasoning begins where the prompt left `<think>` open, or where the answer begins with it, behind at most MAX_SPACE
characters of white space; a later `<think>` is text. Stop strings end the content and are looked for nowhere else:
what is only thought, or stands within a call, ends nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

import msgspec

from qwen3vl_disagg.core.requests import FinishReason, SamplingParams
from qwen3vl_disagg.processing.answer_calls import CALL, CallReader, FunctionCall, read_calls
from qwen3vl_disagg.processing.answer_stops import StopMatcher
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
    STOPPED = auto()


class AnswerSplitter:
    """Splits a text that comes in pieces; where the borders of the pieces are makes no difference.

    `in_reasoning`: the prompt left `<think>` open. `with_tools`: calls are looked for. A call is `<tool_call>`, what
    `read_calls` knows, and `</tool_call>`, another call, or the end of the answer; a `<tool_call>` that begins none is
    text, and the search goes on right behind it. `calls_alone`: none are looked for behind other text. Line breaks
    around reasoning, and before a call or after the last one, are dropped, as a template puts them there. `stops`:
    strings that end the content, as it is given out; one that is complete within a piece with `may_stop` false is text.
    An answer with none of all this comes out as it is. Each push takes time for its own length, save that what was held
    for a call is read again where it is none.
    """

    def __init__(
        self,
        *,
        in_reasoning: bool = False,
        with_tools: bool = False,
        calls_alone: bool = False,
        stops: StopMatcher | None = None,
    ) -> None:
        self._in_reasoning, self._with_tools, self._calls_alone = in_reasoning, with_tools, calls_alone
        self._state = _State.BEGINNING
        self._text, self._at = "", 0
        self._thoughts = _Lines(strips_start=True)
        self._content = _Lines(strips_start=False)
        self._stops, self._may_stop = stops or StopMatcher(()), True
        self._call, self._tag = CallReader(), ""
        """Of the call that is being read, with what it was opened."""
        self._held: list[str] = []
        """Of the call that is being read: what came in earlier pieces."""
        self._found: list[FunctionCall] = []
        """In the call that is being read, once its object is whole."""
        self._is_after_call, self._breaks = False, ""
        """Behind a call nothing was said but these line breaks."""
        self._thought: list[str] = []
        self._said: list[str] = []
        self._called: list[FunctionCall] = []
        """What became certain in this push."""

    @property
    def is_reasoning(self) -> bool:
        return self._state is _State.REASONING or (self._in_reasoning and self._state is _State.BEGINNING)

    @property
    def is_stopped(self) -> bool:
        """A stop string is complete: nothing comes any more."""
        return self._state is _State.STOPPED

    @property
    def stop_string(self) -> str | None:
        return self._stops.complete

    def push(self, piece: str, *, may_stop: bool = True) -> Parts:
        """What became certain."""
        self._text, self._at, self._may_stop = self._text[self._at :] + piece, 0, may_stop
        self._read()
        return self._take()

    def finish(self) -> Parts:
        """What was held back: nothing comes after it."""
        if self._state is _State.BEGINNING:
            self._begin()
            self._read()
        while self._state is _State.CALL:
            if self._found:
                self._end_call(len(self._text))
            else:
                self._drop_call()
            self._read()
        rest, self._text, self._at = self._text[self._at :], "", 0
        if self._state is _State.REASONING:
            self._think(rest)
            self._thoughts.drop()
        elif self._state is _State.CONTENT:
            self._say(rest)
            self._match(self._content.take())
            self._give_out(self._stops.finish())
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
                if self._calls_alone and before.strip("\n"):
                    self._with_tools = False
                    self._at -= len(CALL) * is_there
                elif is_there and not self.is_stopped:
                    self._open_call(CALL)
                return is_there
            case _State.CONTENT:
                before, self._at = self._text[self._at :], len(self._text)
                self._say(before)
                return False
            case _State.CALL:
                return self._read_call()
            case _State.STOPPED:
                self._at = len(self._text)
                return False

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
        self._match(said if self._with_tools else said + self._content.take())

    def _match(self, said: str) -> None:
        self._give_out(self._stops.push(said, may_stop=self._may_stop))
        if self._stops.is_complete:
            self._state = _State.STOPPED

    def _give_out(self, said: str) -> None:
        if self._is_after_call:
            said = self._breaks + said
            self._is_after_call = not said.strip("\n")
            if self._is_after_call:
                self._breaks = said
                return
        self._said.append(said)

    def _open_call(self, tag: str) -> None:
        self._state, self._tag = _State.CALL, tag
        self._call, self._held, self._found = CallReader(), [], []

    def _read_call(self) -> bool:
        for at in range(self._at, len(self._text)):
            had_value = self._call.has_value
            if not self._call.take(self._text[at]):
                self._drop_call()
                return True
            if self._call.has_value and not had_value:
                self._found = read_calls("".join([*self._held, self._text[self._at : at + 1]]))
                if not self._found:
                    self._drop_call()
                    return True
            if self._call.end:
                self._end_call(at + 1)
                return True
        self._held.append(self._text[self._at :])
        self._at = len(self._text)
        return False

    def _end_call(self, at: int) -> None:
        """It ends there, with what opens the next one if that is what ended it."""
        self._state, self._at = _State.CONTENT, at
        self._give_out(self._stops.finish())
        self._called += self._found
        self._content.drop()
        self._is_after_call, self._breaks = True, ""
        if self._call.end == CALL:
            self._open_call(CALL)
        elif self._call.end == "{":
            self._at -= 1
            self._open_call("")

    def _drop_call(self) -> None:
        """It is none: its tag is text, and what follows is read again."""
        if self._held:
            self._text, self._at = "".join([*self._held, self._text[self._at :]]), 0
        self._state = _State.CONTENT
        self._say(self._tag)


class PlainSplitter:
    """In place of an `AnswerSplitter` where all of an answer is text: tags mean nothing."""

    is_reasoning = False

    def __init__(self, stops: StopMatcher) -> None:
        self._stops = stops

    @property
    def is_stopped(self) -> bool:
        return self._stops.is_complete

    @property
    def stop_string(self) -> str | None:
        return self._stops.complete

    def push(self, text: str, *, may_stop: bool = True) -> Parts:
        return Parts(content=self._stops.push(text, may_stop=may_stop))

    def finish(self) -> Parts:
        return Parts(content=self._stops.finish())


def opens_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether the prompt ends with an open `<think>`: the template wrote it, and the answer begins inside."""
    specials = frozenset(tokenizer.special_ids.values())
    end = list(prompt_ids[-_MAX_HEAD:])
    last = max((i for i, token_id in enumerate(end) if token_id in specials), default=len(end))
    return tokenizer.decode(end[last + 1 :]).rstrip().endswith(THINK)


class AnswerParts:
    """Tokens -> parts, piece by piece; end tokens are no text, and after a stop string nothing counts.

    `prompt_ids`: None where all of the answer is text, whatever stands before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        sampling: SamplingParams,
        prompt_ids: Sequence[int] | None,
        *,
        with_tools: bool = False,
    ) -> None:
        self._stream = tokenizer.stream(with_specials=not sampling.skip_special_tokens)
        self._min_tokens, keeps_stop = sampling.min_tokens, sampling.include_stop_str_in_output
        self._end_ids = frozenset[int]() if keeps_stop else eos_ids.union(sampling.stop_token_ids)
        """Those that are no text."""
        grammar, stops = sampling.grammar, StopMatcher(sampling.stop, keeps_stop=keeps_stop)
        self._splitter: AnswerSplitter | PlainSplitter = PlainSplitter(stops)
        if prompt_ids is not None:
            self._splitter = AnswerSplitter(
                in_reasoning=opens_reasoning(tokenizer, prompt_ids),
                with_tools=with_tools,
                calls_alone=grammar is not None and grammar.kind not in ("text", "calls"),
                stops=stops,
            )
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self.token_ids: list[int] = []
        """All tokens, the end token and the one that completed a stop string included."""
        self.calls: list[ToolCall] = []
        self.reasoning_tokens = 0
        """Those before the one that completes the tag, or the end token."""

    @property
    def is_stopped(self) -> bool:
        """A stop string is complete: the answer ends here, with reason `stop`."""
        return self._splitter.is_stopped

    @property
    def stop_string(self) -> str | None:
        """The one that is."""
        return self._splitter.stop_string

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
        self.token_ids.append(token_id)
        if token_id in self._end_ids:
            return Parts()
        new = self._split(self._stream.push(token_id))
        if self._splitter.is_reasoning:
            self.reasoning_tokens = len(self.token_ids)
        return self._keep(new)

    def finish(self) -> Parts:
        """The rest of the answer: an unfinished character, and what was held back."""
        new = self._split(self._stream.finish())
        new += self._splitter.finish()
        return self._keep(new)

    def _split(self, piece: str) -> Parts:
        return self._splitter.push(piece, may_stop=len(self.token_ids) >= self._min_tokens)

    def _keep(self, new: Parts) -> Parts:
        self._reasoning.append(new.reasoning)
        self._content.append(new.content)
        self.calls += [ToolCall(id=f"call_{secrets.token_hex(12)}", function=call) for call in new.calls]
        return new
