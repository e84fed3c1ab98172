"""A row's token and logprobs are the same, bit for bit, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.sampling_params import DEFAULTS, OPTIONS, SamplingParams
from qwen3vl_disagg.engine.sampler import Sampler
from qwen3vl_disagg.engine.sampling import SamplingRow
from tests.support.reference_sampler import SAMPLERS, next_token
from tests.support.sampling import weights


def make_sampler() -> Sampler:
    return Sampler(banned_ids=[1, 5], eos_ids=[0, 3])


# Option -> what is drawn of it in half of the cases; else it is off
DRAWN = {
    "temperature": st.floats(0.05, 5),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(1, 50),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logit_bias": st.dictionaries(st.integers(0, 7), st.floats(-200, 200), max_size=3),
    # Of eight tokens 6 and 7 may always come: where nothing may is `test_allowed.py`'s.
    "allowed_token_ids": st.lists(st.integers(0, 7), max_size=4).map(lambda ids: [*ids, 6, 7]),
    "bad_words": st.lists(
        st.tuples(st.lists(st.integers(0, 7), max_size=2), st.integers(0, 5)).map(lambda word: [*word[0], word[1]]),
        max_size=4,
    ),
    "min_tokens": st.integers(0, 5),
    "ignore_eos": st.booleans(),
    "logprobs": st.integers(0, 20),
}
OF_THE_SAMPLER = [name for name, option in OPTIONS.items() if option.step in ("logprobs", *SAMPLERS)]


@st.composite
def params(draw) -> SamplingParams:
    return SamplingParams(
        **{name: draw(st.one_of(st.just(DEFAULTS[name]), strategy)) for name, strategy in DRAWN.items()}
    )


def test_every_option_of_the_sampler_is_drawn():
    assert set(DRAWN) == set(OF_THE_SAMPLER) - {"seed"}, "rows have seeds of their own"


@pytest.mark.parametrize("name", OF_THE_SAMPLER)
def test_an_option_makes_a_difference(name):
    logits_BV = draw_logits(0, 1, 8, coarse=False).expand(200, -1) / 4
    sampler = Sampler(banned_ids=[1], eos_ids=[0, 3])

    def rows(**fields) -> list[SamplingRow]:
        one = SamplingParams(**{"temperature": 1.0, **fields})
        return [SamplingRow(one, n + (one.seed or 0), [2, 2], [4, 6]) for n in range(200)]

    example = [[6, 2]] if name == "bad_words" else OPTIONS[name].example  # the engine has no tokenizer
    with_it, without = rows(**{name: example}), rows()
    assert sampler.sample(logits_BV, with_it) != sampler.sample(logits_BV, without), "engine/sampler.py"
    if OPTIONS[name].step in SAMPLERS:
        by_definition = [[next_token(logits_BV[0], row, [1], [0, 3]) for row in some] for some in (with_it, without)]
        assert by_definition[0] != by_definition[1], "tests/support/reference_sampler.py"


ids = st.lists(st.integers(0, 7), max_size=8)
row = st.builds(SamplingRow, params(), st.integers(0, 2**63 - 1), ids, ids)


def draw_logits(seed: int, count: int, vocab_size: int, coarse: bool) -> torch.Tensor:
    """`coarse`: from few values, so that many are equal."""
    logits = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4
    return logits.bfloat16() if coarse else logits


@given(
    rows=st.lists(row, min_size=1, max_size=9),
    vocab_size=st.sampled_from([8, 9, 31, 64, 333, 1000]),
    seed=st.integers(0, 2**31),
    coarse=st.booleans(),
    threads=st.integers(1, 2),
)
def test_a_row_alone_and_in_a_batch(rows, vocab_size, seed, coarse, threads):
    logits, sampler = draw_logits(seed, len(rows), vocab_size, coarse), make_sampler()
    torch.set_num_threads(threads)
    try:
        token_ids, entries = sampler.sample(logits, rows)
        for b, one in enumerate(rows):
            alone = sampler.sample(logits[b : b + 1].clone(), [one])
            assert alone == ([token_ids[b]], [entries[b]])
    finally:
        torch.set_num_threads(1)


@given(
    requests=st.lists(st.tuples(params(), ids, st.integers(0, 3)), min_size=1, max_size=5),
    vocab_size=st.sampled_from([8, 9, 64, 333]),
    seed=st.integers(0, 2**31),
    coarse=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_every_step_is_the_definitions_whoever_comes_and_goes(requests, vocab_size, seed, coarse, order):
    """Requests that live over steps, join and leave, are preempted and come back: the definition from lists at each."""
    sampler = make_sampler()
    living = {n: SamplingRow(one, seed + n, prompt, []) for n, (one, prompt, _) in enumerate(requests)}
    for step in range(5):
        present = [n for n, (_, _, joins) in enumerate(requests) if step >= joins and order.random() < 0.8]
        order.shuffle(present)
        if order.random() < 0.2 and present:
            old = living[present[0]]
            living[present[0]] = SamplingRow(old.params, old.seed, old.prompt_ids, old.generated)
        if not present:
            continue
        logits = draw_logits(seed + step, len(present), vocab_size, coarse)
        token_ids, _ = sampler.sample(logits, [living[n] for n in present])
        for b, n in enumerate(present):
            assert token_ids[b] == next_token(logits[b], living[n], [1, 5], [0, 3])
            living[n].generated.append(token_ids[b])


@given(row=row, seed=st.integers(0, 2**31), coarse=st.booleans())
def test_what_is_banned_is_never_picked(row, seed, coarse):
    [token_id], _ = make_sampler().sample(draw_logits(seed, 1, 40, coarse), [row])
    assert token_id not in (1, 5)
    if row.params.ignore_eos or row.index < row.params.min_tokens:
        assert token_id not in (0, 3)


@given(
    seed=st.integers(0, 2**31),
    coarse=st.booleans(),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 30),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.1, 3),
)
def test_filters_keep_the_best_and_keep_it_larger_than_what_they_remove(seed, coarse, **given_params):
    logits = draw_logits(seed, 3, 30, coarse).float()
    found = weights(logits, **given_params)
    for kept_V, logits_V in zip(found > 0, logits, strict=True):
        assert kept_V[logits_V.argmax()]
        if not kept_V.all():
            assert logits_V[kept_V].min() >= logits_V[~kept_V].max()


@given(
    seed=st.integers(0, 2**31), coarse=st.booleans(), top_p=st.floats(0.01, 0.999), top_k=st.sampled_from([0, 2, 3, 40])
)
def test_top_p_keeps_the_smallest_set_of_most_likely_tokens(seed, coarse, top_p, top_k):
    """Against the definition: tokens in order (equal ones by id), as long as those before weigh less than p."""
    logits = draw_logits(seed, 1, 200, coarse).float()
    before = weights(logits, top_k=top_k)[0].tolist()
    total, mass, expected = sum(before), 0, set()
    for token_id in sorted(range(200), key=lambda i: (-float(logits[0, i]), i)):
        if mass < top_p * total and before[token_id]:
            expected.add(token_id)
        mass += before[token_id]
    got = weights(logits, top_k=top_k, top_p=top_p)[0].tolist()
    assert {i for i, weight in enumerate(got) if weight} == expected
    assert all(got[i] == before[i] for i in expected)


def test_answers_in_a_row():
    """Thirty tokens, one after another: with other neighbours each time, and after being computed again."""
    wanted = SamplingParams(temperature=1.0, top_k=40, presence_penalty=0.3)
    other = SamplingParams(temperature=2.0, top_p=0.9, logprobs=3)
    logits = draw_logits(0, 30, 100, False)
    sampler = Sampler(banned_ids=[], eos_ids=[])
    alone: list[int] = []
    mine = SamplingRow(wanted, 7, [2, 3], alone)
    for step in range(30):
        alone.append(sampler.sample(logits[step : step + 1], [mine])[0][0])
    again: list[int] = []
    for step in range(30):
        rows = [SamplingRow(other, step)] * (step % 4)
        noise = draw_logits(step, len(rows) + 1, 100, False)
        batch = torch.cat([noise[: len(rows)], logits[step : step + 1]])
        again.append(sampler.sample(batch, [*rows, SamplingRow(wanted, 7, [2, 3], list(again))])[0][-1])
    assert again == alone
    assert len(set(alone)) > 10


@given(
    rows=st.lists(
        st.builds(
            SamplingParams,
            ignore_eos=st.booleans(),
            min_tokens=st.integers(0, 5),
            stop_token_ids=st.lists(st.sampled_from([2, 6]), max_size=2, unique=True),
        ),
        min_size=1,
        max_size=5,
    ),
    num_generated=st.integers(0, 6),
    seed=st.integers(0, 999),
)
def test_rows_that_take_the_largest_logit_alone(rows, num_generated, seed):
    """In bfloat16, where that is one kernel, if there are any."""
    logits_BV = (torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(seed)) * 2).round().bfloat16()
    sampler = make_sampler()
    batch = [SamplingRow(params, 0, [4], [7] * num_generated) for params in rows]
    found, entries = sampler.sample(logits_BV, batch)
    assert found == [next_token(logits_V, row, [1, 5], [0, 3]) for logits_V, row in zip(logits_BV, batch, strict=True)]
    assert entries == [None] * len(rows)
