"""The engine over a small random model: its tokens against plain recomputation, batches, cancels, failures."""

import pytest
import torch

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams, VisualItem
from qwen3vl_disagg.disagg.messages import Finished, NeedItems, RequestFailed, Tokens
from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.engine.sequence import ItemRows
from qwen3vl_disagg.model import ForwardBatch, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.processing import mrope_positions
from tests.support.random_model import IMAGE_TOKEN, random_language_model, small_config

GREEDY = SamplingParams(max_new_tokens=6, logprobs=2)


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLMWithDeepStack:
    return random_language_model(small_config(), seed=0)


def make_engine(model, **options) -> Engine:
    defaults = {"max_running": 4, "max_prefill_tokens": 40, "page_size": 4, "kv_cache_gib": 0.01}
    return Engine(model, eos_ids=frozenset({1}), options=EngineOptions(**{**defaults, **options}))


def make_item(offset: int, grid=(1, 4, 6), name="image") -> VisualItem:
    rows = grid[1] * grid[2] // 4
    return VisualItem(
        modality="image", digest=name, num_bytes=1, grid=grid, num_rows=rows, offset=offset, param="messages[0]"
    )


def make_rows(model, item: VisualItem, seed: int) -> ItemRows:
    generator = torch.Generator().manual_seed(seed)
    hidden, levels = model.config.text.hidden_size, model.config.num_deepstack_levels
    return ItemRows(
        torch.randn(item.num_rows, hidden, generator=generator),
        torch.randn(item.num_rows, levels * hidden, generator=generator),
    )


def make_requests(model, count: int):
    """name -> (token ids, items, rows): text, one image, two images, in turn."""
    requests = {}
    generator = torch.Generator().manual_seed(5)
    for i in range(count):
        length = 3 + int(torch.randint(0, 9, (1,), generator=generator))
        text = torch.randint(10, 60, (length,), generator=generator).tolist()
        items, ids = [], text[:2]
        for _ in range(i % 3):
            items.append(make_item(len(ids), grid=(1, 4, 6) if len(items) == 0 else (1, 2, 8)))
            ids = ids + [IMAGE_TOKEN] * items[-1].num_rows + [7]
        ids = ids + text[2:]
        requests[f"r{i}"] = (ids, items, [make_rows(model, item, 10 * i + j) for j, item in enumerate(items)])
    return requests


def run(engine: Engine, requests, sampling) -> dict[str, list]:
    """Drive the engine to the end; each request's events."""
    events: dict[str, list] = {name: [] for name in requests}
    for name, (ids, items, _) in requests.items():
        engine.add(name, ids, items, sampling[name] if isinstance(sampling, dict) else sampling)
    for _ in range(500):
        if engine.is_empty:
            return events
        assert engine.has_work
        for event in engine.step():
            events[event.request_id].append(event)
            if isinstance(event, NeedItems):
                for index in event.items:
                    rows = requests[event.request_id][2][index]
                    engine.provide_item(event.request_id, index, rows, ItemTimings())
    raise AssertionError("the engine does not come to an end")


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
            embeds[where], deepstack[where] = row.main, row.deepstack
        positions, _ = mrope_positions(len(ids), items, 2)
        logits = model(tokens, positions, ForwardBatch.for_prompt([len(ids)]), embeds, input_deepstack_embeds=deepstack)
        logits[0, [IMAGE_TOKEN, IMAGE_TOKEN + 1]] = float("-inf")
        ids.append(int(logits[0].argmax()))
        if ids[-1] == 1:
            break
    return ids


def token_ids(events) -> list[int]:
    return [i for event in events if isinstance(event, Tokens) for i in event.token_ids]


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
    without = {k: (i, t, [ItemRows(r.main, r.deepstack * 0) for r in rows]) for k, (i, t, rows) in requests.items()}
    a, b = (run(make_engine(model), r, GREEDY) for r in (requests, without))
    first = [(a[k][1].logprobs[0].logprob, b[k][1].logprobs[0].logprob) for k in requests]
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
                        engine.provide_item(
                            event.request_id, index, requests[event.request_id][2][index], ItemTimings()
                        )
        for name in requests:
            engine.cancel(name)
        assert engine.is_empty
        assert not engine.has_work
        assert engine.scheduler.pool.num_free == free


def test_a_wrong_number_of_rows_fails_that_request_alone(model):
    requests = make_requests(model, 3)
    short = [ItemRows(row.main[:-1], row.deepstack[:-1]) for row in requests["r1"][2]]
    requests["r1"] = (requests["r1"][0], requests["r1"][1], short)
    engine = make_engine(model, max_prefill_tokens=1)
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
