"""Several answers to one prompt: each is that of a request alone, and the prompt is computed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec import structs

from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams
from qwen3vl_disagg.engine.engine import Engine, Preempted
from qwen3vl_disagg.engine.sampling import sample_seed
from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.protocol.messages import Finished, NeedItems, PromptLogprobs, RequestFailed, Tokens
from qwen3vl_disagg.protocol.session_events import Consumed
from tests.support.engine import make_engine, make_requests, run
from tests.support.random_model import random_language_model, small_config

N = 4
SAMPLED = SamplingParams(n=N, max_new_tokens=9, temperature=1.0, top_p=0.9, seed=2**63 - 2, logprobs=3)


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLMWithDeepStack:
    return random_language_model(small_config(), seed=0)


class Counted:
    """An engine, how many tokens of prompts it prefilled, and how often rows were asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.num_prefilled = engine, 0
        prefill = engine.runner.prefill

        def counting(chunks, plan=None):
            self.num_prefilled += sum(chunk.stop - chunk.start for chunk in chunks)
            return prefill(chunks, plan)

        engine.runner.prefill = counting


def answers(events: list, n: int = N) -> list[list[tuple]]:
    """Of each answer its tokens with their log probabilities, checked to come in order and to end once."""
    found: list[list[tuple]] = [[] for _ in range(n)]
    ended = [event.sample for event in events if isinstance(event, Finished)]
    assert sorted(ended) == list(range(n))
    for event in events:
        if isinstance(event, Tokens):
            assert event.index == len(found[event.sample])
            entries = event.logprobs or [None]
            found[event.sample] += [
                (t, e and pytest.approx(e.logprob, abs=1e-4)) for t, e in zip(event.token_ids, entries, strict=True)
            ]
    return found


@pytest.fixture(scope="module")
def alone(model) -> dict[str, list[list[tuple]]]:
    """The answers of single requests with the seeds that the samples have."""
    found: dict[str, list[list[tuple]]] = {}
    for name, request in make_requests(model, 4).items():
        for number in range(N):
            one = structs.replace(SAMPLED, n=1, seed=sample_seed(SAMPLED.seed, number))
            found.setdefault(name, []).extend(answers(run(make_engine(model), {name: request}, one)[name], 1))
    return found


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(("max_running", "page_size"), [(1, 4), (3, 3), (8, 64)])
def test_samples_are_single_requests_with_the_seeds_that_follow(model, alone, prefix_cache, max_running, page_size):
    options = {"prefix_cache": prefix_cache, "max_running": max_running, "page_size": page_size}
    requests = make_requests(model, 3)
    counted = Counted(make_engine(model, **options))
    free = counted.engine.scheduler.pool.num_free
    events = run(counted.engine, requests, SAMPLED)
    for name, request in requests.items():
        assert answers(events[name]) == alone[name]
        assert len([e for e in events[name] if isinstance(e, NeedItems)]) == bool(request[1]), "rows are asked for once"
    assert counted.num_prefilled == sum(len(ids) for ids, _, _ in requests.values()), "each prompt is computed once"
    assert counted.engine.scheduler.pool.num_free == free
    assert not counted.engine.scheduler.samples


def test_greedy_answers_are_all_the_same(model):
    requests = make_requests(model, 3)
    events = run(make_engine(model), requests, SamplingParams(n=3, max_new_tokens=6))
    for name in requests:
        first, *others = answers(events[name], 3)
        assert others == [first] * 2


