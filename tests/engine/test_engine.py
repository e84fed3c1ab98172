"""The engine over a small random model: its tokens against plain recomputation, batches, cancels, failures."""

from dataclasses import replace

import pytest
import torch

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams
from qwen3vl_disagg.engine.engine import Engine
from qwen3vl_disagg.model import ForwardBatch, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.processing import mrope_positions
from qwen3vl_disagg.protocol.messages import Finished, NeedItems, RequestFailed, Tokens
from tests.support.engine import make_engine, make_item, make_requests, run, token_ids, without_deepstack
from tests.support.random_model import IMAGE_TOKEN, random_language_model, small_config

GREEDY = SamplingParams(max_new_tokens=6, logprobs=2)


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLMWithDeepStack:
    return random_language_model(small_config(), seed=0)


@torch.inference_mode()
def recompute(model, ids, items, rows, num_new: int) -> list[int]:
    """Greedy tokens, each by running the whole sequence again without any cache."""
    ids = list(ids)
    for _ in range(num_new):
        tokens = torch.tensor(ids)
        embeds = model.model.embed_tokens(tokens)
        deepstack = torch.zeros(len(ids), model.config.num_deepstack_levels * embeds.shape[1])
        for item, row in zip(items, rows, strict=True):
            where = slice(item.offset, item.offset + item.num_rows)
            row.write(0, item.num_rows, embeds[where], deepstack[where])
        positions, _ = mrope_positions(len(ids), items, 2)
        logits = model(tokens, positions, ForwardBatch.for_prompt([len(ids)]), embeds, input_deepstack_embeds=deepstack)
        logits[0, [IMAGE_TOKEN, IMAGE_TOKEN + 1]] = float("-inf")
        ids.append(int(logits[0].argmax()))
        if ids[-1] == 1:
            break
    return ids


def test_batched_tokens_equal_plain_recomputation(model):
    requests = make_requests(model, 9)
    engine = make_engine(model)
    free = engine.scheduler.pool.num_free
    events = run(engine, requests, GREEDY)
    for name, (ids, items, rows) in requests.items():
        assert ids + token_ids(events[name]) == recompute(model, ids, items, rows, 6)
        assert isinstance(events[name][-1], Finished)
        assert [e.index for e in events[name] if isinstance(e, Tokens)] == list(range(len(token_ids(events[name]))))
    assert engine.scheduler.pool.num_free == free


def test_deepstack_rows_matter(model):
    requests = {k: v for k, v in make_requests(model, 6).items() if v[1]}
    without = {k: (i, t, [without_deepstack(r) for r in rows]) for k, (i, t, rows) in requests.items()}
    a, b = (run(make_engine(model), r, GREEDY) for r in (requests, without))
    first = [
        tuple(next(e for e in x[k] if isinstance(e, Tokens)).logprobs[0].logprob for x in (a, b)) for k in requests
    ]
    assert all(abs(x - y) > 1e-3 for x, y in first)


def test_neighbours_do_not_change_an_answer(model):
    requests = make_requests(model, 6)
    sampling = SamplingParams(max_new_tokens=6, temperature=1.0, seed=3, logprobs=0)
    together = run(make_engine(model), requests, sampling)
    for name, request in requests.items():
        alone = run(make_engine(model, max_running=1), {name: request}, sampling)
        assert token_ids(alone[name]) == token_ids(together[name])


def test_ignore_eos_gives_exactly_the_number_asked_for(model):
    requests = make_requests(model, 3)
    events = run(make_engine(model), requests, SamplingParams(max_new_tokens=20, ignore_eos=True))
    for name in requests:
        assert len(token_ids(events[name])) == 20
        assert 1 not in token_ids(events[name])
        assert events[name][-1].finish_reason == "length"


def test_the_end_token_is_the_last_one(model):
    requests = make_requests(model, 3)
    plain = run(make_engine(model), requests, SamplingParams(max_new_tokens=8))
    eos = token_ids(plain["r1"])[3]
    engine = Engine(model, eos_ids=frozenset({eos}))
    events = run(engine, {"r1": requests["r1"]}, SamplingParams(max_new_tokens=8))
    tokens = token_ids(events["r1"])
    assert tokens == token_ids(plain["r1"])[: tokens.index(eos) + 1]
    assert events["r1"][-1].finish_reason == "stop"


def test_cancel_at_every_stage_leaks_nothing(model):
    for stage in range(6):
        engine = make_engine(model)
        free = engine.scheduler.pool.num_free
        requests = make_requests(model, 5)
        for name, (ids, items, _) in requests.items():
            engine.add(name, ids, items, GREEDY)
        for _ in range(stage):
            for event in engine.step():
                if isinstance(event, NeedItems) and stage % 2:
                    for index in event.items:
                        engine.provide_rows(
                            event.request_id, index, requests[event.request_id][2][index], ItemTimings()
                        )
        for name in requests:
            engine.cancel(name)
        assert engine.is_empty
        assert not engine.has_work
        assert engine.scheduler.pool.num_free == free


def test_rows_that_are_not_there_fail_that_request_alone(model):
    requests = make_requests(model, 3)
    [rows] = requests["r1"][2]
    requests["r1"] = (*requests["r1"][:2], [replace(rows, main=((0, rows.main[0][1][:-1]),))])
    engine = make_engine(model, max_prefill_tokens=12)
    events = run(engine, requests, GREEDY)
    assert isinstance(events["r1"][-1], RequestFailed)
    assert isinstance(events["r0"][-1], Finished)
    assert isinstance(events["r2"][-1], Finished)


@pytest.mark.parametrize(
    ("ids", "items", "message"),
    [
        ([], [], "token ids"),
        ([5, 10**6], [], "token ids"),
        ([5, -1], [], "token ids"),
        ([5, IMAGE_TOKEN], [], "placeholders"),
        ([5] * 8, [make_item(1)], "placeholders"),
        ([5] * 600, [], "longer than the context"),
    ],
)
def test_impossible_requests_are_refused_at_once(model, ids, items, message):
    engine = make_engine(model)
    with pytest.raises(InputError, match=message):
        engine.add("a", ids, items, GREEDY)
    assert engine.is_empty
