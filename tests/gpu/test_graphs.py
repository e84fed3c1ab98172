"""Captured decode steps on CUDA in bfloat16: the logits of the step from Python, and no wait but for the tokens."""

from __future__ import annotations

import random

import pytest
import torch

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.graphs import GraphedDecode
from qwen3vl_disagg.engine.runner import ModelRunner
from tests.engine.test_page_tables import make_sequence
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.random_model import cuda_config, random_language_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PAGE, NUM_PAGES = 64, 60


def cuda_model():
    return random_language_model(cuda_config(), seed=0).to(device="cuda", dtype=torch.bfloat16)


def test_logits_and_pages_are_those_of_the_step_from_python(monkeypatch):
    model, both = cuda_model(), []
    for value in ("off", "on"):
        monkeypatch.setenv("Q3VL_CAPTURE", value)
        both.append(ModelRunner(model, num_pages=NUM_PAGES, page_size=PAGE, max_running=12, compile=True))
        generator = torch.Generator("cuda").manual_seed(3)
        for pool in (pool for cache in both[-1].caches for pool in cache):
            pool[: NUM_PAGES * PAGE].normal_(generator=generator)
    eager, captured = both
    assert isinstance(captured.captured, GraphedDecode)
    draw = random.Random(5)
    for size in [*range(1, 13), *(draw.randint(1, 12) for _ in range(20))]:
        pages, batch = draw.sample(range(NUM_PAGES), NUM_PAGES), []
        for number in range(size):
            sequence = make_sequence(str(number))
            sequence.num_cached, sequence.delta = draw.randint(0, 5 * PAGE - 1), draw.randint(-3, 300)
            count = sequence.num_cached // PAGE + 1
            sequence.pages, pages = pages[:count], pages[count:]
            sequence.generated.append(draw.randint(0, 71))
            batch.append(sequence)
        expected = eager.decode(batch).clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = captured.decode(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(found, expected, atol=5e-2, rtol=5e-2)
        for ours, theirs in zip(captured.caches, eager.caches, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one[: NUM_PAGES * PAGE], other, atol=5e-2, rtol=5e-2)


def test_an_engine_answers_all_kinds_of_requests(monkeypatch):
    """With steps captured and ahead of the host each time the same, and what steps from Python give; in bfloat16 other
    kernels round otherwise, which now and then decides."""
    requests = make_requests(cuda_model(), 9)
    for _, items, rows in requests.values():
        for index in range(len(items)):
            parts = {
                name: tuple((start, piece.cuda().bfloat16()) for start, piece in getattr(rows[index], name))
                for name in ("main", "deepstack")
            }
            rows[index] = type(rows[index])(1, 0, rows[index].stop, parts["main"], parts["deepstack"])
    kinds = [
        SamplingParams(max_new_tokens=8, ignore_eos=True),
        SamplingParams(max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.8, seed=3, ignore_eos=True),
        SamplingParams(max_new_tokens=5, logprobs=2, ignore_eos=True),
    ]
    sampling = {name: kinds[n % 3] for n, name in enumerate(requests)}
    answers = []
    for value in ("off", "on", "on"):
        monkeypatch.setenv("Q3VL_CAPTURE", value)
        engine = make_engine(cuda_model(), compile=True, page_size=PAGE, max_running=5)
        answers.append({name: token_ids(events) for name, events in run(engine, requests, sampling).items()})
    assert answers[1] == answers[2]
    assert sum(answers[0][name] == answers[1][name] for name in requests) >= 6
    assert {len(ids) for ids in answers[0].values()} == {5, 8, 12}
