"""Numbers that are not finite fail the request they belong to, and nobody who shares a batch or a page with it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import msgspec
import pytest
import torch

from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams
from qwen3vl_disagg.engine.engine import Engine
from qwen3vl_disagg.kernels import ops
from qwen3vl_disagg.model.kernels import use_kernels
from qwen3vl_disagg.model.moe import SparseMoe
from qwen3vl_disagg.protocol.messages import Finished, RequestFailed
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.random_model import random_language_model, small_config

POISON = 69
"""A token whose embedding is not finite; no prompt has it unless it is put there, and nobody ends with it."""
GREEDY = SamplingParams(max_new_tokens=6, logprobs=2, logit_bias={POISON: -100.0})
SAMPLED = msgspec.structs.replace(GREEDY, temperature=1.0, top_k=20, top_p=0.9, seed=3)
NEEDS_KERNELS = pytest.mark.skipif(not ops.is_cpu_bf16(torch.zeros(1, dtype=torch.bfloat16)), reason="no kernels")


def poisoned_model(*, bf16: bool = False, value: float = math.nan):
    config = small_config()
    if bf16:
        text = replace(config.text, hidden_size=64, head_dim=64, mrope_section=(12, 10, 10), moe_intermediate_size=32)
        config = replace(config, text=text, vision=replace(config.vision, out_hidden_size=64))
    model = random_language_model(config, seed=0)
    model = use_kernels(model.to(torch.bfloat16)) if bf16 else model
    model.model.embed_tokens.weight.data[POISON] = value
    return model


MODEL = poisoned_model()
REQUESTS = make_requests(MODEL, 7)


def poison(request, place: int):
    """The same request with one token of its text exchanged; a negative place counts from the end."""
    ids, items, rows = request
    visual = {i for item in items for i in range(item.offset, item.stop)}
    texts = [i for i in range(len(ids)) if i not in visual]
    ids = list(ids)
    ids[texts[place]] = POISON
    return ids, items, rows


def check_failed(events) -> None:
    failed = events[-1]
    assert isinstance(failed, RequestFailed)
    assert (failed.failure.status, failed.failure.code) == (500, "engine_error")
    assert "nan" not in failed.failure.message.lower()
    assert "finite" not in failed.failure.message


def check_clean(engine: Engine, free: int) -> None:
    assert engine.is_empty
    assert engine.scheduler.pool.num_free == free
    assert all(pool.isfinite().all() for layer in engine.runner.caches for pool in layer)


@pytest.mark.parametrize("impl", ["sdpa", pytest.param("kernel", marks=NEEDS_KERNELS)])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("options", [{"max_prefill_tokens": 200, "max_running": 8}, {"max_prefill_tokens": 5}])
def test_one_of_a_batch_fails_alone(impl, sampling, options):
    """In prefill, whole and in chunks, wherever its token stands; the pages are clean and serve again."""
    model = MODEL if impl == "sdpa" else poisoned_model(bf16=True, value=math.inf)
    requests = make_requests(model, 7)
    expected = run(make_engine(model, attention=impl, **options), requests, sampling)
    bad = {"r1": 0, "r3": 2, "r5": -1}
    mixed = {n: poison(request, bad[n]) if n in bad else request for n, request in requests.items()}
    engine = make_engine(model, attention=impl, **options)
    free = engine.scheduler.pool.num_free
    events = run(engine, mixed, sampling)
    for name in requests:
        if name in bad:
            check_failed(events[name])
            assert not token_ids(events[name])
        else:
            assert isinstance(events[name][-1], Finished)
            assert token_ids(events[name]) == token_ids(expected[name])
    check_clean(engine, free)
    again = run(engine, requests, sampling)
    assert {n: token_ids(e) for n, e in again.items()} == {n: token_ids(e) for n, e in expected.items()}


@pytest.mark.parametrize("impl", ["sdpa", pytest.param("kernel", marks=NEEDS_KERNELS)])
def test_one_of_a_decode_step_fails_alone(impl):
    """Its first token is the one that the model cannot read."""
    model = MODEL if impl == "sdpa" else poisoned_model(bf16=True)
    requests = make_requests(model, 4)
    expected = run(make_engine(model, attention=impl), requests, GREEDY)
    engine = make_engine(model, attention=impl)
    free = engine.scheduler.pool.num_free
    forced = msgspec.structs.replace(GREEDY, logit_bias={POISON: 100.0})
    events = run(engine, requests, {name: forced if name == "r2" else GREEDY for name in requests})
    check_failed(events["r2"])
    assert token_ids(events["r2"]) == [POISON]
    for name in requests.keys() - {"r2"}:
        assert token_ids(events[name]) == token_ids(expected[name])
    check_clean(engine, free)


@pytest.mark.parametrize("impl", ["sdpa", pytest.param("kernel", marks=NEEDS_KERNELS)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_nobody_wrote_does_not_matter(impl, value):
    model = MODEL if impl == "sdpa" else poisoned_model(bf16=True)
    requests = make_requests(model, 5)
    expected = run(make_engine(model, attention=impl), requests, GREEDY)
    engine = make_engine(model, attention=impl)
    for keys, values in engine.runner.caches:
        keys.fill_(value)
        values.fill_(value)
    events = run(engine, requests, GREEDY)
    assert {n: token_ids(e) for n, e in events.items()} == {n: token_ids(e) for n, e in expected.items()}


def test_a_failed_prompt_leaves_nothing_in_the_prefix_cache():
    """Rows that are not finite, once: the same request with sound rows is answered as if they had never been."""
    name = "r1"
    ids, items, rows = REQUESTS[name]
    expected = run(make_engine(MODEL), {name: REQUESTS[name]}, GREEDY)
    broken = replace(rows[0], main=tuple((first, piece * math.nan) for first, piece in rows[0].main))
    for tokens in (3, 8, 100):  # the rows are all in a middle chunk, or in the last one
        engine = make_engine(MODEL, max_prefill_tokens=tokens)
        free = engine.scheduler.pool.num_free
        events = run(engine, {name: (ids, items, [broken])}, GREEDY)
        check_failed(events[name])
        check_clean(engine, free)
        assert token_ids(run(engine, {name: REQUESTS[name]}, GREEDY)[name]) == token_ids(expected[name])


@pytest.mark.parametrize("tokens", [3, 100])
def test_the_last_layer_of_other_tokens_is_nobodys_concern(tokens):
    """What a token becomes after its last key and value is read by nobody, wherever chunks are cut."""
    model = copy.deepcopy(MODEL)
    request = {"r3": REQUESTS["r3"]}
    expected = run(make_engine(model), request, SamplingParams(max_new_tokens=1))
    last, num_left = model.model.layers[-1].mlp, len(REQUESTS["r3"][0])
    assert isinstance(last, SparseMoe)
    forward = last.forward

    def breaks(x_TD, plan=None):
        nonlocal num_left
        y_TD, num_left = forward(x_TD, plan), num_left - len(x_TD)
        return torch.cat([y_TD[:-1] * math.inf, y_TD[-1:] if num_left == 0 else y_TD[-1:] * math.nan])

    last.forward = breaks
    events = run(make_engine(model, max_prefill_tokens=tokens), request, SamplingParams(max_new_tokens=1))
    assert token_ids(events["r3"]) == token_ids(expected["r3"])


def test_the_last_layer_but_one_is():
    """Its output is the last layer's keys and values."""
    model = copy.deepcopy(MODEL)
    layer = model.model.layers[-2].mlp
    forward = layer.forward
    layer.forward = lambda x_TD, plan=None: torch.cat([forward(x_TD, plan)[:1] * math.inf, forward(x_TD, plan)[1:]])
    ids, items, _ = REQUESTS["r3"]
    engine = make_engine(model, max_prefill_tokens=3)
    engine.add("r3", ids, items, GREEDY)
    check_failed(engine.step())
    check_clean(engine, engine.scheduler.pool.num_pages)


