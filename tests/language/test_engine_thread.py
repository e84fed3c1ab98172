"""What is posted to an engine's thread comes between two decode steps once."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from qwen3vl_disagg.language.engine_thread import BetweenSteps, EngineSteps, EngineThread
from qwen3vl_disagg.parallel.lockstep import Outlook, StepPlan
from tests.support.claims import Claims


class FakeEngine:
    """Prefill and decode in turn, until there is no work. While it steps, the next batch for the tower is posted."""

    def __init__(self, steps: list[str]) -> None:
        self.steps, self.log, self.on_step = steps, [], lambda: None
        pool = SimpleNamespace(num_pages=8, num_free=5)
        self.scheduler = SimpleNamespace(admitted={"a": 1, "b": 2}, waiting=["c"], pool=pool, num_preempted=0)

    def admit(self):
        return []

    @property
    def has_work(self) -> bool:
        return bool(self.steps)

    @property
    def owes_decode(self) -> bool:
        return bool(self.log) and self.log[-1] == "prefill"

    def step(self):
        if not self.steps:
            return []
        self.log.append(self.steps.pop(0))
        self.on_step()
        return [self.log[-1]]


def test_what_a_command_gives_is_told_before_the_next_command_runs():
    """What that one says by itself, as of a request that has left, is behind it."""
    turns, told = EngineSteps(FakeEngine([])), []
    turns.post(lambda _: ["rows are used"])
    turns.post(lambda _: told.append("left"))
    turns.post(lambda _: ["taken in"])
    assert turns.turn(told.extend)
    assert told == ["rows are used", "left", "taken in"]


def test_a_prefill_step_and_the_decode_step_it_owes_are_one_turn():
    steps = ["prefill", "decode", "decode", "prefill", "decode"]
    engine, told = FakeEngine(list(steps)), []
    turns = EngineSteps(engine)
    tower = BetweenSteps(turns.post)
    engine.on_step = lambda: tower.submit(engine.log.append, "tower")

    def on_events(events):
        assert len(events) == 1  # each step is told before the next one
        told.extend(events)

    for _ in range(3):
        assert turns.turn(on_events)
    assert told == steps
    posted = [entry for entry in engine.log if entry != "tower"]
    assert posted == steps
    assert engine.log == ["prefill", "decode", "tower", "tower", "decode", "tower", "prefill", "decode"]


def test_what_needs_no_step_waits_for_none():
    told = threading.Event()
    thread = EngineThread(FakeEngine([]), lambda events: told.set(), lambda error: None)
    thread.start()
    thread.post(lambda engine: ["answer"])
    assert told.wait(10)
    assert thread.stop(10)


def test_the_tower_between_steps_tells_what_comes_of_it_and_what_was_cancelled_never_runs():
    turns, ran = EngineSteps(FakeEngine([])), []
    tower = BetweenSteps(turns.post)
    sum_, broken, cancelled = tower.submit(sum, [1, 2]), tower.submit(divmod, 1, 0), tower.submit(ran.append, 1)
    assert cancelled.cancel()
    assert turns.turn(lambda events: None)
    assert sum_.result(0) == 3
    with pytest.raises(ZeroDivisionError):
        broken.result(0)
    assert ran == []


def test_an_interrupt_in_the_tower_ends_the_turn():
    turns = EngineSteps(FakeEngine([]))

    def interrupted():
        raise KeyboardInterrupt

    BetweenSteps(turns.post).submit(interrupted)
    with pytest.raises(KeyboardInterrupt):
        turns.turn(lambda events: None)


def test_cores_are_claimed_before_each_turn_and_given_back_while_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr("qwen3vl_disagg.language.engine_thread.HOLD_S", 5.0)  # who is alone gives them back at once
    engine, claims = FakeEngine(["prefill", "decode", "decode"]), Claims()
    turns = EngineSteps(engine, cores=claims)
    for _ in range(2):
        turns.turn(lambda events: None)
    assert claims.said == ["claim"] * 2
    threading.Timer(0.1, turns.post, [lambda engine: None]).start()
    turns.turn(lambda events: None)
    assert claims.said == ["claim", "claim", "release", "claim"]


@pytest.mark.parametrize(("hold_s", "is_given_back"), [(0.03, True), (5.0, False)])
def test_steps_together_keep_the_cores_for_a_moment(monkeypatch, hold_s, is_given_back):
    """While others have not agreed, also where there is something to do."""
    monkeypatch.setattr("qwen3vl_disagg.language.engine_thread.HOLD_S", hold_s)
    claims = Claims()
    turns = EngineSteps(FakeEngine(["decode"]), lambda outlook: None, claims)
    threading.Timer(0.1, turns.post, [lambda engine: None]).start()
    monkeypatch.setattr(turns, "_step_together", lambda *_: None)
    turns.turn(lambda events: None)
    assert claims.said == ["release"] * is_given_back + ["claim"]


def test_a_plan_ends_the_wait_and_is_taken_once_also_by_one_that_is_to_stop(monkeypatch):
    turns, taken = EngineSteps(FakeEngine([]), lambda outlook: None), []
    monkeypatch.setattr(turns, "_step_together", lambda _, plan, __: taken.append(plan))
    plans = [StepPlan(step=number, num_rows=1) for number in (1, 2)]
    threading.Timer(0.1, turns.take_plan, plans[:1]).start()
    late = threading.Timer(5, turns.post, [lambda engine: taken.append("too late")])
    late.start()
    assert turns.turn(lambda events: None)
    late.cancel()
    turns.take_plan(plans[1])
    monkeypatch.setattr(turns, "_stopping", True)
    assert turns.turn(lambda events: None)  # others count on it
    assert not turns.turn(lambda events: None)
    assert taken == plans


@pytest.mark.parametrize("cores", [None, Claims()])
def test_whoever_waits_looks_again_and_again_whether_it_is_in_vain(monkeypatch, cores):
    monkeypatch.setattr("qwen3vl_disagg.language.engine_thread.CHECK_S", 0.01)
    turns, looks = EngineSteps(FakeEngine([]), cores=cores), []

    def check():
        looks.append(len(looks))
        if len(looks) == 3:
            raise ConnectionError

    late = threading.Timer(5, turns.post, [lambda engine: None])
    late.start()
    with pytest.raises(ConnectionError):
        turns.turn(lambda events: None, check)
    late.cancel()


@pytest.mark.parametrize("is_together", [True, False])
def test_what_is_posted_at_the_moment_in_which_the_cores_are_given_back_is_done(monkeypatch, is_together):
    """The wait for more is over by then, and the next one would not hear of it."""
    monkeypatch.setattr("qwen3vl_disagg.language.engine_thread.HOLD_S", 0.001)
    done = threading.Event()

    class Posts(Claims):
        def release(self) -> None:
            super().release()
            turns.post(lambda engine: done.set())

    turns = EngineSteps(FakeEngine([]), (lambda outlook: None) if is_together else None, Posts())
    monkeypatch.setattr(turns, "_step_together", lambda *_: None)
    threading.Thread(target=turns.turn, args=[lambda events: None], daemon=True).start()
    assert done.wait(10)


def test_what_there_is_to_do_is_told_at_any_time_and_a_step_counts_when_it_is_one():
    engine = FakeEngine(["prefill", "decode", "decode"])
    turns, inside = EngineSteps(engine), []
    engine.on_step = lambda: inside.append(turns.load())
    before = turns.load()
    assert (before.running, before.waiting, before.kv_pages_used, before.kv_pages) == (2, 1, 3, 8)
    assert (before.num_steps, before.can_step) == (0, False)
    turns.post(lambda engine: time.sleep(0.05))
    assert turns.load().can_step
    assert turns.turn(lambda events: None)
    assert all(load.can_step and not load.num_steps for load in inside)
    after = turns.load()
    assert (after.num_steps, after.can_step) == (1, False)
    assert after.longest_step_s >= 0.05


def test_where_ranks_step_together_commands_are_no_steps(monkeypatch):
    """What they wait for is the others: without a plan none of them gets any further."""
    turns = EngineSteps(FakeEngine([]), lambda outlook: None)
    monkeypatch.setattr(turns, "_step_together", lambda *_: None)
    for _ in range(3):
        turns.post(lambda engine: None)
        turns.turn(lambda events: None)
    assert turns.load().num_steps == 0
    turns.take_plan(StepPlan(step=1, num_rows=1))
    turns.turn(lambda events: None)
    assert turns.load().num_steps == 1
    turns._outlook = Outlook(step=2, decode=1)
    assert turns.load().can_step
