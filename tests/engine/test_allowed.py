"""Tokens that a request does not let come: by a list of those that may, and by words."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.allowed import AllowedTokens
from qwen3vl_disagg.engine.sampler import Sampler, apply_masks, fill_by_bits
from qwen3vl_disagg.engine.sampling import SamplingRow
from qwen3vl_disagg.processing.bad_words import with_ids
from qwen3vl_disagg.protocol.messages import Tokens
from tests.support.grammars import answer, end_ids, make_engine, run, text_of, to_an_end, tokenizer

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
WORDS = [[20], [30, 31], [30, 32, 33], [40, 40]]


def may_come(generated: list[int], grammar: list[int] | None = None, **fields) -> list[int]:
    """Of a vocabulary of 50, where 0 is a placeholder and 1 an end."""
    sampler = Sampler(banned_ids=[0], eos_ids=[1])
    row = SamplingRow(SamplingParams(**fields), 0, [], generated)
    given = (
        None
        if grammar is None
        else sampler.narrowed(SamplingRow(SamplingParams(allowed_token_ids=grammar), 0), None, 90)
    )
    mask = sampler.narrowed(row, given, 50)
    assert mask is not None
    return np.unpackbits(mask.bits, bitorder="little").nonzero()[0].tolist()


@pytest.mark.parametrize(
    ("generated", "out"),
    [
        ([], {20}),
        ([30], {20, 31}),
        ([30, 32], {20, 33}),
        ([32], {20}),
        ([5, 30, 32], {20, 33}),
        ([30, 32, 5], {20}),
        ([40, 40, 40], {20, 40}),
    ],
)
def test_the_last_token_of_a_word_may_not_come_behind_the_others(generated, out):
    assert set(may_come(generated, bad_words=WORDS)) == set(range(1, 50)) - out
    assert may_come(generated, allowed_token_ids=[0, 2, 20, 31, 33, 40], bad_words=WORDS) == sorted(
        {2, 20, 31, 33, 40} - out
    )


def test_an_end_comes_where_a_grammar_lets_nothing_else_come():
    assert may_come([], [1, 3, 60], allowed_token_ids=[3, 4]) == [3]
    assert may_come([], [1, 60], allowed_token_ids=[3, 4]) == [1]
    assert may_come([3], [1, 4, 60], bad_words=[[3, 4]]) == [1]
    assert may_come([3], [1, 4, 60], bad_words=[[3, 4], [1]]) == [1]


@pytest.mark.parametrize(
    ("generated", "grammar", "fields", "names"),
    [
        ([], None, {"allowed_token_ids": [0]}, "allowed_token_ids let"),
        ([3], None, {"allowed_token_ids": [3], "bad_words": [[3, 3]]}, "allowed_token_ids and bad_words let"),
        ([], [3, 60], {"allowed_token_ids": [4]}, "allowed_token_ids and the grammar let"),
        ([], [4, 0], {"bad_words": [[4]]}, "bad_words and the grammar let"),
    ],
)
def test_where_nothing_may_come_it_is_said(generated, grammar, fields, names):
    with pytest.raises(InputError, match=names) as caught:
        may_come(generated, grammar, **fields)
    assert (caught.value.code, caught.value.param) == ("no_token_left", next(iter(fields)))


def test_ends_come_too_early_only_where_nothing_else_may():
    sampler, logits = Sampler(banned_ids=[0], eos_ids=[1]), torch.zeros(1, 50)
    for allowed, expected in (([1], 1), ([1, 7], 7)):
        row = SamplingRow(SamplingParams(allowed_token_ids=allowed, ignore_eos=True, logit_bias={1: 50.0}), 0)
        assert sampler.sample(logits, [row])[0] == [expected]


def test_masks_of_grammars_may_be_longer_than_those_of_requests():
    sampler, logits = Sampler(banned_ids=[], eos_ids=[1]), torch.randn(2, 50)
    rows = [SamplingRow(SamplingParams(allowed_token_ids=[2, 49]), 0)] * 2
    short, long = sampler.narrowed(rows[0], None, 50), sampler.narrowed(SamplingRow(rows[0].params, 0), None, 120)
    found, expected = logits.clone(), logits.clone()
    apply_masks(found, [0, 1], [short, long])
    fill_by_bits(expected, torch.tensor([0, 1]), torch.from_numpy(np.stack([short.bits, long.bits[: len(short.bits)]])))
    assert torch.equal(found, expected)
    assert found.isfinite().sum(-1).tolist() == [2, 2]
    apply_masks(logits.to("meta"), [0, 1], [short, long])  # the way of a GPU: all masks in one piece


# ---- in an engine ----


def narrow() -> dict[str, tuple[list[int], SamplingParams]]:
    """Sampled hot, with everything else."""
    sampled = {"temperature": 1.5, "max_new_tokens": 60, "ignore_eos": True}
    few, words = [40, 41, 42, 43], [[40], [41, 42], [43, 43, 43]]
    grammar = Grammar.of_regex("[a-e]{30}")
    letters = [tokenizer().encode(letter)[0] for letter in "abcd"]
    return {
        "plain": (PROMPT, SamplingParams(seed=1, **sampled)),
        "few": (PROMPT, SamplingParams(seed=2, allowed_token_ids=few, repetition_penalty=1.3, top_k=3, **sampled)),
        "words": (
            PROMPT,
            SamplingParams(seed=3, allowed_token_ids=few, bad_words=words, logit_bias={40: 99}, **sampled),
        ),
        "grammar": (PROMPT, to_an_end(seed=4, grammar=grammar, allowed_token_ids=letters, bad_words=[letters[:2]])),
        "greedy": (PROMPT, SamplingParams(max_new_tokens=60, bad_words=words, ignore_eos=True)),
    }


def check(name: str, ids: list[int], reason: str) -> None:
    if name == "few":
        assert (set(ids), reason) == ({40, 41, 42, 43}, "length")
    if name == "words":
        said = " ".join(map(str, ids))
        assert set(ids) == {41, 42, 43}
        assert [text in said for text in ("41 42", "43 43 43", "41 43", "43 43")] == [False, False, True, True]
    if name == "grammar":
        assert re.fullmatch("[a-d]{30}", text_of(ids))
        assert "ab" not in text_of(ids)
        assert (ids[-1] in end_ids(), reason) == (True, "stop"), "an end, which is none of those that are allowed"


def test_rows_with_and_without_in_one_batch_are_as_alone():
    together = run(make_engine(), narrow())
    for name, request in narrow().items():
        ids, reason = answer(together[name])
        check(name, ids, str(reason))
        assert answer(run(make_engine(), {name: request})[name]) == (ids, reason)


def test_after_a_preemption_too():
    calm, tight = make_engine(), make_engine()
    pool = tight.scheduler.pool
    assert pool.allocate(pool.num_free - pool.pages_for(len(PROMPT) + 60))
    expected, events = run(calm, narrow()), run(tight, narrow())
    assert tight.scheduler.num_preempted > calm.scheduler.num_preempted == 0
    for name in narrow():
        assert answer(events[name]) == answer(expected[name])


def test_logprobs_are_of_the_raw_distribution():
    free = SamplingParams(max_new_tokens=1, logprobs=3)
    first = run(make_engine(), {"a": (PROMPT, free)})["a"]
    best = answer(first)[0][0]
    bound = SamplingParams(max_new_tokens=1, logprobs=3, bad_words=[[best]])
    second = run(make_engine(), {"a": (PROMPT, bound)})["a"]
    tops = [e.logprobs[0].top for one in (first, second) for e in one if isinstance(e, Tokens) and e.logprobs]
    assert tops[0] == tops[1]
    assert answer(second)[0][0] == tops[0][1][0]


def test_an_answer_that_cannot_go_on_ends_alone():
    stuck = SamplingParams(max_new_tokens=9, allowed_token_ids=[40, 41], bad_words=[[40, 40], [40, 41], [41]])
    events = run(make_engine(), {"stuck": (PROMPT, stuck), **narrow()})
    assert answer(events["stuck"]) == ([40], "no_token_left")
    for name in narrow():
        check(name, answer(events[name])[0], str(answer(events[name])[1]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [40, 10**6]}, "allowed_token_ids"),
        ({"bad_words": [[40, 10**6]]}, "bad_words"),
        ({"bad_words": [[40]], "allowed_token_ids": [40]}, "allowed_token_ids"),
    ],
)
def test_what_can_never_be_answered_is_refused_at_once(fields, param):
    with pytest.raises(InputError) as caught:
        make_engine().add("a", PROMPT, [], SamplingParams(**fields))
    assert caught.value.param == param


def test_a_text_has_to_be_ids_by_then():
    with pytest.raises(ValueError, match="'red' is not told by its ids"):
        make_engine().add("a", PROMPT, [], SamplingParams(bad_words=["red"]))


# ---- from texts to ids ----


def test_a_word_is_taken_as_it_begins_and_within_a_text():
    words = tokenizer()
    params = with_ids(SamplingParams(bad_words=["red", " Zürich", [7, 8], "\n", "red"]), words)
    texts = [words.decode(list(ids)) for ids in params.bad_words]
    assert texts == ["red", " red", "Zürich", " Zürich", words.decode([7, 8]), "\n"]
    assert [words.encode(text) for text in texts[:4]] == params.bad_words[:4]
    assert len(params.bad_words[2]) > 1
    assert with_ids(params, words) is params


def test_words_of_ordinary_texts_are_never_too_many_ids():
    words = tokenizer()
    many = [f"word {number}" for number in range(512)]
    assert len(with_ids(SamplingParams(bad_words=[*many, *map(str, range(88))]), words).bad_words) == 1200
    long = "".join(chr(0x1F600 + number % 64) for number in range(120))
    assert max(map(len, with_ids(SamplingParams(bad_words=[long]), words).bad_words)) > 256
    with pytest.raises(InputError, match=r"bad_words have \d+ tokens, up to 16384") as caught:
        with_ids(SamplingParams(bad_words=[long] + [f"{number}{long}" for number in range(99)]), words)
    assert caught.value.param == "bad_words"


def test_what_may_come_is_worked_out_once_for_all_answers_and_after_a_preemption(monkeypatch):
    made = []

    def counting(*args, **options):
        made.append(AllowedTokens(*args, **options))
        return made[-1]

    monkeypatch.setattr("qwen3vl_disagg.engine.sampler.AllowedTokens", counting)
    engine = make_engine()
    pool = engine.scheduler.pool
    assert pool.allocate(pool.num_free - pool.pages_for(len(PROMPT) + 60))
    several = SamplingParams(n=3, seed=1, temperature=1.0, max_new_tokens=60, ignore_eos=True, bad_words=[[40], [7, 8]])
    run(engine, {"several": (PROMPT, several)})
    assert engine.scheduler.num_preempted > 0
    assert len(made) == 1