def test_without_a_seed_the_answers_differ(model):
    [events] = run(make_engine(model), {"r": ([5, 6, 7], [], [])}, SamplingParams(n=3, temperature=2.0)).values()
    assert len({str(answer) for answer in answers(events, 3)}) == 3


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("room", [1, 3])
def test_under_pressure_they_give_pages_up_and_give_the_same_answers(model, alone, prefix_cache, room):
    requests = make_requests(model, 4)
    engine = make_engine(model, prefix_cache=prefix_cache)
    pool = engine.scheduler.pool
    free = pool.num_free
    longest = max(len(ids) for ids, _, _ in requests.values()) + SAMPLED.max_new_tokens - 1
    taken = pool.allocate(pool.num_free - pool.pages_for(longest) - room)
    events = run(engine, requests, SAMPLED)
    for name in requests:
        assert answers(events[name]) == alone[name]
    assert engine.scheduler.num_preempted > 0
    pool.free(taken)
    assert pool.num_free == free


def test_the_prompts_log_probabilities_come_once(model):
    requests = make_requests(model, 3)
    sampling = SamplingParams(n=3, max_new_tokens=2, prompt_logprobs=1)
    events = run(make_engine(model), requests, sampling)
    one = run(make_engine(model), requests, SamplingParams(max_new_tokens=2, prompt_logprobs=1))
    for name in requests:
        got, expected = ([e.index for e in found[name] if isinstance(e, PromptLogprobs)] for found in (events, one))
        assert got == expected != []


def feed(engine: Engine, requests, num_steps: int) -> list:
    events = []
    for _ in range(num_steps):
        for event in engine.step():
            events.append(event)
            if isinstance(event, NeedItems):
                for index in event.items:
                    engine.provide_rows(event.request_id, index, requests[event.request_id][2][index], ItemTimings())
    return events


@pytest.mark.parametrize("stage", range(5))
def test_a_request_or_one_of_its_answers_ends_at_every_stage(model, stage):
    requests = make_requests(model, 3)
    engine = make_engine(model, max_running=3)
    free = engine.scheduler.pool.num_free
    for name, (ids, items, _) in requests.items():
        engine.add(name, ids, items, SAMPLED)
    events = feed(engine, requests, stage)
    engine.cancel("r0")
    engine.cancel("r1", 0)
    engine.cancel("r1", 3)
    engine.cancel("r1", 3)
    events += feed(engine, requests, 80)
    assert engine.is_empty
    assert engine.scheduler.pool.num_free == free
    ended = {name: {e.sample for e in events if isinstance(e, Finished) and e.request_id == name} for name in requests}
    assert (ended["r0"], ended["r2"]) == (set(), {0, 1, 2, 3})
    assert ended["r1"] == {1, 2}


def test_a_failure_of_one_answer_ends_the_request_once(model):
    requests = make_requests(model, 2)
    engine = make_engine(model, prefix_cache=False, max_running=8)
    free = engine.scheduler.pool.num_free
    for name, (ids, items, _) in requests.items():
        engine.add(name, ids, items, SAMPLED)
    feed(engine, requests, 4)
    broken = engine.scheduler.admitted["r1/2"]
    for keys, values in engine.runner.caches:
        for pool in (keys, values):
            pool.unflatten(0, (-1, 4))[broken.pages[-1], (broken.num_cached - 1) % 4] = float("nan")
    events = feed(engine, requests, 40)
    [failed] = [event for event in events if isinstance(event, RequestFailed)]
    assert failed.request_id == "r1"
    assert not any(event.request_id == "r1" for event in events[events.index(failed) + 1 :])
    assert len([event for event in events if isinstance(event, Finished)]) == N
    assert engine.is_empty
    assert engine.scheduler.pool.num_free == free
    assert all(part.isfinite().all() for cache in engine.runner.caches for part in cache)


def test_the_sessions_hear_of_a_preemption_when_nobody_has_the_prompt(model):
    requests = {"r1": make_requests(model, 2)["r1"]}
    engine = make_engine(model, max_running=8)
    engine.add("r1", *requests["r1"][:2], SAMPLED)
    feed(engine, requests, 3)
    scheduler = engine.scheduler
    assert len(scheduler.admitted) == N
    pool = scheduler.pool
    taken = pool.allocate(pool.num_free)
    events = feed(engine, requests, 30)
    assert scheduler.num_preempted >= 1
    assert not any(isinstance(event, (Preempted, NeedItems)) for event in events), "one of them had the prompt"
    pool.free(taken)


