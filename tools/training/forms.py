"""In what forms a question about pictures is put, and what is said to each: order, JSON, tools.

A conversation is written as the chat template writes it, so that its tokens are those a server makes of the same
messages (`Conversation.messages`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwen3vl_disagg.assets.scenes import Question

IMAGE_FIRST, TEXT_FIRST, BETWEEN = "image first", "text first", "text between"
JSON_FORM, TOOL_FORM = "json", "tools"
FORMS = (IMAGE_FIRST, TEXT_FIRST, BETWEEN, JSON_FORM, TOOL_FORM)
"""What losses are told apart by: the order for plain answers, else the form."""
JSON_SENTENCES = ("Answer as JSON.", "Reply with a JSON object.", "Answer in JSON.")
KEY_SENTENCE = 'Answer as JSON with the key "{key}".'
KEYS = ("place", "thing", "result", "value", "count", "name")
"""Named for any question, so that the key is read and not guessed."""
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
RESULTS = ("ok", "done", "true", '{"ok": true}')
"""What tools answer; it is always said that it is done."""
DONE = "Done."
_TOOLS_HEAD = (
    "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n"
)


@dataclass(frozen=True)
class Reply:
    """What should be said, in pieces: each a text, and whether it tells something or only gives the form."""

    pieces: tuple[tuple[str, bool], ...]

    @classmethod
    def plain(cls, text: str) -> Reply:
        return cls(((text, True),))

    @cached_property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class Exchange:
    """What the user asks, or a tool's result, and what is said to it."""

    asked: str
    answer: Reply
    is_result: bool = False


