"""The sampler by hand: each step, its order, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine import penalties
from qwen3vl_disagg.engine import sampler as sampler_module
from qwen3vl_disagg.engine.penalties import Penalties
from qwen3vl_disagg.engine.sampler import ONE, Sampler, pick, unpack
from qwen3vl_disagg.engine.sampling import SamplingPlan, SamplingRow, splitmix64, uniform
from tests.support.sampling import kept, shares, weights_of_rows

PLAIN = Sampler(banned_ids=[], eos_ids=[])


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor([probs]).log()


def pick_one(sampler: Sampler, logits: torch.Tensor, params: SamplingParams, prompt=(), generated=()) -> int:
    return sampler.sample(logits, [SamplingRow(params, 0, prompt, generated)])[0][0]


def test_greedy_takes_the_best_that_is_not_banned():
    sampler = Sampler(banned_ids=[1], eos_ids=[2])
    logits = torch.tensor([[0.0, 9.0, 5.0, 4.0]])
    assert pick_one(sampler, logits, SamplingParams()) == 2
    assert pick_one(sampler, logits, SamplingParams(ignore_eos=True)) == 3
    assert pick_one(sampler, logits, SamplingParams(logit_bias={1: 100.0})) == 2
    assert pick_one(sampler, logits, SamplingParams(ignore_eos=True, logit_bias={2: 100.0})) == 3
    assert logits.tolist() == [[0.0, 9.0, 5.0, 4.0]]


def test_no_end_token_before_min_tokens():
    sampler = Sampler(banned_ids=[], eos_ids=[2])
    logits = torch.tensor([[0.0, 1.0, 5.0]])
    params = SamplingParams(min_tokens=2)
    assert [pick_one(sampler, logits, params, (), [1] * n) for n in range(4)] == [1, 1, 2, 2]


@pytest.mark.parametrize("temperature", [0.0, 1e-7, 1e-300])
def test_tiny_temperatures_are_greedy(temperature):
    logits = torch.tensor([[1.0, 1.001, 0.0]])
    assert {pick_one(PLAIN, logits, SamplingParams(temperature=temperature, seed=s)) for s in range(5)} == {1}


def test_logprobs_come_from_the_raw_distribution():
    sampler = Sampler(banned_ids=[0], eos_ids=[])
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    params = SamplingParams(logprobs=2, temperature=0.5, top_k=1, logit_bias={1: 50.0}, repetition_penalty=2.0)
    ids, [entry] = sampler.sample(logits, [SamplingRow(params, 0, [2], [1])])
    total = sum(math.exp(v) for v in (3, 1, 2))
    assert entry is not None
    assert ids == [entry.token_id] == [1]
    assert entry.logprob == pytest.approx(math.log(math.exp(1) / total), abs=1e-6)
    assert [i for i, _ in entry.top] == [0, 2]
    assert entry.top[0][1] == pytest.approx(math.log(math.exp(3) / total), abs=1e-6)


def test_each_row_gets_as_many_logprobs_as_it_asked_for():
    logits = torch.tensor([[0.0, -1.0, 2.0, 2.0]]).expand(4, -1)
    rows = [SamplingRow(SamplingParams(logprobs=n), 0) for n in (None, 0, 3, 9)]
    _, entries = PLAIN.sample(logits, rows)
    assert entries[0] is None
    assert [[i for i, _ in entry.top] for entry in entries[1:] if entry] == [[], [2, 3, 0], [2, 3, 0, 1]]


def test_the_best_of_equal_ones_is_the_first_of_the_alternatives():
    logits = torch.tensor([[1.0, -2.0, 1.0, 0.0, -0.0, 1.0]])
    ids, [entry] = PLAIN.sample(logits, [SamplingRow(SamplingParams(logprobs=6), 0)])
    assert entry is not None
    assert ids == [0]
    assert [i for i, _ in entry.top] == [0, 2, 5, 3, 4, 1]


# ---- filters ----


def test_top_k_by_hand():
    logits = logits_of(0.5, 0.3, 0.15, 0.05)
    assert kept(logits, top_k=2) == [[0, 1]]
    assert kept(logits, top_k=4) == kept(logits, top_k=9) == kept(logits) == [[0, 1, 2, 3]]
    # As large as the second one: kept too, as transformers does.
    assert kept(torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]]), top_k=2) == [[0, 1, 2, 4]]


def test_top_p_by_hand():
    logits = logits_of(0.15, 0.5, 0.05, 0.3)
    # 0.5 < 0.7 <= 0.5 + 0.3: the second one is needed to reach p.
    assert kept(logits, top_p=0.7) == [[1, 3]]
    assert kept(logits, top_p=0.01) == [[1]]
    assert kept(logits, top_p=0.99) == [[0, 1, 2, 3]]
    assert kept(torch.zeros(1, 8), top_p=0.45) == [[0, 1, 2, 3]]  # equal ones: of lower ids
    # After top-k three are left, with 0.5 of 0.95, 0.8 of 0.95, ..
    assert kept(logits, top_k=3, top_p=0.5) == [[1]]
    assert kept(logits, top_k=3, top_p=0.6) == [[1, 3]]


def test_top_p_among_more_equal_ones_than_top_k_asked_for():
    # Nine tokens are as likely as the second one; four of the ten make up p. A whole sort is not needed for that.
    logits = torch.cat([torch.tensor([2.0]), torch.ones(9), torch.full((90,), -5.0)])[None]
    share = math.exp(1) / (math.exp(2) + 9 * math.exp(1))
    first = math.exp(1) * share
    assert kept(logits, top_k=2, top_p=first + 2.5 * share) == [[0, 1, 2, 3]]
    assert kept(logits, top_k=2) == [list(range(10))]


def test_top_p_may_need_most_of_a_large_vocabulary():
    logits = -1e-3 * torch.arange(1000.0)[None]
    reached = logits.double().softmax(-1).cumsum(-1)
    count = int((reached < 0.9).sum()) + 1
    assert 800 < count < 900
    assert kept(logits, top_p=0.9) == [list(range(count))]


def test_rows_without_a_filter_keep_everything_beside_rows_with_one():
    logits = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    plain = SamplingParams(temperature=1.0)
    others = [SamplingParams(temperature=1.0, **f) for f in ({"top_k": 3, "top_p": 0.9}, {"min_p": 0.9}, {"top_k": 2})]
    found = weights_of_rows(logits, plain, *others) > 0
    assert found[0].all()
    assert [int(row.sum()) for row in found[1:]] == [
        int((weights_of_rows(logits[i : i + 1], o) > 0).sum()) for i, o in enumerate(others, 1)
    ]
    assert int(found[3].sum()) == 2


def test_picking_by_hand():
    # The sums are 0 2 5 5.
    weights_SV = torch.tensor([[0, 2, 3, 0]]).expand(6, -1)
    uniform_S = torch.tensor([0.0, 0.39, 0.4, 0.5, 0.99, 1 - 2**-53], dtype=torch.float64)
    assert pick(weights_SV, uniform_S).tolist() == [1, 1, 2, 2, 2, 2]


def test_min_p_by_hand():
    logits = logits_of(0.5, 0.26, 0.19, 0.05)
    assert kept(logits, min_p=0.4) == [[0, 1]] == kept(logits, min_p=0.5)
    assert kept(logits, min_p=1.0) == [[0]]
    assert kept(logits, min_p=0.05) == [[0, 1, 2, 3]]
    # Temperature comes first: 0.26 / 0.5 squared is 0.27.
    assert kept(logits, min_p=0.4, temperature=0.5) == [[0]]


def test_shares_follow_temperature():
    logits = torch.tensor([[0.3, -1.0, 2.0]])
    assert torch.allclose(shares(logits, temperature=0.7), (logits / 0.7).double().softmax(-1), atol=1e-7)


def test_a_large_vocabulary_does_not_overflow():
    logits = torch.zeros(1, 2**18)
    ids = [pick_one(PLAIN, logits, SamplingParams(temperature=1.0), (), [0] * n) for n in range(40)]
    assert 2**18 * ONE < 2**63
    assert min(ids) < 2**16 < 3 * 2**16 < max(ids)


# ---- penalties and bias ----


def test_penalties_by_hand():
    # Repetition over prompt and output; presence once and frequency as often as in the output.
    logits = torch.tensor([[4.0, 3.0, -1.0, 2.0, 0.0]])
    row = SamplingRow(
        SamplingParams(
            repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={1: 1.0, 3: -1e9}
        ),
        0,
        [0, 0, 2],
        [1, 1, 4],
    )
    plan = SamplingPlan.of([row], vocab_size=5, eos_ids=[])
    # 4 / 2; (3 + 1) / 2 - 0.25 - 2 * 0.5; -1 * 2; 2 - 100; 0 - 0.25 - 0.5
    assert PLAIN._masked(logits, plan).tolist() == [[2.0, 0.75, -2.0, -98.0, -0.75]]


def test_penalties_that_are_off_touch_nothing():
    row = SamplingRow(SamplingParams(temperature=1.0), 0, [0, 1], [1])
    plan = SamplingPlan.of([row], vocab_size=5, eos_ids=[2])
    assert (plan.penalized, plan.bans, plan.sorted, plan.is_on) == ([], [], [], {"temperature"})


def test_a_request_that_is_gone_gives_its_row_back():
    sampler, logits = Sampler(banned_ids=[], eos_ids=[]), torch.zeros(3, 5)
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: 3.0})
    for _ in range(50):
        rows = [SamplingRow(params, 0, [0], [2]) for _ in range(3)]
        sampler.sample(logits, rows)
    assert {name: len(table) for name, table in sampler._penalties._tables.items()} == dict.fromkeys(
        ["bias", "factor", "minus"], 4
    )
    assert len(sampler._penalties._entries) == 3
    plain = [SamplingRow(SamplingParams(repetition_penalty=1.5), 0, [4], [])] * 3
    del rows
    assert sampler.sample(torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]]).expand(3, -1), plain)[0] == [3] * 3


def test_penalties_of_a_batch_at_once_are_those_of_each_row(monkeypatch):
    """The way of a GPU, on a CPU."""
    made = []

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            made.append(1)
            return torch.device("cuda")

    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    some = [{}, {"repetition_penalty": 1.7}, {"frequency_penalty": 0.3, "logit_bias": {3: -4.0}}]
    some.append({"presence_penalty": 1.0, "repetition_penalty": 0.8, "logit_bias": {29: 7.0}})
    rows = [SamplingRow(SamplingParams(**one), 0, [1, 2, 2], [2, 5, 5]) for one in some]
    expected, found = logits.clone(), logits.clone()
    Penalties().apply(expected, range(4), rows)
    monkeypatch.setattr(penalties, "upload", lambda columns, _: torch.tensor(columns, dtype=torch.float64).unbind(0))
    monkeypatch.setattr(torch, "full", lambda shape, value, device, make=torch.full: make(shape, value))
    Penalties().apply(found.as_subclass(Elsewhere), range(4), rows)
    assert made
    assert torch.equal(found, expected)
    assert not torch.equal(expected[1:], logits[1:])


def test_a_row_with_top_p_alone_makes_no_others_sort(monkeypatch):
    sizes = []
    real = sampler_module._largest
    monkeypatch.setattr(
        sampler_module, "_largest", lambda logits, count: sizes.append((len(logits), count)) or real(logits, count)
    )
    few = [SamplingParams(temperature=1.0, top_k=k, top_p=0.9) for k in (1, 5, 20, 50)]
    all_kinds = [*few, SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(), SamplingParams(temperature=1.0)]
    all_kinds.append(SamplingParams(temperature=1.0, top_k=900))
    logits = torch.randn(len(all_kinds), 4000, generator=torch.Generator().manual_seed(0))
    PLAIN.sample(logits, [SamplingRow(one, 1) for one in all_kinds])
    assert sizes == [(4, 50), (1, 4000), (1, 900)]


@pytest.mark.parametrize("num_prompt", [10, 10_000])
def test_a_plan_does_not_grow_with_what_was_said(num_prompt):
    params = SamplingParams(
        temperature=1.0, repetition_penalty=1.1, presence_penalty=0.1, logit_bias=dict.fromkeys(range(300), 1.0)
    )
    row = SamplingRow(params, 0, list(range(num_prompt)), list(range(num_prompt // 2)))
    plan = SamplingPlan.of([row] * 3, vocab_size=20_000, eos_ids=[2])
    assert sum(len(values) for values in vars(plan).values() if isinstance(values, list)) < 20
    table = Penalties()
    logits = torch.zeros(3, 20_000)
    table.apply(logits, plan.penalized, plan.requests)
    uploaded = []
    with pytest.MonkeyPatch.context() as patch:
        real = penalties.upload
        patch.setattr(
            penalties, "upload", lambda columns, device: uploaded.append(len(columns[0])) or real(columns, device)
        )
        row.generated.append(7)
        table.apply(logits, plan.penalized, plan.requests)
    assert uploaded == [1, 1]


# ---- random numbers ----


def test_splitmix64_gives_the_published_numbers():
    # The first outputs of the reference implementation for the state 1234567.
    states = [(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(3)]
    assert [splitmix64(s) for s in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_numbers_are_uniform_and_depend_on_both():
    streams = [[uniform(seed, index) for index in range(200)] for seed in range(200)]
    numbers = torch.tensor(streams, dtype=torch.float64)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers.flatten(), bins=50, min=0, max=1)
    expected = numbers.numel() / 50
    assert float(((counts - expected) ** 2 / expected).sum()) < 100  # 49 degrees of freedom
    assert numbers.flatten().unique().numel() == numbers.numel()
    correlations = torch.corrcoef(numbers) - torch.eye(200)
    assert float(correlations.abs().max()) < 0.35
    assert uniform(2**63 - 1, 10**6) != uniform(2**63 - 1, 10**6 + 1)


def test_frequencies_follow_the_distribution():
    probs = torch.tensor([0.6, 0.3, 0.1])
    n = 4000
    rows = [SamplingRow(SamplingParams(temperature=1.0), 3, (), range(i)) for i in range(n)]
    ids, _ = PLAIN.sample(probs.log().expand(n, -1), rows)
    counts = torch.bincount(torch.tensor(ids), minlength=3) / n
    assert torch.allclose(counts, probs, atol=0.03)


# ---- how it runs ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=2, top_p=0.5, logprobs=2)])
def test_logits_that_are_not_finite_give_no_token_and_leave_the_other_rows_as_they_are(bad, params):
    sound = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    ids, entries = PLAIN.sample(sound, [SamplingRow(params, 0)] * 3)
    for place in range(3):
        logits = sound.clone()
        logits[1, place] = bad
        got_ids, got_entries = PLAIN.sample(logits, [SamplingRow(params, 0)] * 3)
        assert got_ids == [ids[0], None, ids[2]]
        assert (got_entries[0], got_entries[2]) == (entries[0], entries[2])


def test_counts_that_disagree_are_an_error():
    with pytest.raises(ValueError, match="2 rows of logits for 1 requests"):
        PLAIN.sample(torch.zeros(2, 3), [SamplingRow(SamplingParams(), 0)])


EVERYTHING = SamplingParams(
    temperature=0.7,
    top_k=5,
    top_p=0.8,
    min_p=0.1,
    presence_penalty=0.5,
    repetition_penalty=1.1,
    logit_bias={1: 2.0},
    logprobs=2,
)


@pytest.mark.parametrize(
    "params",
    [[SamplingParams()], [EVERYTHING], [SamplingParams(), EVERYTHING], [SamplingParams(temperature=1, top_p=0.5)]],
)
def test_the_host_waits_for_nothing_but_the_result(params):
    """Fake tensors have no values: whatever asks for one on the way (`.item()`, a mask as an index, ..) raises."""
    rows = [SamplingRow(p, 1, [3, 4], [5]) for p in params]
    plan = SamplingPlan.of(rows, vocab_size=40, eos_ids=[2])
    with FakeTensorMode():
        sampler = Sampler(banned_ids=[7], eos_ids=[2])
        packed = sampler.run(torch.empty(len(rows), 40), plan)
        with pytest.raises(DataDependentOutputException):
            packed[0].item()
    assert packed.ndim == 1
    real = Sampler(banned_ids=[7], eos_ids=[2]).run(torch.randn(len(rows), 40), plan)
    assert real.shape == packed.shape
    assert len(unpack(real.tolist(), plan)[0]) == len(rows)


@pytest.mark.gpu
def test_one_wait_on_a_gpu():
    rows = [SamplingRow(p, 1, [3, 4], [5]) for p in (SamplingParams(), EVERYTHING)]
    sampler = Sampler(banned_ids=[7], eos_ids=[2])
    logits = torch.randn(2, 1000)
    plan = SamplingPlan.of(rows, vocab_size=1000, eos_ids=[2])
    sampler.run(logits.cuda(), plan)  # the banned ids go there once
    on_device = logits.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = sampler.run(on_device, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert unpack(packed.tolist(), plan)[0] == sampler.sample(logits, rows)[0]