def test_rows_on_their_way_to_an_answer_that_is_gone_are_dropped(model):
    """The next one computes the prompt from its first row."""
    ids, [item], [rows] = make_requests(model, 2)["r1"]
    engine = make_engine(model, min_overlap_tokens=1)
    engine.add("r1", ids, [item], SamplingParams(n=2, max_new_tokens=3))
    engine.admit()
    engine.provide_rows("r1", 0, replace(rows, stop=3), ItemTimings())
    assert [event.rows for event in engine.step() if isinstance(event, Consumed)] == [3]
    engine.cancel("r1", 0)
    assert [type(event) for event in engine.admit()] == [NeedItems]
    assert engine.provide_rows("r1", 0, replace(rows, start=3), ItemTimings()) == []
    assert not [event for _ in range(3) for event in engine.step()]
    engine.provide_rows("r1", 0, replace(rows, attempt=2), ItemTimings())
    events = [event for _ in range(4) for event in engine.step()]
    assert not any(isinstance(event, RequestFailed) for event in events)
    assert len([event for event in events if isinstance(event, Tokens)]) == 3


def test_what_follows_a_prompt_is_kept_alone_and_as_long_as_answers_wait_for_it(model):
    requests = make_requests(model, 4)
    engine = make_engine(model, max_running=4)
    for name, (ids, items, _) in requests.items():
        engine.add(name, ids, items, structs.replace(SAMPLED, n=2))
    engine.admit()
    samples = engine.scheduler.samples["r0"]
    feed(engine, requests, 1)
    assert samples.logits_V.untyped_storage().nbytes() == samples.logits_V.nbytes
    others = [s for s in samples.members if s is not samples.first]
    for sequence in others:
        sequence.generated.append(5)
    samples.first.generated.clear()
    logits_V, samples.logits_V = samples.logits_V, None
    samples.keep(samples.first, logits_V)
    assert samples.logits_V is None


@pytest.mark.parametrize("num_tokens", [8, 9])
def test_pages_behind_a_shared_prompt_are_remembered(model, num_tokens):
    """Also where the prompt ends with a page; the answers are found by who goes on with one of them."""
    ids = list(range(10, 10 + num_tokens))
    engine = make_engine(model)
    found = answers(run(engine, {"r": (ids, [], [])}, SAMPLED)["r"])
    for answer in found:
        engine.add("next", [*ids, *(t for t, _ in answer)], [], SamplingParams(max_new_tokens=1))
        engine.admit()
        assert engine.scheduler.admitted["next"].num_found == (num_tokens + len(answer) - 1) // 4 * 4
        engine.cancel("next")


def test_the_sessions_hear_once_that_nobody_has_the_prompt_and_rows_are_asked_for_once_more(model):
    requests = make_requests(model, 2)
    engine = make_engine(model, max_running=3, prefix_cache=False)
    engine.add("r0", *requests["r0"][:2], SamplingParams(max_new_tokens=28, ignore_eos=True))
    engine.add("r1", *requests["r1"][:2], structs.replace(SAMPLED, n=2, max_new_tokens=40, ignore_eos=True))
    feed(engine, requests, 4)
    pool, scheduler = engine.scheduler.pool, engine.scheduler
    assert len(scheduler.admitted) == 3
    taken = pool.allocate(pool.num_free)
    events = []
    events += feed(engine, requests, 80)
    assert "r0" not in scheduler.samples
    pool.free(taken)
    events += feed(engine, requests, 100)
    kinds = [type(event) for event in events if isinstance(event, (Preempted, NeedItems))]
    assert kinds[:2] == [Preempted, NeedItems]
    assert kinds == kinds[:2] * (len(kinds) // 2), "once for both answers, each time"
    assert engine.is_empty
    assert len([e for e in events if isinstance(e, Finished)]) == 3
