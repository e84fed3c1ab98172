"""Reasoning, text and tool calls of an answer: by definition on the whole text, and the same however it is cut."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing import AnswerParts, Parts
from qwen3vl_disagg.processing.answer_calls import CallReader, read_calls
from qwen3vl_disagg.processing.answer_parts import MAX_SPACE, AnswerSplitter, opens_reasoning
from qwen3vl_disagg.processing.answer_stops import StopMatcher
from tests.support.fake_backend import tiny_processor

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = ("add", '{"a": 1}')
TAGS = '<tool_call>{"name": "f", "arguments": {"t": "a </tool_call> and a <tool_call>"}}</tool_call>'
TAGGED = ("f", '{"t": "a </tool_call> and a <tool_call>"}')
OOPS = ("", '<tool_call>\n{"name": "oops\n</tool_call>', [ADD])
EXTRA = ("", '<tool_call>{"name": "f"}}</tool_call>', [ADD])
CUT = ("", '<tool_call>{"name": "f"}</tool\n_call>', [ADD])
F, G, H = (("f", "{}"), ("g", "{}"), ("h", "{}"))
Split = tuple[str, str, list[tuple[str, str]]]

cheap = settings(max_examples=10 * settings().max_examples)
fragments = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", CALL, CALL, "<", "</", "think>", "tool_call>"),
        *("<th", "ink>", " ", "\n", "\n\n", "a", "b <", '{"name": "f"}', '{"name": 5}', "é"),
        *(TAGS, '{"name": "f', '"', '"}', "}", "\\", " " * 33, "\n" * 32, '<tool_call>{"name": "f"}', "</tool_c"),
    ]
)
answers = st.lists(fragments, max_size=9).map("".join)
stop_strings = st.lists(
    st.sampled_from(["a", "\n", "\n\n", "<", '"', "f", "b <", "</think>", "\na", "think", "a<", "</tool_call>", " "]),
    max_size=2,
)


def run(pieces: list[str], *, opened: bool = False, tools: bool = False, stops: Sequence[str] = ()) -> Split:
    splitter = AnswerSplitter(in_reasoning=opened, with_tools=tools, stops=StopMatcher(stops))
    whole = Parts()
    for piece in pieces:
        whole += splitter.push(piece)
    whole += splitter.finish()
    whole += splitter.finish()
    return whole.reasoning, whole.content, [(call.name, call.arguments) for call in whole.calls]


def define(text: str, *, opened: bool, tools: bool, stops: Sequence[str] = ()) -> Split:
    """The same on the whole text."""
    reasoning = ""
    begins = text.lstrip().startswith("<think>") and len(text) - len(text.lstrip()) <= 64
    if begins or opened:
        rest = text.lstrip().removeprefix("<think>") if begins else text
        before, _, after = rest.partition("</think>")
        reasoning, text = before.strip("\n"), after.lstrip("\n")
    content, calls = "", []
    parts = [*(parts_with_calls(text) if tools else [text]), None]
    for previous, part, following in zip([None, *parts], parts, parts[1:], strict=False):
        if isinstance(part, tuple):
            calls.append(part)
            continue
        said = part.rstrip("\n") if isinstance(following, tuple) else part
        if (begins or opened) and not content:
            said = said.lstrip("\n")
        ends = [(end, end - len(stop)) for stop in stops for end in range(1 + len(said)) if said[:end].endswith(stop)]
        said = said[: min(ends)[1]] if ends else said
        if previous is None or said.strip("\n"):
            content += said
        if ends:
            break
    return reasoning, content, calls


def parts_with_calls(text: str) -> list[str | tuple[str, str]]:
    """Text and calls in turn: at each tag, is there an object in JSON, and behind it what may be there?"""
    found: list[str | tuple[str, str]] = []
    seen = at = 0
    while (at := text.find("<tool_call>", at) + 11) > 10:
        before, start = text[seen : at - 11], at
        while (end := call_at(text, start)) is not None:
            value, end, goes_on = end
            for call in read_calls(value):
                found += [before, (call.name, call.arguments)]
                before = ""
            seen = at = start = end
            if not goes_on:
                break
    return [*found, text[seen:]]


def call_at(text: str, at: int) -> tuple[str, int, bool] | None:
    """A call's text, where it ends with all that belongs to it, and whether the next object follows at once."""
    start = at + len(text[at:]) - len(text[at:].lstrip(" \t\n\r"))
    if text[start : start + 1] not in ("{", "["):
        return None
    try:
        end = json.JSONDecoder(strict=False).raw_decode(text, start)[1]
    except ValueError:
        return None
    rest = text[end:].lstrip(" \t\n\r")
    if not read_calls(text[start:end]):
        return None
    if rest.startswith("</tool_call>"):
        return text[start:end], len(text) - len(rest) + 12, False
    if rest.startswith(("<tool_call>", "{")):
        return text[start:end], len(text) - len(rest), rest.startswith("{")
    if "</tool_call>".startswith(rest) or "<tool_call>".startswith(rest):
        return text[start:end], len(text), False
    return None