def test_a_batch_that_raises_leaves_clean_pages(monkeypatch):
    engine = make_engine(MODEL)
    free = engine.scheduler.pool.num_free
    ids, items, _ = REQUESTS["r0"]
    engine.add("r0", ids, items, GREEDY)

    def fail(*args: object) -> None:
        for keys, _ in engine.runner.caches:
            keys[engine.scheduler.admitted["r0"].pages[0] * 4] = math.nan
        raise RuntimeError("in the middle of a step")

    monkeypatch.setattr(engine.runner, "prefill", fail)
    check_failed(engine.step())
    check_clean(engine, free)


def test_rows_that_do_not_fit_and_numbers_that_are_not_finite_in_one_step():
    name, narrow = "r1", REQUESTS["r4"]
    ids, items, rows = narrow
    cut = [replace(whole, main=tuple((start, piece[:, :5]) for start, piece in whole.main)) for whole in rows]
    requests = {name: poison(REQUESTS[name], 1), "r4": (ids, items, cut), "r2": REQUESTS["r2"]}
    engine = make_engine(MODEL, max_prefill_tokens=200, prefix_cache=False)
    for key, (tokens, found, _) in requests.items():
        engine.add(key, tokens, found, GREEDY)
    engine.admit()
    for key, (_, found, given) in requests.items():
        for index in range(len(found)):
            engine.provide_rows(key, index, given[index], ItemTimings())
    events = engine.step()
    failed = {event.request_id for event in events if isinstance(event, RequestFailed)}
    assert failed == {name, "r4"}
    assert [*engine.scheduler.admitted] == ["r2"]
