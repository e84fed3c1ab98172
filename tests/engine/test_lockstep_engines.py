"""Engines that share experts, each a thread, against one engine that has them all: the same tokens."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from torch import Tensor

from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams
from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.engine.failures import StepFailed
from qwen3vl_disagg.language.engine_thread import EngineThread
from qwen3vl_disagg.model.moe import Experts
from qwen3vl_disagg.parallel.dispatch import ExpertDispatcher
from qwen3vl_disagg.parallel.expert_placement import shard_rows
from qwen3vl_disagg.parallel.lockstep import Lockstep, Outlook, PaceLimits, StepPlan
from qwen3vl_disagg.protocol.messages import NeedItems, RequestFailed, Tokens
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.random_model import random_language_model, small_config
from tests.support.thread_ranks import WAIT_S, ThreadCollectives, on_ranks

GREEDY = SamplingParams(max_new_tokens=4, logprobs=1)
MODEL = random_language_model(small_config(), seed=0)
REQUESTS = make_requests(MODEL, 6)
ALONE = run(make_engine(MODEL), REQUESTS, GREEDY)


class PlainDispatcher(ExpertDispatcher):
    """For weights that are cut, but no DTensors."""

    def local(self, weight: Tensor) -> Tensor:
        return weight


def part_of_model(collectives: ThreadCollectives):
    model = copy.deepcopy(MODEL)
    for part in model.modules():
        if isinstance(part, Experts):
            rows = shard_rows(len(part.down_proj), collectives.num_ranks, collectives.rank)
            for name in part.weight_names:
                weight = getattr(part, name).detach()[rows.start : rows.stop].clone()
                setattr(part, name, torch.nn.Parameter(weight, requires_grad=False))
            part.dispatcher = PlainDispatcher(collectives, MODEL.config.text.num_experts)
    return model


class Rounds:
    """The agreement on steps, for threads; None when nobody has work any more."""

    def __init__(self, num_ranks: int, choose: Callable) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=WAIT_S)
        self._lockstep = Lockstep(num_ranks, PaceLimits(chunk_tokens=8, max_prefill_tokens=40), choose)
        self._outlooks: list[Outlook | None] = [None] * num_ranks
        self.plan: StepPlan | None = None
        self.plans: list[StepPlan] = []

    def agree(self, rank: int, engine: Engine) -> StepPlan | None:
        self._outlooks[rank] = engine.outlook(self._lockstep.step)
        if self._barrier.wait() == 0:
            plans = [self._lockstep.report(r, outlook) for r, outlook in enumerate(self._outlooks)]
            self.plan = plans[-1]
            self.plans += [self.plan] if self.plan else []
        self._barrier.wait()
        return self.plan


def run_together(
    num_ranks: int, rank_of: dict[str, int], choose, *, n: int = 1, **options
) -> tuple[dict[str, list], Rounds]:
    """Each request on its rank, with `n` answers; their events."""
    rounds = Rounds(num_ranks, choose)

    def body(collectives: ThreadCollectives) -> dict[str, list]:
        engine = make_engine(part_of_model(collectives), **options)
        events: dict[str, list] = {name: [] for name, rank in rank_of.items() if rank == collectives.rank}
        for name in events:
            engine.add(name, REQUESTS[name][0], REQUESTS[name][1], structs.replace(GREEDY, n=n))
        new = engine.admit()
        while True:
            for event in new:
                events[event.request_id].append(event)
                for index in event.items if isinstance(event, NeedItems) else []:
                    engine.provide_rows(event.request_id, index, REQUESTS[event.request_id][2][index], ItemTimings())
            plan = rounds.agree(collectives.rank, engine)
            if plan is None:
                assert engine.is_empty
                return events
            new = [*engine.step(plan), *engine.admit()]

    return {name: found for part in on_ranks(num_ranks, body) for name, found in part.items()}, rounds


@settings(max_examples=12)
@given(st.data())
def test_any_ranks_give_the_tokens_of_one_engine(data):
    num_ranks = data.draw(st.integers(2, 5))  # 6 experts: with 5 ranks the last two have none
    rank_of = {name: data.draw(st.integers(0, num_ranks - 1)) for name in REQUESTS}
    kinds = data.draw(st.sampled_from([("gather",), ("all_to_all",), ("gather", "all_to_all")]))
    turn = iter(range(10_000))
    pages = data.draw(st.sampled_from([{}, {"max_running": 1}, {"max_prefill_tokens": 8}]))
    n = data.draw(st.sampled_from([1, 3]))
    together, _ = run_together(num_ranks, rank_of, lambda rows, num_rows: kinds[next(turn) % len(kinds)], n=n, **pages)
    for name, sample in itertools.product(REQUESTS, range(n)):
        own = [event for event in together[name] if isinstance(event, Tokens) and event.sample == sample]
        assert token_ids(own) == token_ids(ALONE[name])


@pytest.mark.parametrize("kind", ["gather", "all_to_all"])
def test_all_requests_on_one_rank(kind):
    """The other ranks have no token in any step, and one of them has no expert either."""
    together, rounds = run_together(4, dict.fromkeys(REQUESTS, 1), lambda rows, num_rows: kind)
    assert {name: token_ids(found) for name, found in together.items()} == {
        name: token_ids(found) for name, found in ALONE.items()
    }
    assert any(plan.prefill for plan in rounds.plans)
    assert any(not plan.prefill for plan in rounds.plans)


def test_rows_that_do_not_fit_fail_their_request_alone(monkeypatch):
    """What is wrong with a request is noticed before the others are kept waiting."""
    bad = "r1"
    ids, items, rows = REQUESTS[bad]
    narrow = [replace(whole, main=tuple((start, piece[:, :5]) for start, piece in whole.main)) for whole in rows]
    monkeypatch.setitem(REQUESTS, bad, (ids, items, narrow))
    # Once with others beside it in its step, once with nothing else to run on its rank.
    beside = {name: number % 2 for number, name in enumerate(REQUESTS)}
    for rank_of in (beside, {name: int(name == bad) for name in REQUESTS}):
        check_failed_alone(bad, run_together(2, rank_of, lambda *_: "gather")[0])


def check_failed_alone(bad: str, together: dict[str, list]) -> None:
    assert isinstance(together[bad][-1], RequestFailed)
    for name in REQUESTS.keys() - {bad}:
        assert token_ids(together[name]) == token_ids(ALONE[name])


@pytest.mark.parametrize("kind", ["gather", "all_to_all"])
def test_numbers_that_are_not_finite_fail_their_request_alone(kind, monkeypatch):
    """On their own rank and on those that run experts for it: where rows of all ranks are summed up, 0 times infinity
    must not be among what is added."""
    token = 69
    ids, items, rows = REQUESTS["r1"]
    monkeypatch.setitem(REQUESTS, "r1", ([token, *ids[1:]], items, rows))
    model = copy.deepcopy(MODEL)
    model.model.embed_tokens.weight.data[token] = float("inf")
    monkeypatch.setitem(globals(), "MODEL", model)
    for rank_of in ({name: number % 3 for number, name in enumerate(REQUESTS)}, dict.fromkeys(REQUESTS, 0)):
        together, _ = run_together(3, rank_of, lambda *_: kind)
        assert together["r1"][-1].failure.status == 500
        check_failed_alone("r1", together)


def test_a_model_that_fails_ends_the_rank_where_others_wait_for_it():
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    engine = Engine(MODEL, eos_ids=frozenset({1}), options=EngineOptions(kv_cache_gib=0.01))
    engine.add("r0", *REQUESTS["r0"][:2], GREEDY)
    engine.runner.prefill = fail
    with pytest.raises(StepFailed, match="RuntimeError in a step"):
        engine.step(StepPlan(step=1, num_rows=16, prefill=16))


def test_taking_part_that_fails_ends_the_rank_too():
    """Also after rows that do not fit were the only ones to run."""
    engine = make_engine(MODEL)
    ids, items, rows = REQUESTS["r1"]
    engine.add("r1", ids, items, GREEDY)
    engine.admit()
    narrow = replace(rows[0], main=tuple((start, piece[:, :5]) for start, piece in rows[0].main))
    engine.provide_rows("r1", 0, narrow, ItemTimings())

    def fail(plan: object) -> None:
        raise RuntimeError("out of memory")

    engine.runner.take_part = fail
    for step in (1, 2):
        with pytest.raises(StepFailed):
            engine.step(StepPlan(step=step, num_rows=16, prefill=16))


def test_a_step_that_was_agreed_on_is_taken_also_by_a_rank_that_stops():
    steps: list[StepPlan] = []

    class FakeEngine:
        def outlook(self, step):
            return Outlook(step=step)

        def step(self, plan):
            steps.append(plan)
            return []

        def admit(self):
            return []

    thread = EngineThread(FakeEngine(), lambda events: None, lambda error: None, report=lambda outlook: None)
    thread.take_plan(StepPlan(step=1, num_rows=8))
    thread._stopping = True
    thread.start()
    assert thread.stop(5.0)
    assert steps == [StepPlan(step=1, num_rows=8)]


def test_the_thread_says_what_it_could_do_and_steps_when_it_is_told():
    class FakeEngine:
        prefill, decode, steps = 0, 0, []

        def outlook(self, step):
            return Outlook(step=step, prefill=self.prefill, decode=self.decode)

        def step(self, plan):
            self.steps.append(plan)
            self.prefill = 0
            return []

        def admit(self):
            return []

    reports: list[Outlook] = []
    heard = threading.Condition()

    def report(outlook: Outlook) -> None:
        with heard:
            reports.append(outlook)
            heard.notify_all()

    def wait_for(count: int) -> None:
        with heard:
            assert heard.wait_for(lambda: len(reports) >= count, timeout=10), reports

    engine = FakeEngine()
    thread = EngineThread(engine, lambda events: None, lambda error: None, report=report)
    thread.start()
    wait_for(1)
    thread.post(lambda e: setattr(e, "prefill", 7))
    wait_for(2)
    for _ in range(2):  # nothing changes: nothing is said
        has_run = threading.Event()
        thread.post(lambda e, has_run=has_run: has_run.set())
        assert has_run.wait(10)
    assert len(reports) == 2
    thread.take_plan(StepPlan(step=1, num_rows=8, prefill=8))
    wait_for(3)
    assert reports == [Outlook(step=1), Outlook(step=1, prefill=7), Outlook(step=2)]
    assert engine.steps == [StepPlan(step=1, num_rows=8, prefill=8)]
    assert thread.stop(5.0)
