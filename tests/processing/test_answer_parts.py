"""Reasoning, text and tool calls of an answer: by definition on the whole text, and the same however it is cut."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing import AnswerParts, AnswerSplitter, Parts
from qwen3vl_disagg.processing.answer_calls import CallReader, read_call
from qwen3vl_disagg.processing.answer_parts import MAX_SPACE, opens_reasoning
from tests.support.fake_backend import tiny_processor

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = ("add", '{"a": 1}')
TAGS = '<tool_call>{"name": "f", "arguments": {"t": "a </tool_call> and a <tool_call>"}}</tool_call>'
TAGGED = ("f", '{"t": "a </tool_call> and a <tool_call>"}')
OOPS = ("", '<tool_call>\n{"name": "oops\n</tool_call>', [ADD])
EXTRA = ("", '<tool_call>{"name": "f"}}</tool_call>', [ADD])
CUT = ("", '<tool_call>{"name": "f"}</tool\n_call>', [ADD])
Split = tuple[str, str, list[tuple[str, str]]]

cheap = settings(max_examples=10 * settings().max_examples)
fragments = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", CALL, CALL, "<", "</", "think>", "tool_call>"),
        *("<th", "ink>", " ", "\n", "\n\n", "a", "b <", '{"name": "f"}', '{"name": 5}', "é"),
        *(TAGS, '{"name": "f', '"', '"}', "}", "\\", " " * 33, "\n" * 32),
    ]
)
answers = st.lists(fragments, max_size=9).map("".join)


def run(pieces: list[str], *, opened: bool = False, tools: bool = False) -> Split:
    splitter = AnswerSplitter(in_reasoning=opened, with_tools=tools)
    whole = Parts()
    for piece in pieces:
        whole += splitter.push(piece)
    whole += splitter.finish()
    whole += splitter.finish()
    return whole.reasoning, whole.content, [(call.name, call.arguments) for call in whole.calls]


def define(text: str, *, opened: bool, tools: bool) -> Split:
    """The same on the whole text."""
    reasoning = ""
    begins = text.lstrip().startswith("<think>") and len(text) - len(text.lstrip()) <= 64
    if begins or opened:
        rest = text.lstrip().removeprefix("<think>") if begins else text
        before, _, after = rest.partition("</think>")
        reasoning, text = before.strip("\n"), after.lstrip("\n")
    if not tools:
        return reasoning, text, []
    content, calls, ends_with_call = "", [], False
    for part in parts_with_calls(text):
        if isinstance(part, str):
            content += part
            ends_with_call = ends_with_call and not part.strip("\n")
        else:
            content = content.rstrip("\n")
            calls.append(part)
            ends_with_call = True
    if begins or opened:
        content = content.lstrip("\n")
    return reasoning, content.rstrip("\n") if ends_with_call else content, calls


def parts_with_calls(text: str) -> list[str | tuple[str, str]]:
    """Text and calls: at each tag, is there an object in JSON and the other tag behind it?"""
    found: list[str | tuple[str, str]] = []
    seen = at = 0
    while (at := text.find("<tool_call>", at) + 11) > 10:
        start = at + len(text[at:]) - len(text[at:].lstrip(" \t\n\r"))
        try:
            end = json.JSONDecoder().raw_decode(text, start)[1]
        except ValueError:
            continue
        closing = re.compile(r"[ \t\n\r]*</tool_call>").match(text, end)
        call = read_call(text[start:end])
        if closing and call:
            found += [text[seen : at - 11], (call.name, call.arguments)]
            seen = at = closing.end()
    return [*found, text[seen:]]


@cheap
@given(text=answers, opened=st.booleans(), tools=st.booleans(), data=st.data())
def test_the_borders_make_no_difference(text, opened, tools, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    expected = define(text, opened=opened, tools=tools)
    assert run(pieces, opened=opened, tools=tools) == expected
    assert run(list(text), opened=opened, tools=tools) == expected


@given(text=answers.filter(lambda text: not text.lstrip().startswith("<think>")))
@example(text=" " * 65 + "<think>hm</think>")
def test_an_answer_without_tags_at_its_beginning_is_as_it_was(text):
    assert run(list(text)) == ("", text, [])


@pytest.mark.parametrize(
    ("text", "opened", "split"),
    [
        ("red", False, ("", "red", [])),
        ("\n red \n", False, ("", "\n red \n", [])),
        ("<think>\nhm\n\n</think>\n\nred\n", False, ("hm", "red\n", [])),
        (" \n<think>hm</think> red", False, ("hm", " red", [])),
        ("\nhm\nso\n</think>\n\nred", True, ("hm\nso", "red", [])),
        ("<think>\nhm\n</think>red", True, ("hm", "red", [])),
        ("hm <think> a </think> b </think> c", True, ("hm <think> a ", " b </think> c", [])),
        ("I say <think>no</think>", False, ("", "I say <think>no</think>", [])),
        ("<thin", False, ("", "<thin", [])),
        ("hm </thin", True, ("hm </thin", "", [])),  # cut off
        ("hm\n", True, ("hm", "", [])),
        ("", True, ("", "", [])),
        ("</think>\n\nred", True, ("", "red", [])),
        (f"<think>{CALL}</think>{CALL}", False, (CALL, "", [ADD])),  # what is only thought of is not called
        (f"Wait.\n{CALL}\n{CALL}\n", False, ("", "Wait.", [ADD, ADD])),
        (f"{CALL}\nDone.\n", False, ("", "\nDone.\n", [ADD])),
        ("a\n<tool_call>\n{bad}\n</tool_call>\nb", False, ("", "a\n<tool_call>\n{bad}\n</tool_call>\nb", [])),
        (f"a\n<tool_call>{CALL}", False, ("", "a\n<tool_call>", [ADD])),
        (TAGS, False, ("", "", [TAGGED])),
        (f'<tool_call>\n{{"name": oops\n{CALL}\n', False, ("", '<tool_call>\n{"name": oops', [ADD])),
        (f'<tool_call>\n{{"name": "oops\n</tool_call>\n{CALL}', False, OOPS),
        (f'<tool_call>{{"name": "f"{{{CALL}', False, ("", '<tool_call>{"name": "f"{', [ADD])),
        (f'<tool_call>{{"name": "{CALL}', False, ("", '<tool_call>{"name": "', [ADD])),
        (f'<tool_call>{{"name": "f"}}}}</tool_call>{CALL}', False, EXTRA),
        (f'<tool_call>{{"name": "f"}}</tool\n_call>{CALL}', False, CUT),
        (" " * 64 + "<think>hm</think>red", False, ("hm", "red", [])),
        (" " * 65 + "<think>hm</think>red", False, ("", " " * 65 + "<think>hm</think>red", [])),
        (" " * 65 + "<think>hm</think>red", True, (" " * 65 + "<think>hm", "red", [])),
        (CALL[:-1], False, ("", CALL[:-1], [])),
    ],
)
def test_by_hand(text, opened, split):
    assert run([text], opened=opened, tools=True) == split
    assert run(list(text), opened=opened, tools=True) == split


@given(text=answers, opened=st.booleans())
@example(text=" " * 120, opened=False)
def test_what_is_certain_comes_at_once(text, opened):
    """Held back is at most the beginning of a tag, some space at the beginning, and line breaks."""
    splitter = AnswerSplitter(in_reasoning=opened)
    given_out = ""
    for n, char in enumerate(text, 1):
        new = splitter.push(char)
        given_out += new.reasoning + new.content
        seen = re.sub(r"<think>|</think>|\s", "", text[:n])
        out = re.sub(r"<think>|</think>|\s", "", given_out)
        assert len(seen) - len(out) < len("</think>")
        dropped = len("<think></think>") + text[:n].count("\n")
        assert n - len(given_out) < MAX_SPACE + dropped + len("</think>")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('<tool_call>\n{"name": o', True),
        ('<tool_call>\n{"name": "f\n', True),
        ("<tool_call> [see", True),
        ('<tool_call>\n{"name": "f"}\n{', True),
        ('<tool_call>\n{"name": "f"}\n</tool_r', True),
        ('<tool_call>\n{"name": "f"}\n</tool_', False),
        ('<tool_call>\n{"name": "an o', False),
    ],
)
def test_what_cannot_be_a_call_any_more_is_shown_at_once(text, shown):
    splitter = AnswerSplitter(with_tools=True)
    new = [splitter.push(char).content for char in text]
    assert "".join(new) == (text.rstrip("\n") if shown else "")
    assert bool(new[-1]) == shown


nested = st.lists(
    st.sampled_from(["<tool_call>", "</tool_call>", '{"', '"', "\\", ",", "}", "\n", " ", "ab"]), max_size=40
)


@cheap
@given(fragments=nested, times=st.integers(1, 20), data=st.data())
@example(fragments=["<tool_call>", '{"', "ab"], times=300, data=None)
@example(fragments=['<tool_call>{"a', '"', ":"], times=300, data=None)
@example(fragments=["<tool_call>", "\n"], times=300, data=None)
def test_looking_for_calls_takes_linear_time(fragments, times, data):
    """However tags are nested, no character is read by more than three of them."""
    text, taken = "".join(fragments) * times, 0

    def take(reader: CallReader, char: str) -> bool:
        nonlocal taken
        taken += 1
        return original(reader, char)

    original = CallReader.take
    size = data.draw(st.integers(1, len(text) + 1)) if data else 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CallReader, "take", take)
        run([text[i : i + size] for i in range(0, len(text), size)], tools=True)
    assert taken <= 3 * len(text)


# ---- tokens ----


def answer(text: str, *, head: str = "assistant\n", tools: bool = False, **params) -> AnswerParts:
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    prompt = [tokenizer.token_id("<|im_start|>"), *tokenizer.encode(head)]
    found = AnswerParts(
        tokenizer, processor.generation.eos_token_ids, SamplingParams(**params), prompt, with_tools=tools
    )
    for token_id in tokenizer.encode(text):
        found.push(token_id)
    found.finish()
    return found


def test_tokens_are_counted_until_the_tag():
    encode = tiny_processor().tokenizer.encode
    found = answer("red circle\n</think>\n\nblue", head="assistant\n<think>\n")
    assert (found.reasoning, found.content) == ("red circle", "blue")
    assert found.reasoning_tokens == len(encode("red circle\n"))
    assert found.token_ids == encode("red circle\n</think>\n\nblue")
    assert answer("blue").reasoning_tokens == 0
    for stop in ("</think>\n\nblue triangle", "circle\n</think>\n\nblue sky", "</think>", "blue", "n" * 99):
        held = answer("red circle\n</think>\n\nblue", head="assistant\n<think>\n", stop=[stop])
        assert held.reasoning_tokens == len(encode("red circle\n"))
    cut = answer("red circle", head="assistant\n<think>\n")
    assert (cut.reasoning, cut.content, cut.reasoning_tokens) == ("red circle", "", len(encode("red circle")))


@pytest.mark.parametrize(
    ("stop", "reasoning", "content"),
    [
        ("circle", "a red", ""),
        ("</think>", "a red circle", ""),
        ("\n\nb", "a red circle", ""),
        ("ue", "a red circle", "bl"),
    ],
)
def test_stop_strings_are_looked_for_in_the_text_as_it_is_written(stop, reasoning, content):
    found = answer("<think>\na red circle\n</think>\n\nblue square", stop=[stop])
    assert found.is_stopped
    assert (found.reasoning.rstrip(), found.content) == (reasoning, content)


@pytest.mark.parametrize(
    ("text", "tools", "reason", "expected"),
    [
        ("red", True, "stop", "stop"),
        ("red", True, "length", "length"),
        (CALL, True, "stop", "tool_calls"),
        (CALL, True, "length", "length"),
        (CALL, False, "stop", "stop"),
        (f"{CALL}!", True, "length", "tool_calls"),  # ended by the stop string
    ],
)
def test_why_an_answer_ended(text, tools, reason, expected):
    found = answer(text, tools=tools, stop=["!"])
    assert found.reason(reason) == expected
    assert len({call.id for call in found.calls}) == text.count(CALL) * tools
    assert all(re.fullmatch("call_[0-9a-f]{24}", call.id) for call in found.calls)


@pytest.mark.parametrize(
    ("head", "opens"),
    [
        ("assistant\n", False),
        ("assistant\n<think>\n", True),
        ("assistant\n<think>", True),
        ("assistant\n<think>\n\n</think>\n\n", False),
        ("assistant\n<think> so", False),
    ],
)
def test_whether_the_prompt_leaves_reasoning_open(head, opens):
    tokenizer = tiny_processor().tokenizer
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    user = [start, *tokenizer.encode("user\n<think>"), end, *tokenizer.encode("\n")]
    assert opens_reasoning(tokenizer, [*user, start, *tokenizer.encode(head)]) == opens
    assert not opens_reasoning(tokenizer, user)
    assert not opens_reasoning(tokenizer, tokenizer.encode("<think>"))
