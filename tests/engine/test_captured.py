"""Decode steps from a tape, bit by bit against those that come from Python; and that nothing is recorded twice."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine import captured as captured_module
from qwen3vl_disagg.engine.captured import StepInputs
from qwen3vl_disagg.engine.runner import ModelRunner
from qwen3vl_disagg.kernels import build
from qwen3vl_disagg.kernels.calls import Tape
from qwen3vl_disagg.model.config import YarnScaling
from qwen3vl_disagg.model.kernels import use_kernels
from tests.engine.test_page_tables import make_sequence
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.quantize import quantize_
from tests.support.random_model import random_language_model, small_config

needs_kernels = pytest.mark.skipif(build.load() is None, reason="no AVX-512 BF16 or no C++ compiler")
SIZES = {"hidden_size": 64, "num_experts": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
KINDS = ("experts", "dense", "int8", "yarn")


def model_of(kind: str, dtype: torch.dtype = torch.bfloat16):
    config = small_config()
    text = replace(config.text, **SIZES, moe_intermediate_size=32, intermediate_size=96, mrope_section=(12, 10, 10))
    if kind == "dense":
        text = replace(text, num_experts=0)
    if kind == "yarn":
        text = replace(text, yarn=YarnScaling(factor=4.0, original_max_position_embeddings=128, attention_factor=1.1))
    vision = replace(config.vision, out_hidden_size=64)
    model = random_language_model(replace(config, text=text, vision=vision, dtype="bfloat16"), seed=1).to(dtype)
    return use_kernels(quantize_(model, "int8") if kind == "int8" else model)


def runners(kind: str, monkeypatch: pytest.MonkeyPatch, max_running: int = 9) -> tuple[ModelRunner, ModelRunner]:
    """From Python and from the tape, with the same random numbers in their pages."""
    model, both = model_of(kind), []
    for value in ("off", "on"):
        monkeypatch.setenv("Q3VL_CAPTURE", value)
        both.append(ModelRunner(model, num_pages=40, page_size=4, max_running=max_running))
        generator = torch.Generator().manual_seed(3)
        for pool in (pool for cache in both[-1].caches for pool in cache):
            pool.copy_(torch.randn(pool.shape, generator=generator))
    return both[0], both[1]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_equal_bits_for_all_sizes_and_mixes(kind, monkeypatch, threads):
    eager, captured = runners(kind, monkeypatch)
    assert eager.captured is None
    assert captured.captured is not None
    draw = random.Random(5)
    for size in [*range(1, 10), *(draw.randint(1, 9) for _ in range(20))]:
        pages, batch = draw.sample(range(40), 36), []
        for number in range(size):
            sequence = make_sequence(str(number))
            sequence.pages, pages = pages[:4], pages[4:]
            sequence.num_cached, sequence.delta = draw.randint(0, 15), draw.randint(-3, 300)
            sequence.generated.append(draw.randint(0, 71))
            batch.append(sequence)
        expected = eager.decode(batch).clone()
        assert torch.equal(captured.decode(batch), expected)
        assert expected.isfinite().all()
        for ours, theirs in zip(captured.caches, eager.caches, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


@needs_kernels
def test_more_rows_than_were_recorded_come_from_python(monkeypatch):
    monkeypatch.setattr(captured_module, "MAX_LINEAR_ROWS", 2)
    eager, captured = runners("dense", monkeypatch, max_running=3)
    batch = []
    for number in range(3):
        sequence = make_sequence(str(number))
        sequence.pages, sequence.num_cached, sequence.generated = [number], number, [5]
        batch.append(sequence)
    assert captured.captured is not None
    assert captured.captured.max_rows == 2
    assert torch.equal(captured.decode(batch), eager.decode(batch))


@needs_kernels
def test_nothing_is_recorded_while_requests_run(monkeypatch):
    """200 requests, with images, sampled or not, preempted now and then: the answers of an engine without a tape."""
    records, record = [], Tape.record
    monkeypatch.setattr(Tape, "record", lambda tape: records.append(tape) or record(tape))
    model, answers, num_preempted = model_of("experts"), [], []
    requests = make_requests(model, 200)
    for value in ("off", "on"):
        monkeypatch.setenv("Q3VL_CAPTURE", value)
        engine = make_engine(model, max_running=12, kv_cache_gib=0.00006)  # 20 pages
        sampling = {
            name: SamplingParams(max_new_tokens=2 + n % 9, temperature=float(n % 2), seed=n, ignore_eos=n % 3 == 0)
            for n, name in enumerate(requests)
        }
        assert (engine.runner.captured is None) == (value == "off")
        answers.append({name: token_ids(events) for name, events in run(engine, requests, sampling).items()})
        num_preempted.append(engine.scheduler.num_preempted)
    assert answers[0] == answers[1]
    assert len(records) == 1
    assert num_preempted[0] == num_preempted[1] > 0


@pytest.mark.parametrize("why", ["float32", "sdpa", "loop", "off"])
def test_what_is_not_captured_runs_from_python(why, monkeypatch, caplog):
    model = model_of("experts", torch.float32 if why == "float32" else torch.bfloat16)
    if why == "loop":
        for layer in model.model.layers:
            layer.mlp.experts.impl = "loop"
    if why == "off":
        monkeypatch.setenv("Q3VL_CAPTURE", "off")
    attention = "sdpa" if why == "sdpa" else "auto"
    with caplog.at_level("INFO"):
        runner = ModelRunner(model, num_pages=40, page_size=4, attention=attention, max_running=4)
    assert runner.captured is None
    assert ("not captured: aten" in caplog.text) == (why == "loop" and build.load() is not None)
    batch = make_sequence("0")
    batch.pages, batch.generated = [3], [5]
    assert runner.decode([batch]).isfinite().all()


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["grow", "leave", "end"]), st.integers(1, 9)), max_size=40),
    st.randoms(use_true_random=False),
)
@example([(0, "grow", 3), (0, "leave", 1), (0, "grow", 3)], random.Random(0))
def test_inputs_are_those_of_lists_whoever_comes_and_goes(changes, draw):
    inputs = StepInputs(6, 400, 4)
    sequences = {n: make_sequence(str(n)) for n in range(6)}
    next_page = 0
    for number, what, count in changes:
        sequence = sequences[number]
        if what == "grow":
            sequence.pages += range(next_page, next_page + count)
            next_page += count
            sequence.num_cached = draw.randrange(4 * len(sequence.pages))
            sequence.generated.append(draw.randrange(70))
        elif what == "leave":
            sequence.leave()
            sequence.num_preempted += 1
        else:
            sequences[number] = make_sequence(str(number))
        there = [one for one in sequences.values() if one.pages]
        draw.shuffle(there)
        inputs.fill(there)
        for b, one in enumerate(there):
            assert inputs.tables[b, : len(one.pages)].tolist() == one.pages
            place = one.num_cached
            assert inputs.ids[b] == one.generated[-1]
            assert inputs.positions[b] == place + one.delta
            assert inputs.contexts[b] == place + 1
            assert inputs.slots[b] == one.pages[place // 4] * 4 + place % 4