@cheap
@given(text=answers, opened=st.booleans(), tools=st.booleans(), stops=stop_strings, data=st.data())
def test_the_borders_make_no_difference(text, opened, tools, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    expected = define(text, opened=opened, tools=tools, stops=stops)
    assert run(pieces, opened=opened, tools=tools, stops=stops) == expected
    assert run(list(text), opened=opened, tools=tools, stops=stops) == expected


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
        (CALL[:-1], False, ("", "", [ADD])),
        (CALL.removesuffix("</tool_call>"), False, ("", "", [ADD])),
        (f"I add.\n{CALL.removesuffix('</tool_call>')}", False, ("", "I add.", [ADD])),
        (f"{CALL[:-2]} then", False, ("", f"{CALL[:-2]} then", [])),
        (CALL.removesuffix("}\n</tool_call>"), False, ("", CALL.removesuffix("}\n</tool_call>"), [])),
        (CALL.removesuffix("</tool_call>") + CALL, False, ("", "", [ADD, ADD])),
        (f"{CALL}{CALL}", False, ("", "", [ADD, ADD])),
        ('<tool_call>{"name": "f"}{"name": "g"}\n {"name": "h"}</tool_call>', False, ("", "", [F, G, H])),
        ('<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>red', False, ("", "red", [F, G])),
        ('<tool_call>{"name": "f"}{"name": 5}</tool_call>', False, ("", '{"name": 5}</tool_call>', [F])),
        ('<tool_call>\r\n{"name": "f"}\t</tool_call>', False, ("", "", [F])),
        ('<tool_call>{"name": "f", "arguments": {"t": "x\ny"}}', False, ("", "", [("f", '{"t": "x\\ny"}')])),
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
        ('<tool_call>\n{"name": "f\n', False),
        ('<tool_call>\n{"name": 5}', True),
        ("<tool_call> [now", True),
        ('<tool_call>\n{"name": "f"}\n!', True),
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
    for stop in ("</think>", "circle", "\n", "blue", "n" * 99):
        held = answer("red circle\n</think>\n\nblue", head="assistant\n<think>\n", stop=[stop])
        assert held.reasoning == "red circle"
        assert held.content == ("" if stop == "blue" else "blue")
        assert held.reasoning_tokens == len(encode("red circle\n"))
    cut = answer("red circle", head="assistant\n<think>\n")
    assert (cut.reasoning, cut.content, cut.reasoning_tokens) == ("red circle", "", len(encode("red circle")))


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("stop", "content", "num_calls"),
    [
        ("circle", "I add.", 1),  # only thought of
        ("</think>", "I add.", 1),
        ("\n\n", "I add.", 1),  # what the template puts around parts is no text
        ("\n", "I add.", 1),
        ('add"', "I add.", 1),  # within a call
        ("arguments", "I add.", 1),
        ("<tool_call>", "I add.", 1),
        ("add.", "I ", 0),
        ("I", "", 0),
        (".a", "I add.", 1),  # not one text: a call stands between
        ("after", "I add.", 1),
    ],
)
def test_stop_strings_are_looked_for_in_the_content_alone(opened, stop, content, num_calls):
    head = "assistant\n<think>\n" if opened else "assistant\n"
    text = f"a red circle, {CALL}\n</think>\n\nI add.\n{CALL}after"
    found = answer(text if opened else f"<think>\n{text}", head=head, tools=True, stop=[stop])
    assert found.reasoning == f"a red circle, {CALL}"
    assert found.content == content + ("after" if num_calls and stop != "after" else "")
    assert len(found.calls) == num_calls
    assert found.is_stopped == (num_calls == 0 or stop == "after")


def test_a_thought_that_does_not_end_is_not_stopped():
    found = answer("a red circle\nQuestion: why", head="assistant\n<think>\n", stop=["\n", "Question:"])
    assert (found.reasoning, found.content, found.is_stopped) == ("a red circle\nQuestion: why", "", False)


@given(text=answers, opened=st.booleans(), tools=st.booleans(), stops=stop_strings)
def test_tokens_give_what_their_text_gives(text, opened, tools, stops):
    head = "assistant\n<think>\n" if opened else "assistant\n"
    found = answer(text, head=head, tools=tools, stop=stops)
    calls = [(call.function.name, call.function.arguments) for call in found.calls]
    assert (found.reasoning, found.content, calls) == define(text, opened=opened, tools=tools, stops=stops)


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
