"""Log probabilities of prompts, as the engine tells them, against the oracle's logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams
from qwen3vl_disagg.engine import prompt_logprobs
from qwen3vl_disagg.protocol.messages import Finished, NeedItems, PromptLogprobs, Tokens
from tests.support.engine import make_engine, run
from tests.support.oracle import CONFIGS, Prompt, engine_requests, make_prompt, run_oracle

NUM_TOP = 3
SCORED = SamplingParams(max_new_tokens=1, prompt_logprobs=NUM_TOP)
CONFIG = CONFIGS["moe"]
PARTS = [[41], [3, (1, 4, 4), 9], [1], [2], [17, (1, 8, 6), 3, (1, 2, 6), 1], [30]]


@pytest.fixture(scope="module")
def prompts() -> dict[str, Prompt]:
    return {f"r{n}": make_prompt(CONFIG, parts, seed=n) for n, parts in enumerate(PARTS)}


@pytest.fixture(scope="module")
def expected(pool, prompts) -> dict[str, torch.Tensor]:
    """`[T, V]`: of each token of a prompt the log probabilities of the next one."""
    logits = run_oracle(pool.oracle("moe"), CONFIG, list(prompts.values())).logits.float()
    parts = logits.split([len(prompt.ids) for prompt in prompts.values()])
    return {name: part.log_softmax(-1) for name, part in zip(prompts, parts, strict=True)}


def check(events, log_probs: torch.Tensor, ids: list[int], num_top: int = NUM_TOP) -> None:
    """Each token but the first once, in order, before the answer's first."""
    told = [event for event in events if isinstance(event, PromptLogprobs)]
    first_answer = next(n for n, event in enumerate(events) if isinstance(event, Tokens))
    assert all(not isinstance(event, PromptLogprobs) for event in events[first_answer:])
    index = 1
    for event in told:
        own, ranks = np.frombuffer(event.own, "<f4"), np.frombuffer(event.ranks, "<i4")
        top_ids = np.frombuffer(event.top_ids, "<i4").reshape(len(own), num_top)
        top = np.frombuffer(event.top, "<f4").reshape(len(own), num_top)
        assert event.index == index
        for r in range(len(own)):
            row = log_probs[index + r - 1]
            assert abs(own[r] - float(row[ids[index + r]])) < 1e-4
            assert abs(int((row > row[ids[index + r]]).sum()) + 1 - ranks[r]) <= 1, "close ones may change places"
            best = row.topk(num_top)
            np.testing.assert_allclose(top[r], best.values.numpy(), atol=1e-4)
            np.testing.assert_allclose(top[r], row[top_ids[r].astype(int)].numpy(), atol=1e-4)
        index += len(own)
    assert index == len(ids)


@pytest.mark.parametrize("budget", [1000, 40, 7, 1])
def test_in_chunks_of_any_size(pool, prompts, expected, budget):
    model = pool.ours("moe")
    made = engine_requests(model, prompts)
    engine = make_engine(model.language_model, max_prefill_tokens=budget, chunk_tokens=budget, min_overlap_tokens=1)
    for name, events in run(engine, made, SCORED).items():
        check(events, expected[name], made[name][0])


def test_sums_are_those_of_the_oracle(pool, prompts, expected):
    """What a harness adds up for one of several choices."""
    model = pool.ours("moe")
    made = engine_requests(model, prompts)
    for name, events in run(make_engine(model.language_model), made, SCORED).items():
        ids = made[name][0]
        own = np.concatenate([np.frombuffer(e.own, "<f4") for e in events if isinstance(e, PromptLogprobs)] or [[]])
        theirs = sum(float(expected[name][t - 1, ids[t]]) for t in range(1, len(ids)))
        assert abs(float(own.sum()) - theirs) < 1e-4 * max(1, len(ids) ** 0.5)


def test_nothing_of_a_scored_prompt_is_taken_from_the_cache(pool, prompts, expected):
    model = pool.ours("moe")
    made = engine_requests(model, {"r0": prompts["r0"]})
    engine = make_engine(model.language_model)
    plain = SamplingParams(max_new_tokens=1)
    run(engine, made, plain)
    for _ in range(2):
        events = run(engine, made, SCORED)["r0"]
        check(events, expected["r0"], made["r0"][0])
        [end] = [event for event in events if isinstance(event, Finished)]
        assert end.timings.cached_tokens == 0
    [end] = [event for event in run(engine, made, plain)["r0"] if isinstance(event, Finished)]
    assert end.timings.cached_tokens == 40, "what a scored prompt leaves is there for others"


def test_a_preempted_request_tells_each_once(pool, prompts, expected):
    """Two answers that do not fit beside one another: one of them begins again."""
    model = pool.ours("moe")
    made = engine_requests(model, {name: prompts[name] for name in ("r0", "r5")})
    text = CONFIG.text
    page_bytes = 4 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    engine = make_engine(model.language_model, kv_cache_gib=30 * page_bytes / 2**30, prefix_cache=True)
    sampling = SamplingParams(max_new_tokens=60, prompt_logprobs=NUM_TOP, ignore_eos=True)
    told = run(engine, made, sampling)
    assert engine.scheduler.num_preempted > 0
    for name, events in told.items():
        check(events, expected[name], made[name][0])


def test_an_item_that_is_sent_again_tells_nothing_twice(pool, prompts, expected):
    model = pool.ours("moe")
    ids, items, rows = engine_requests(model, {"r1": prompts["r1"]})["r1"]
    engine = make_engine(model.language_model, max_prefill_tokens=2, min_overlap_tokens=1)
    engine.add("r1", ids, items, SCORED)
    events, num_restarts = [], 0
    for _ in range(200):
        if engine.is_empty:
            break
        for event in engine.step():
            events.append(event)
            if isinstance(event, NeedItems):
                engine.provide_rows("r1", 0, rows[0], ItemTimings())
            if isinstance(event, PromptLogprobs) and items[0].offset < event.index < items[0].stop and num_restarts < 2:
                num_restarts += 1
                engine.restart_item("r1", 0)
                engine.provide_rows("r1", 0, rows[0], ItemTimings())
    assert num_restarts == 2
    check(events, expected["r1"], ids)


def test_the_head_sees_a_few_rows_at_a_time(pool, prompts, expected, monkeypatch):
    model = pool.ours("moe")
    made = engine_requests(model, {"r0": prompts["r0"]})
    engine = make_engine(model.language_model)
    monkeypatch.setattr(prompt_logprobs, "MAX_LOGITS", 5 * CONFIG.text.vocab_size)
    sizes, head = [], engine.runner.model.lm_head.forward

    def watch(x):
        sizes.append(len(x))
        return head(x)

    monkeypatch.setattr(engine.runner.model.lm_head, "forward", watch)
    check(run(engine, made, SCORED)["r0"], expected["r0"], made["r0"][0])
    assert max(sizes) == 5
    assert sum(sizes) == len(made["r0"][0])


def test_none_and_no_alternatives(pool, prompts, expected):
    model = pool.ours("moe")
    made = engine_requests(model, {"r0": prompts["r0"]})
    engine = make_engine(model.language_model)
    check(
        run(engine, made, SamplingParams(max_new_tokens=1, prompt_logprobs=0))["r0"], expected["r0"], made["r0"][0], 0
    )
    events = run(engine, made, SamplingParams(max_new_tokens=1))["r0"]
    assert not [event for event in events if isinstance(event, PromptLogprobs)]