@dataclass(frozen=True)
class Conversation:
    """Exchanges over the pictures of the first one. `order` says where they stand; `tools` are in OpenAI's form."""

    exchanges: tuple[Exchange, ...]
    num_images: int
    order: str = IMAGE_FIRST
    tools: tuple[dict[str, Any], ...] = ()
    form: str = ""
    """One of `FORMS`; empty: the order."""

    @property
    def form_index(self) -> int:
        return FORMS.index(self.form or self.order)

    def prompts(self) -> list[str]:
        """What stands before each answer, from the end of the one before it on; an answer ends with `<|im_end|>`."""
        texts = []
        for i, exchange in enumerate(self.exchanges):
            said = f"<tool_response>\n{exchange.asked}\n</tool_response>" if exchange.is_result else exchange.asked
            if i == 0:
                said = "".join(part or PICTURE for part in arrange(said, self.num_images, self.order))
            before = "\n" if i else system_block(self.tools)
            texts.append(f"{before}<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n")
        return texts

    def messages(self, images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same up to the last answer as chat messages; `images` are content parts."""
        messages: list[dict[str, Any]] = []
        left = list(images)
        for i, exchange in enumerate(self.exchanges):
            if exchange.is_result:
                messages.append({"role": "tool", "tool_call_id": f"call_{i - 1}", "content": exchange.asked})
            elif i == 0:
                parts = arrange(exchange.asked, self.num_images, self.order)
                content = [left.pop(0) if part is None else {"type": "text", "text": part} for part in parts]
                messages.append({"role": "user", "content": content})
            else:
                messages.append({"role": "user", "content": exchange.asked})
            if i + 1 < len(self.exchanges):
                messages.append({"role": "assistant", **_said(exchange.answer.text, f"call_{i}")})
        return messages


def _said(text: str, call_id: str) -> dict[str, Any]:
    call = read_call(text)
    if call is None:
        return {"content": text}
    function = {"name": call[0], "arguments": json.dumps(call[1])}
    return {"content": None, "tool_calls": [{"id": call_id, "type": "function", "function": function}]}


def arrange(text: str, num_images: int, order: str) -> list[str | None]:
    """The parts of a user turn: the text, and None for each picture."""
    pictures: list[str | None] = [None] * num_images
    if order == IMAGE_FIRST:
        return [*pictures, text]
    if order == TEXT_FIRST:
        return [text, *pictures]
    if order == BETWEEN and num_images > 1:
        return [None, text, *pictures[1:]]
    raise ValueError(f"no order {order!r} of {num_images} images")


def random_order(num_images: int, rng: random.Random) -> str:
    """Half and half; of pairs a fifth with the text between."""
    if num_images > 1 and rng.random() < 0.2:
        return BETWEEN
    return rng.choice((IMAGE_FIRST, TEXT_FIRST))


def plain(question: Question, order: str) -> Conversation:
    exchange = Exchange(question.text, Reply.plain(question.answer))
    return Conversation((exchange,), len(question.scenes), order)


# JSON.
def in_json(question: Question, order: str, rng: random.Random, *, with_key: bool | None = None) -> Conversation:
    """The question with a demand for JSON; a third of them name the key."""
    if with_key is None:
        with_key = rng.random() < 1 / 3
    key = rng.choice(KEYS) if with_key else None
    sentence = KEY_SENTENCE.format(key=key) if key else rng.choice(JSON_SENTENCES)
    exchange = Exchange(f"{question.text} {sentence}", json_answer(question, key))
    return Conversation((exchange,), len(question.scenes), order, form=JSON_FORM)


def json_answer(question: Question, key: str | None = None) -> Reply:
    """`{"answer": "centre"}`, `{"answer": 3}` or `{"cells": ["red circle", ..]}`, as `json.dumps` writes it."""
    if question.kind in ("row", "list", "pair_list"):
        cells = [
            piece for cell in question.answer.split(", ") for piece in ((', "', False), (cell, True), ('"', False))
        ]
        head = ('{"', False), (key or "cells", key is not None), ('": ["', False)
        return Reply((*head, *cells[1:], ("]}", False)))
    quote = "" if question.kind == "number" else '"'
    head = ('{"', False), (key or "answer", key is not None), (f'": {quote}', False)
    return Reply((*head, (question.answer, True), (quote + "}", False)))


# Tools.
@dataclass(frozen=True)
class Task:
    """What a tool is for. `kind` is the kind of question whose answer becomes its arguments."""

    kind: str
    name: str
    description: str
    parameters: tuple[str, ...]
    requests: tuple[str, ...]
    """Wordings, filled with the question's args."""

    @cached_property
    def tool(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = "integer" if self.kind == "number" else "string"
        properties = {name: {"type": kind} for name in self.parameters}
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TASKS = {
    "point": Task(
        "place",
        "point_at",
        "Points at a place.",
        ("place",),
        ("Point at the {thing}.", "Show the {thing}."),
    ),
    "pick": Task(
        "at",
        "pick_up",
        "Picks up a thing.",
        ("colour", "shape"),
        ("Pick up the thing at the {place}.", "Take the thing at the {place}."),
    ),
    "report": Task(
        "number",
        "report_number",
        "Reports a number.",
        ("number",),
        ("Report how many {noun} there are.", "Report the number of {noun}."),
    ),
}
"""By the first word of their requests. Each has one name: four layers do not learn to copy names from a prompt."""
PLAIN_KINDS = ("place", "at", "number", "colour", "shape")
"""Questions that no tool is for."""


def offer_tools(wanted: str, rng: random.Random) -> dict[str, dict[str, Any]]:
    """The tool for the task `wanted`, and as often as not another one, in any order."""
    tasks = [wanted, *rng.sample([name for name in TASKS if name != wanted], rng.randrange(2))]
    rng.shuffle(tasks)
    return {name: TASKS[name].tool for name in tasks}


def call_answer(tool: Mapping[str, Any], question: Question) -> Reply:
    """A call of `tool` whose arguments are what the question's answer says."""
    function = tool["function"]
    pieces = [(f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {{', False)]
    values = dict(zip(("colour", "shape"), question.answer.split(), strict=True)) if question.kind == "at" else {}
    for i, (name, schema) in enumerate(function["parameters"]["properties"].items()):
        quote = "" if schema["type"] == "integer" else '"'
        pieces.append((f'{", " if i else ""}"{name}": {quote}', False))
        pieces += [(values.get(name, question.answer), True), (quote, False)]
    return Reply((*pieces, ("}}\n</tool_call>", False)))


def read_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of an answer that is one call and nothing besides."""
    head, tail = "<tool_call>\n", "\n</tool_call>"
    if not (text.startswith(head) and text.endswith(tail)):
        return None
    try:
        call = json.loads(text[len(head) : -len(tail)])
    except ValueError:
        return None
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return None
    return call["name"], call["arguments"]


def system_block(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system turn that offers tools; nothing without any."""
    if not tools:
        return ""
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return _TOOLS_HEAD + lines + _TOOLS_TAIL


def request(task: Task, question: Question, tool: Mapping[str, Any], rng: random.Random) -> Exchange:
    """The demand for what a tool does, answered by its call."""
    return Exchange(rng.choice(task.requests).format(**question.args), call_answer(tool, question))


def result(rng: random.Random) -> Exchange:
    """A tool's result, and what is said to it."""
    return Exchange(rng.choice(RESULTS), Reply.plain(DONE), is_result=True)
