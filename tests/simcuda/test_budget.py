"""How often the host waits for the device: in a step of the engine once, and never for an upload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker, LeavingItem, Pixels
from qwen3vl_disagg.engine.engine import Engine
from qwen3vl_disagg.protocol.messages import NeedItems, RequestFailed
from qwen3vl_disagg.transport.buffers import VisualRows
from tests.support.engine import make_engine, make_requests
from tests.support.random_model import cuda_config, random_language_model, random_vision_model
from tests.support.simcuda import D2H, DEVICE, EVENT, H2D, ITEM, LATE, SHAPE, STAGED, WAITS, Watch, simulated, to_device

SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=6, temperature=0.0),
    "drawn": SamplingParams(max_new_tokens=6, temperature=0.7, top_k=5, top_p=0.8, seed=3),
    "told": SamplingParams(max_new_tokens=6, temperature=0.0, logprobs=2),
    "penalized": SamplingParams(max_new_tokens=6, presence_penalty=1.5, repetition_penalty=1.2, logit_bias={5: 1.0}),
    "narrowed": SamplingParams(max_new_tokens=6, allowed_token_ids=tuple(range(10, 40)), bad_words=((12,),)),
}


def there(rows: VisualRows, dtype: torch.dtype) -> VisualRows:
    """On the device, as they are in the buffers of a language rank."""
    parts = {
        name: tuple((first, piece.to(DEVICE, dtype)) for first, piece in getattr(rows, name))
        for name in ("main", "deepstack")
    }
    return replace(rows, **parts)


def run_steps(engine: Engine, watch: Watch, sampling: Sequence[SamplingParams]) -> dict[str, list[Counter]]:
    """Run requests, with images, to their end. What was seen in each step, by what kind of step it was."""
    ran: list[str] = []
    for kind in ("prefill", "decode"):
        run = getattr(engine.runner, kind)
        setattr(engine.runner, kind, lambda *args, kind=kind, run=run: ran.append(kind) or run(*args))
    requests = make_requests(engine.runner.model, len(sampling))
    for (name, (ids, items, _)), params in zip(requests.items(), sampling, strict=True):
        engine.add(name, ids, items, params)
    seen: dict[str, list[Counter]] = {"prefill": [], "decode": []}
    while not engine.is_empty:
        watch.reset()
        events = engine.step()
        if ran:
            seen[ran.pop()].append(watch.counts)
        assert not watch.problems
        for event in events:
            assert not isinstance(event, RequestFailed)
            if isinstance(event, NeedItems):
                for index in event.items:
                    rows = there(requests[event.request_id][2][index], engine.runner.dtype)
                    engine.provide_rows(event.request_id, index, rows, ItemTimings())
    return seen


def total(counts: Counter, *kinds: str) -> int:
    return sum(number for (kind, _), number in counts.items() if kind in kinds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compile", [True, False])
def test_a_step_waits_for_its_tokens_alone(dtype, compile):
    with simulated() as watch:
        model = to_device(random_language_model(cuda_config(), seed=0).to(dtype), watch)
        engine = make_engine(model, page_size=16, compile=compile, max_running=5, max_prefill_tokens=90)
        assert engine.runner.impl == ("flex" if compile else "sdpa")
        seen = run_steps(engine, watch, list(SAMPLING.values()))
    assert len(seen["decode"]) >= 5
    for number, counts in enumerate(seen["decode"]):
        assert total(counts, H2D, STAGED) == 0, (number, counts)
        assert total(counts, *WAITS) == 1, (number, counts)
    for counts in seen["prefill"][1:]:  # the first uploads what stays
        assert total(counts, H2D, STAGED) == 0, counts


def test_a_batch_of_images_is_waited_for_once():
    with simulated() as watch:
        config = cuda_config()
        model = to_device(random_vision_model(config, seed=0).to(torch.bfloat16), watch)
        worker = EncodeWorker(model, None, config)
        grids = [(1, 4, 6), (1, 8, 8), (1, 4, 6)]
        pixels = [Pixels(torch.randn(h * w, config.vision.patch_dim), (t, h, w), 0.0) for t, h, w in grids]
        watch.reset()
        leaving = worker.encode(pixels, [60] * 3)
        counts, num_bytes = watch.counts.copy(), watch.bytes_of(LATE)
        assert all(isinstance(item, LeavingItem) for item in leaving)
        items = [item.arrived() for item in leaving]
        digests = [item.digest for item in items]
        assert total(watch.counts, D2H) == 0, "the bytes that came are digested"
        problems = watch.problems
    assert all(isinstance(item, EncodedItem) for item in items)
    assert len(set(digests)) == 3
    assert not problems
    assert total(counts, H2D, D2H, STAGED, SHAPE, ITEM) == 0, counts
    assert total(counts, *WAITS) == total(counts, EVENT) == 1, counts
    assert num_bytes == 3 + sum(item.main.nbytes + item.deepstack.nbytes for item in items), "each row once"
