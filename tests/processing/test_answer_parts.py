"""Reasoning, text and tool calls of an answer: by definition on the whole text, and the same however it is cut."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing import AnswerParts, AnswerSplitter, Parts
from qwen3vl_disagg.processing.answer_parts import opens_reasoning, read_call
from tests.support.fake_backend import tiny_processor

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = ("add", '{"a": 1}')
Split = tuple[str, str, list[tuple[str, str]]]

cheap = settings(max_examples=10 * settings().max_examples)
fragments = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", CALL, CALL, "<", "</", "think>", "tool_call>"),
        *("<th", "ink>", " ", "\n", "\n\n", "a", "b <", '{"name": "f"}', '{"name": 5}', "é"),
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
    begins = text.lstrip().startswith("<think>")
    if begins or opened:
        rest = text.lstrip().removeprefix("<think>") if begins else text
        before, _, after = rest.partition("</think>")
        reasoning, text = before.strip("\n"), after.lstrip("\n")
    if not tools:
        return reasoning, text, []
    content, calls, ends_with_call = "", [], False
    for part in re.split("(<tool_call>.*?</tool_call>)", text, flags=re.DOTALL):
        call = read_call(part[11:-12]) if part.endswith("</tool_call>") and part.startswith("<tool_call>") else None
        if call is None:
            content += part
            ends_with_call = ends_with_call and not part.strip("\n")
        else:
            content = content.rstrip("\n")
            calls.append((call.name, call.arguments))
            ends_with_call = True
    if begins or opened:
        content = content.lstrip("\n")
    return reasoning, content.rstrip("\n") if ends_with_call else content, calls


@cheap
@given(text=answers, opened=st.booleans(), tools=st.booleans(), data=st.data())
def test_the_borders_make_no_difference(text, opened, tools, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    expected = define(text, opened=opened, tools=tools)
    assert run(pieces, opened=opened, tools=tools) == expected
    assert run(list(text), opened=opened, tools=tools) == expected


@given(text=answers.filter(lambda text: not text.lstrip().startswith("<think>")))
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
        (f"a\n<tool_call>{CALL}", False, ("", f"a\n<tool_call>{CALL}", [])),
        (CALL[:-1], False, ("", CALL[:-1], [])),
    ],
)
def test_by_hand(text, opened, split):
    assert run([text], opened=opened, tools=True) == split
    assert run(list(text), opened=opened, tools=True) == split


@given(text=answers, opened=st.booleans())
def test_what_is_certain_comes_at_once(text, opened):
    """Held back is at most the beginning of a tag, and space at the beginning and line breaks."""
    splitter = AnswerSplitter(in_reasoning=opened)
    given_out = ""
    for n, char in enumerate(text, 1):
        new = splitter.push(char)
        given_out += new.reasoning + new.content
        seen = re.sub(r"<think>|</think>|\s", "", text[:n])
        out = re.sub(r"<think>|</think>|\s", "", given_out)
        assert len(seen) - len(out) < len("</think>")


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "f", "arguments": {"b": "<é>", "a": [1.5, null]}}', ("f", '{"b": "<é>", "a": [1.5, null]}')),
        ('{"arguments":{"a":1},"name":"f"}', ("f", '{"a": 1}')),
        (r'{"name": "f", "arguments": "{\"a\": 1}"}', ("f", '{"a": 1}')),
        ('{"name": "f"}', ("f", "{}")),
        ('{"name": "f", "arguments": null}', ("f", "{}")),
        ('{"name": "", "arguments": {}}', None),
        ('{"name": ["f"], "arguments": {}}', None),
        ('{"arguments": {}}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": "f", "arguments": "1"}', None),
        ('{"name": "f", "arguments": {"a": NaN}}', None),
        ('{"name": "f", "arguments": {"a": 1e999}}', None),
        (r'{"name": "f", "arguments": {"a": "\ud800"}}', None),
        ('{"name": "f", "arguments": {"a": ' + "1" * 400 + "}}", None),
        ('{"name": "f", "arguments": {"a": ' + "1" * 5000 + "}}", None),
        ('{"name": "f", "arguments": {"a": ' + "[" * 99999, None),
        ('{"name": "f", "arguments": {"a": ' + "[" * 70 + "]" * 70 + "}}", None),
        ('["f"]', None),
        ("", None),
        ("f(1)", None),
    ],
)
def test_what_is_a_call(text, call):
    found = read_call(text)
    assert (found and (found.name, found.arguments)) == call
    if call:
        json.dumps(json.loads(call[1])).encode()


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
