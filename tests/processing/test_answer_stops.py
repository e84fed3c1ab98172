"""Stop strings over the borders of pieces and tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing import AnswerParts
from qwen3vl_disagg.processing.answer_stops import StopMatcher
from tests.support.fake_backend import tiny_processor


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """What comes out of each push, then of finish; whether a stop string was complete."""
    matcher = StopMatcher(stops)
    out = [matcher.push(piece) for piece in pieces]
    return [*out, matcher.finish()], matcher.is_complete


def search(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition, on the whole text: up to the first end of a stop string, and before its longest one there."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


cheap = settings(max_examples=10 * settings().max_examples)
letters = st.text("ab", max_size=12)
several = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@pytest.mark.parametrize(
    ("stops", "pieces", "out", "is_complete"),
    [
        (["\n"], ["red\nblue"], ["red", ""], True),
        (["ab"], ["xa", "ay", "az"], ["x", "aay", "az", ""], False),
        (["ab"], ["xa", "b"], ["x", "", ""], True),
        (["abc", "b"], ["abc"], ["a", ""], True),  # "b" is complete first
        (["b", "aab"], ["xa", "ab"], ["x", "", ""], True),  # both at once: the longer
        (["aab"], ["aaa", "b"], ["a", "", ""], True),
        (["abab"], ["aba", "cabab"], ["", "abac", ""], True),
        ([], ["ab"], ["ab", ""], False),
        (["ab"], ["a", "", ""], ["", "", "", "a"], False),
    ],
)
def test_by_hand(stops, pieces, out, is_complete):
    assert run(stops, pieces) == (out, is_complete)


@cheap
@given(stops=several, pieces=st.lists(letters, max_size=6))
def test_the_pieces_make_no_difference(stops, pieces):
    out, is_complete = run(stops, pieces)
    assert ("".join(out), is_complete) == search(stops, "".join(pieces))
    keeping = StopMatcher(stops, keeps_stop=True)
    kept = "".join([*map(keeping.push, pieces), keeping.finish()])
    assert kept == "".join(out) + (keeping.complete or "")


@cheap
@given(stops=several, pieces=st.lists(letters, max_size=6))
def test_what_is_held_back_is_less_than_the_longest_stop_string(stops, pieces):
    matcher = StopMatcher(stops)
    shown = ""
    for n, piece in enumerate(pieces, 1):
        shown += matcher.push(piece)
        held = len("".join(pieces[:n])) - len(shown)
        if matcher.is_complete:
            break
        assert 0 <= held < max(map(len, stops), default=1)
        assert held == 0 or any(stop.startswith("".join(pieces[:n])[-held:]) for stop in stops)


def test_nothing_comes_after_a_stop_string():
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == "a"
    assert matcher.push("c.d") == ""
    assert matcher.finish() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="empty"):
        StopMatcher(["a", ""])


@cheap
@given(stops=several, quiet=st.lists(letters, max_size=3), loud=st.lists(letters, max_size=3))
def test_what_is_complete_too_early_is_text(stops, quiet, loud):
    """The first end of a stop string after the quiet part counts, also of one that began in it."""
    matcher = StopMatcher(stops)
    out = [matcher.push(piece, may_stop=False) for piece in quiet]
    out += [matcher.push(piece) for piece in loud]
    out.append(matcher.finish())
    text, early = "".join(quiet + loud), len("".join(quiet))
    ends = [
        (end, end - len(stop)) for stop in stops for end in range(early + 1, len(text) + 1) if text[:end].endswith(stop)
    ]
    assert "".join(out) == (text[: min(ends)[1]] if ends else text)
    assert matcher.is_complete == bool(ends)


def test_what_was_complete_too_early_is_not_found_again():
    matcher = StopMatcher(["b", "abc"])
    assert matcher.push("ab", may_stop=False) == ""  # may become "abc"
    assert matcher.push("x") == "abx"
    assert not matcher.is_complete


# ---- tokens ----


def answer(token_ids: list[int], **params) -> tuple[AnswerParts, str]:
    """After all tokens, and the text so far."""
    processor = tiny_processor()
    found = AnswerParts(processor.tokenizer, processor.generation.eos_token_ids, SamplingParams(**params), [])
    return found, "".join(found.push(token_id).content for token_id in token_ids)


def test_tokens_after_the_one_that_completes_a_stop_string_do_not_count():
    tokenizer = tiny_processor().tokenizer
    token_ids = tokenizer.encode("red circle, blue square")
    for count in range(1, len(token_ids) + 1):
        prefix = tokenizer.decode(token_ids[:count])
        if "e, b" in prefix:
            break
    found, text = answer(token_ids, stop=["e, b"])
    assert found.is_stopped
    assert text == "red circl"
    assert found.token_ids == token_ids[:count]
    assert found.finish().content == ""


def test_the_end_token_is_no_text_and_what_was_held_back_comes_at_the_end():
    tokenizer = tiny_processor().tokenizer
    token_ids = [*tokenizer.encode("red"), tokenizer.token_id("<|im_end|>")]
    found, text = answer(token_ids, stop=["red circle"])
    assert text == ""
    assert found.finish().content == "red"
    assert (found.is_stopped, found.token_ids) == (False, token_ids)


@pytest.mark.parametrize(("min_tokens", "text", "count"), [(0, "", 1), (1, "", 1), (2, "a", 2), (3, "aa", 3)])
def test_min_tokens(min_tokens, text, count):
    [letter] = tiny_processor().tokenizer.encode("a")
    found, shown = answer([letter] * 4, stop=["a"], min_tokens=min_tokens)
    assert (shown, len(found.token_ids), found.is_stopped) == (text, count, True)


def test_an_unfinished_character_may_complete_a_stop_string():
    first_byte = tiny_processor().tokenizer.encode("\u00e9")[0]
    found, _ = answer([first_byte], stop=["\ufffd"])
    assert not found.is_stopped
    assert found.finish().content == ""
    assert found.is_stopped


def test_beginnings_are_made_once_for_all_answers_of_a_request():
    stops = [str(number) * 200 for number in range(10, 26)]
    first, *others = [StopMatcher(list(stops)) for _ in range(3)]
    assert all(other._beginnings is first._beginnings for other in others)
    assert first.push("10" * 3) == ""
    assert others[0].push("x") == "x"
