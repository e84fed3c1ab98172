import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.sampler import Sampler, filter_logits


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_greedy_takes_the_best_that_is_not_banned():
    sampler = Sampler(banned_ids=[1], eos_ids=[2])
    logits = torch.tensor([[0.0, 9.0, 5.0, 4.0]])
    assert sampler.sample(logits, [SamplingParams()], generators(0))[0] == [2]
    assert sampler.sample(logits, [SamplingParams(ignore_eos=True)], generators(0))[0] == [3]


def test_logprobs_come_from_the_raw_distribution():
    sampler = Sampler(banned_ids=[0], eos_ids=[])
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    sampling = SamplingParams(logprobs=2, temperature=0.5, top_k=1)
    _, [entry] = sampler.sample(logits, [sampling], generators(0))
    total = sum(math.exp(v) for v in (3, 1, 2))
    assert entry.token_id == 2
    assert entry.logprob == pytest.approx(math.log(math.exp(2) / total), abs=1e-6)
    assert [i for i, _ in entry.top] == [0, 2]
    assert entry.top[0][1] == pytest.approx(math.log(math.exp(3) / total), abs=1e-6)


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = filter_logits(logits, SamplingParams(temperature=1.0, top_k=2)).isfinite().tolist()
    assert kept == [True, True, False, False]
    # 0.5 < 0.7 <= 0.5 + 0.3: the second one is needed to reach p.
    kept = filter_logits(logits, SamplingParams(temperature=1.0, top_p=0.7)).isfinite().tolist()
    assert kept == [True, True, False, False]
    kept = filter_logits(logits, SamplingParams(temperature=1.0, top_p=0.01)).isfinite().tolist()
    assert kept == [True, False, False, False]


@given(
    logits=st.lists(st.floats(-8, 8), min_size=2, max_size=30),
    temperature=st.floats(0.1, 3),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 30),
)
def test_filters_never_remove_everything_nor_the_best(logits, temperature, top_p, top_k):
    row = torch.tensor(logits)
    filtered = filter_logits(row, SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k))
    assert filtered[row.argmax()].isfinite()
    assert filtered.softmax(-1).isfinite().all()


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch():
    sampler = Sampler(banned_ids=[], eos_ids=[])
    torch.manual_seed(0)
    rows = torch.randn(20, 50)
    mine, other = SamplingParams(temperature=1.0), SamplingParams(temperature=2.0, top_k=7)
    [alone] = generators(7)
    expected = [sampler.sample(row[None], [mine], [alone])[0][0] for row in rows]
    a, b, c = generators(1, 7, 2)
    noise = torch.randn(20, 2, 50)
    got = []
    for i in range(20):
        batch = torch.stack([noise[i, 0], rows[i], noise[i, 1]])
        got.append(sampler.sample(batch, [other, mine, other], [a, b, c])[0][1])
    assert got == expected
    assert len(set(got)) > 5


def test_frequencies_follow_the_distribution():
    sampler = Sampler(banned_ids=[], eos_ids=[])
    probs = torch.tensor([0.6, 0.3, 0.1])
    n = 4000
    ids, _ = sampler.sample(
        probs.log().expand(n, -1), [SamplingParams(temperature=1.0)] * n, [torch.Generator().manual_seed(3)] * n
    )
    counts = torch.bincount(torch.tensor(ids), minlength=3) / n
    assert torch.allclose(counts, probs, atol=0.03)


def test_logits_that_are_not_finite_are_an_error():
    sampler = Sampler(banned_ids=[], eos_ids=[])
    with pytest.raises(ValueError, match="not finite"):
        sampler.sample(torch.tensor([[1.0, float("nan")]]), [SamplingParams()], generators(0))
