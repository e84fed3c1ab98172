"""Events of a machine: one at a time, in order, each done before the next."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.protocol.pump import Pump


class Script:
    """A machine whose events are numbers: n asks for the actions (n, 0) and (n, 1)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[object] = []
        self.pump = Pump(self.decide, self.perform, lambda: self.now)

    def decide(self, event: int, now: float) -> list[tuple[int, int]]:
        self.log.append((event, now))
        return [(event, 0), (event, 1)]

    def perform(self, action: tuple[int, int]) -> None:
        self.log.append(action)
        event, part = action
        if event == 1 and part == 0:  # comes up in the middle
            self.now += 1.0
            self.pump.handle(2)
            self.pump.handle(3)
        elif event == 4:
            self.pump.handle(5)
            raise ZeroDivisionError


def test_what_comes_up_meanwhile_waits_until_all_is_done_and_sees_the_time_as_it_is_then():
    script = Script()
    script.pump.handle(1)
    assert script.log == [(1, 0.0), (1, 0), (1, 1), (2, 1.0), (2, 0), (2, 1), (3, 1.0), (3, 0), (3, 1)]


def test_a_failure_ends_its_event_and_what_waits_goes_on_with_the_next():
    script = Script()
    with pytest.raises(ZeroDivisionError):
        script.pump.handle(4)
    assert script.log == [(4, 0.0), (4, 0)]
    script.pump.handle(6)
    assert script.log[2:] == [(5, 0.0), (5, 0), (5, 1), (6, 0.0), (6, 0), (6, 1)]
