"""Turns: who else takes them comes between two decode steps once."""

from __future__ import annotations

import threading

from qwen3vl_disagg.core.turns import Turns
from qwen3vl_disagg.language.engine_thread import EngineThread


class FakeEngine:
    """Prefill and decode in turn, until there is no work."""

    def __init__(self, steps: list[str]) -> None:
        self.steps, self.log = steps, []

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
        return [self.log[-1]]


def run(steps: list[str], *, with_turns: bool) -> list[str]:
    """What happened, in order; `turn` where one began."""
    engine, done, number = FakeEngine(list(steps)), threading.Event(), len(steps)
    seen: list[str] = []

    class Logged:
        def __enter__(self):
            engine.log.append("turn")

        def __exit__(self, *_):
            return None

    def on_events(events):
        assert len(events) == 1  # each step is told before the next one
        seen.extend(events)
        if len(seen) == number:
            done.set()

    thread = EngineThread(engine, on_events, lambda error: done.set(), Logged() if with_turns else None)
    thread.start()
    assert done.wait(10)
    assert thread.stop(10)
    assert seen == steps
    return engine.log


def test_a_prefill_step_and_the_decode_step_it_owes_are_one_turn():
    log = run(["prefill", "decode", "decode", "prefill", "decode"], with_turns=True)
    assert log == ["turn", "prefill", "decode", "turn", "decode", "turn", "prefill", "decode"]


def test_what_needs_no_step_waits_for_no_turn():
    engine, told, taken = FakeEngine([]), threading.Event(), Turns()
    thread = EngineThread(engine, lambda events: told.set(), lambda error: None, taken)
    with taken:  # somebody else has it
        thread.start()
        thread.post(lambda engine: ["answer"])
        assert told.wait(10)
        assert thread.stop(10)


def test_without_turns_there_are_none():
    assert run(["prefill", "decode", "prefill"], with_turns=False) == ["prefill", "decode", "prefill"]
