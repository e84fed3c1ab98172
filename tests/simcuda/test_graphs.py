"""Decode steps as CUDA graphs on the simulated device: the CPU's tokens, for whoever comes, stays and goes."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine import graphs
from qwen3vl_disagg.engine.graphs import GraphedDecode, RowInputs
from qwen3vl_disagg.engine.runner import ModelRunner
from qwen3vl_disagg.engine.sampler import Sampler
from qwen3vl_disagg.engine.sampling import SamplingPlan, SamplingRow
from qwen3vl_disagg.kernels.compiling import GraphCounts
from qwen3vl_disagg.model import PagedBatch, flex, moe, paged
from qwen3vl_disagg.model.moe import DispatchPlan, Experts
from qwen3vl_disagg.parallel.dispatch import ExpertDispatcher
from tests.engine.test_page_tables import make_sequence
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.random_model import cuda_config, random_language_model
from tests.support.simcuda import D2H, H2D, STAGED, WAITS, Watch, simulated, to_device

PAGE = 16
COMMON = {
    "greedy": SamplingParams(max_new_tokens=9, ignore_eos=True),
    "ends": SamplingParams(max_new_tokens=40),
    "drawn": SamplingParams(max_new_tokens=14, temperature=0.9, top_k=7, top_p=0.8, seed=3),
    "later": SamplingParams(max_new_tokens=5, temperature=2.0, seed=4, min_tokens=4),
}
OTHERS = {
    "told": SamplingParams(max_new_tokens=6, logprobs=2),
    "penalized": SamplingParams(max_new_tokens=7, presence_penalty=1.5, logit_bias={5: 1.0}),
    "nucleus": SamplingParams(max_new_tokens=11, temperature=0.8, top_p=0.9, seed=8),
    "min_p": SamplingParams(max_new_tokens=4, temperature=1.2, min_p=0.05, seed=9),
    "narrowed": SamplingParams(max_new_tokens=5, allowed_token_ids=[11, 17, 23, 31]),
}


@functools.cache
def model():
    return random_language_model(cuda_config(), seed=0)


def on_device(watch: Watch):
    return to_device(copy.deepcopy(model()), watch)


def make_runner(watch: Watch, monkeypatch: pytest.MonkeyPatch, value: str, num_pages: int = 40) -> ModelRunner:
    """With the same random numbers in its pages each time."""
    monkeypatch.setenv("Q3VL_CAPTURE", value)
    runner = ModelRunner(on_device(watch), num_pages=num_pages, page_size=PAGE, max_running=9, compile=True)
    generator = torch.Generator().manual_seed(3)
    for pool in (pool for cache in runner.caches for pool in cache):
        pool.elem[: num_pages * PAGE] = torch.randn(num_pages * PAGE, *pool.shape[1:], generator=generator)
    return runner


def test_each_number_of_rows_computes_what_the_step_from_python_does(monkeypatch):
    """Logits, and what is written into the pages, all of which belong to somebody."""
    draw = random.Random(5)
    with simulated() as watch:
        eager, captured = (make_runner(watch, monkeypatch, value) for value in ("off", "on"))
        assert eager.captured is None
        assert isinstance(captured.captured, GraphedDecode)
        assert captured.captured.sizes == [1, 2, 4, 8, 9]
        for size in [*range(1, 10), *(draw.randint(1, 9) for _ in range(12))]:
            pages, batch = draw.sample(range(40), 40), []
            for number in range(size):
                sequence = make_sequence(str(number))
                sequence.num_cached, sequence.delta = draw.randint(0, 4 * PAGE - 1), draw.randint(-3, 300)
                count = sequence.num_cached // PAGE + 1
                sequence.pages, pages = pages[:count], pages[count:]
                sequence.generated.append(draw.randint(0, 71))
                batch.append(sequence)
            expected = eager.decode(batch).elem.clone()
            found = captured.decode(batch).elem
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            for ours, theirs in zip(captured.caches, eager.caches, strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(one.elem[: 40 * PAGE], other.elem, atol=1e-5, rtol=1e-5)
        assert watch.graphs.num_replays == 21
        assert not watch.problems


def note_sizes(decode: GraphedDecode) -> list[int]:
    """Rows of each graph that is replayed from now on."""
    sizes, replay = list[int](), decode.graphs.replay
    decode.graphs.replay = lambda size: sizes.append(size) or replay(size)
    return sizes


def mixed(count: int) -> tuple[dict, dict[str, SamplingParams]]:
    requests = make_requests(model(), count)
    kinds = [*COMMON.values(), *COMMON.values(), *OTHERS.values()]
    return requests, {name: kinds[n % len(kinds)] for n, name in enumerate(requests)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_of_requests_that_come_and_go(dtype):
    """More of them than run at once, of all kinds, with images, so that the number of rows goes up and down."""
    requests, sampling = mixed(20)
    options = {"page_size": PAGE, "max_running": 6}
    reference = copy.deepcopy(model()).to(dtype)
    wanted = {
        name: token_ids(events)
        for name, events in run(make_engine(reference, attention="sdpa", **options), requests, sampling).items()
    }
    with simulated() as watch:
        engine = make_engine(to_device(copy.deepcopy(model()).to(dtype), watch), compile=True, **options)
        sizes = note_sizes(engine.runner.captured)
        found = {name: token_ids(events) for name, events in run(engine, requests, sampling).items()}
    assert not watch.problems, str(watch)
    if dtype == torch.float32:
        assert found == wanted
    else:  # other kernels than the CPU's, so now and then another rounding decides
        assert sum(found[name] == wanted[name] for name in wanted) >= 16
    assert len({*sizes}) >= 3


def test_a_step_waits_once_and_asks_nothing_of_the_host_meanwhile():
    requests = make_requests(model(), 4)
    kinds = list(COMMON.values())
    with simulated() as watch:
        engine = make_engine(on_device(watch), compile=True, page_size=PAGE, max_running=4)
        ran: list[str] = []
        pick = engine.sampler.captured.ids
        engine.sampler.captured.ids = lambda *args: ran.append("decode") or pick(*args)
        for (name, (ids, items, _)), params in zip(requests.items(), kinds, strict=True):
            if not items:
                engine.add(name, ids, items, params)
        seen = []
        while not engine.is_empty:
            watch.reset()
            before = watch.graphs.num_replays
            engine.step()
            if ran:
                ran.clear()
                seen.append((watch.of(*WAITS), watch.of(D2H), watch.of(H2D, STAGED), watch.graphs.num_replays - before))
    assert len(seen) >= 5
    assert {(1, 0, 0, 1), (1, 0, 0, 2), (1, 0, 0, 3)} == set(seen)  # the sampler's graph, and one or two of the model


def rows_of(draw, vocab_size: int) -> list[SamplingRow]:
    number = st.integers(0, 2**40)
    drawn = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
        top_k=st.integers(1, 64),
        top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
        ignore_eos=st.booleans(),
    )
    free = st.builds(SamplingParams, temperature=st.floats(0.1, 3.0), min_tokens=st.sampled_from([0, 2]))
    return [SamplingRow(draw(st.one_of(drawn, free)), draw(number)) for _ in range(draw(st.integers(1, 6)))]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), vocab_size=st.sampled_from([72, 400]), seed=st.integers(0, 2**30))
def test_picks_of_fixed_size_are_those_of_the_sampler(data, vocab_size, seed):
    """Token for token, with ties, end tokens that may not come, and rows that are not finite."""
    rows = rows_of(data.draw, vocab_size)
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    if data.draw(st.booleans()):
        logits = logits.round()
    if data.draw(st.booleans()):
        logits[0, 5] = data.draw(st.sampled_from([float("nan"), float("inf")]))
    sampler = Sampler(banned_ids=[60, 61], eos_ids=[1, 9])
    plan = SamplingPlan.of(rows, vocab_size=vocab_size, eos_ids=sampler.eos_ids)
    assert all(row.needs_few for row in rows)
    columns = torch.tensor([row.few_settings for row in rows], dtype=torch.float64).T
    draws = any(not row.is_greedy for row in rows)
    expected = sampler.run(logits, plan)
    found = sampler.run_few(logits, columns, draws=draws)
    is_finite = found[: len(rows)].bool()
    assert torch.equal(found[: len(rows)], expected[: len(rows)])
    assert torch.equal(found[len(rows) :][is_finite], expected[len(rows) :][is_finite])


@pytest.mark.parametrize("name", OTHERS)
def test_what_few_of_the_largest_do_not_say(name):
    assert not SamplingRow(OTHERS[name], 0).needs_few


def test_unused_rows_are_one_token_in_a_page_of_their_own():
    sequences = [make_sequence(str(n)) for n in range(2)]
    for number, sequence in enumerate(sequences):
        sequence.pages, sequence.num_cached, sequence.generated = [7 + number, 3], 20, [5]
    with simulated() as watch:
        inputs = RowInputs(4, 6, PAGE, 40, torch.device("cuda", 0))
        inputs.fill(sequences, 4)
        found = inputs.of(4).elem
        assert found.shape == (10, 4)
        assert found[:6, 1].tolist() == [5, 20 + sequences[1].delta, 21, 3 * PAGE + 4, 8, 3]
        for row in (2, 3):
            assert found[:6, row].tolist() == [0, 0, 1, 40 * PAGE, 40, 0]
        inputs.fill(sequences[1:], 1)
        assert inputs.of(1).elem[:6, 0].tolist() == [5, 20 + sequences[1].delta, 21, 3 * PAGE + 4, 8, 3]
        assert watch.of(*WAITS) == 0


# ---- what is not captured ----


def test_a_pool_that_is_used_up_costs_the_largest_graphs(monkeypatch, caplog):
    of_tensors = graphs.PagedBatch.of_tensors

    def scarce(contexts_R, *args):
        if len(contexts_R) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return of_tensors(contexts_R, *args)

    monkeypatch.setattr(graphs.PagedBatch, "of_tensors", scarce)
    requests, sampling = mixed(9)
    wanted = {
        name: token_ids(events)
        for name, events in run(make_engine(model(), page_size=PAGE, max_running=9), requests, sampling).items()
    }
    with simulated() as watch:
        engine = make_engine(on_device(watch), compile=True, page_size=PAGE, max_running=9)
        assert engine.runner.captured.sizes == [1, 2, 4]
        assert engine.runner.captured.size_for(5, None) is None
        found = {name: token_ids(events) for name, events in run(engine, requests, sampling).items()}
        assert watch.graphs.num_replays > 0
    assert found == wanted
    assert caplog.text.count("no memory to capture decode steps of") == 2


def test_a_loop_over_experts_is_not_captured(monkeypatch, caplog):
    row_bytes = 3 * 32 * 32 * 4
    monkeypatch.setattr(moe, "MAX_GATHERED_BYTES", 2 * 2 * row_bytes)  # of two tokens
    with simulated() as watch, caplog.at_level("INFO"):
        runner = make_runner(watch, monkeypatch, "on")
        assert runner.captured.sizes == [1, 2]
        assert not watch.problems
    assert "of more than 2 rows are not captured: experts wait" in caplog.text


@pytest.mark.parametrize("why", ["off", "attention", "not compiled"])
def test_what_runs_from_python(why, monkeypatch):
    monkeypatch.setenv("Q3VL_CAPTURE", "off" if why == "off" else "on")
    with simulated() as watch:
        attention = "sdpa" if why == "attention" else "auto"
        options = {"num_pages": 40, "page_size": PAGE, "max_running": 2, "attention": attention}
        runner = ModelRunner(on_device(watch), compile=why != "not compiled", **options)
        assert runner.captured is None
        assert len(runner.caches[0][0]) == 40 * PAGE


# ---- experts over ranks ----


class Alone:
    """Collectives of one rank."""

    rank, num_ranks = 0, 1

    def __init__(self, *, has_native: bool) -> None:
        self.has_native = has_native

    def all_gather(self, x_SC):
        return x_SC.clone()

    def reduce_scatter(self, x_SC):
        return x_SC.clone()


class WholeDispatcher(ExpertDispatcher):
    def local(self, weight):
        return weight


@pytest.mark.parametrize("has_native", [True, False])
def test_ranks_replay_the_size_that_they_agreed_on(has_native, monkeypatch, caplog):
    """Where the exchange is the device's. Rows of this rank are padded to it; for a size that no rank decodes alone, as
    while another one prefills, and where the host makes the exchange, the step comes from Python."""
    with simulated() as watch, caplog.at_level("INFO"):
        spread = on_device(watch)
        for part in spread.modules():
            if isinstance(part, Experts):
                part.dispatcher = WholeDispatcher(Alone(has_native=has_native), cuda_config().text.num_experts)
        runner = ModelRunner(spread, num_pages=40, page_size=PAGE, max_running=5, compile=True)
        assert (runner.captured is not None) == has_native
        assert ("spread over ranks by Gloo" in caplog.text) == (not has_native)
        batch = make_sequence("0")
        batch.pages, batch.generated = [3], [5]
        plain = make_runner(watch, monkeypatch, "off")
        for pool in (pool for cache in plain.caches for pool in cache):
            pool.zero_()
        expected = plain.decode([batch]).elem.clone()
        sizes = note_sizes(runner.captured) if has_native else []
        for num_rows in (2, 4, 8, 96):
            found = runner.decode([batch], DispatchPlan(num_rows))
            torch.testing.assert_close(found.elem, expected, atol=1e-5, rtol=1e-5)
        assert sizes == ([2, 4, 8] if has_native else [])
        if has_native:
            assert runner.captured.sizes == [2, 4, 8]
            assert runner.captured.size_for(1, DispatchPlan(2, "all_to_all")) is None
            assert runner.captured.size_for(1, None) is None


def test_a_rank_that_lacks_memory_for_graphs_leaves_nobody_waiting_within_a_step(monkeypatch):
    """The others are in its collectives: with fewer graphs here they would wait for ever, or meet another size."""

    def scarce(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(graphs.PagedBatch, "of_tensors", scarce)
    with simulated() as watch:
        spread = on_device(watch)
        for part in spread.modules():
            if isinstance(part, Experts):
                part.dispatcher = WholeDispatcher(Alone(has_native=True), cuda_config().text.num_experts)
        with pytest.raises(torch.OutOfMemoryError):
            ModelRunner(spread, num_pages=40, page_size=PAGE, max_running=5, compile=True)


# ---- compiled layers ----


def test_a_captured_step_needs_no_graph_of_the_compiler_of_its_own(monkeypatch):
    """Its lists are made on the device, but look to compiled layers as those of a step from Python."""
    attend = flex.flex_attend
    monkeypatch.setattr(paged, "flex_kind", lambda _, *args, **sizes: flex.flex_kind("cuda", *args, **sizes))
    monkeypatch.setattr(flex, "compiled_attention", lambda _: lambda q, *_: torch.zeros_like(q))
    monkeypatch.setattr(flex, "flex_attend", lambda q, k, v, kind, lists: attend(q, k, v, on_cuda(kind), lists))
    torch._dynamo.reset()
    decoder = copy.deepcopy(model())
    step = decoder.model.step
    decoder.model.step = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    caches = [(torch.zeros(8 * PAGE, 2, 16), torch.zeros(8 * PAGE, 2, 16)) for _ in decoder.model.layers]
    before = GraphCounts.now()
    with torch.inference_mode():
        for lens in ([1], [7], [13], *([1] * size for size in (2, 4, 8))):
            batch = PagedBatch(lens, lens, torch.zeros(len(lens), 1).long(), PAGE, caches, impl="flex")
            batch.dispatch_plan = None
            decoder(torch.zeros(sum(lens)).long(), torch.zeros(3, sum(lens)).long(), batch)
        made = GraphCounts.now().since(before)
        assert made.graphs > 0
        for size in (8, 7, 3, 2, 1):
            rows = torch.ones(2, size).long().unbind(0)
            batch = PagedBatch.of_tensors(rows[0], torch.zeros(size, 5).int(), rows[1], PAGE, caches)
            batch.dispatch_plan = None
            decoder(torch.zeros(size).long(), torch.zeros(3, size).long(), batch)
        assert GraphCounts.now().since(before) == made
    torch._dynamo.reset()


def on_cuda(kind: flex.FlexKind) -> flex.FlexKind:
    return replace(kind, device="cuda")
