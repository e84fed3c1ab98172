"""A tower beside a decoder: whose turn it is, and how much of the tower goes beside a decode step."""

from __future__ import annotations

import threading
import time

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode import shared_gpu
from qwen3vl_disagg.encode.shared_gpu import FIRST, LOOK_AGAIN, MOST, STEPS_A_BLOCK, TowerPace, TowerTurns


@pytest.mark.parametrize(("alone_ms", "per_token_ms"), [(10.0, 0.01), (10.0, 0.001), (5.0, 0.1), (40.0, 0.02)])
@pytest.mark.parametrize("slowdown", [1.2, 1.5, 3.0])
def test_the_budget_comes_to_what_makes_a_step_so_much_slower(slowdown, alone_ms, per_token_ms):
    pace = TowerPace(slowdown)
    for _ in range(3):
        pace.decoded(alone_ms / 1e3, 0.0)
    for _ in range(60):
        pace.decoded((alone_ms + per_token_ms * pace.budget) / 1e3, pace.budget)
    wanted = min((slowdown - 1) * alone_ms / per_token_ms, MOST)
    assert pace.budget == pytest.approx(wanted, rel=0.05)


def test_what_says_nothing_changes_nothing():
    pace = TowerPace(1.5)
    pace.decoded(1.0, 500.0)  # nobody knows how long it takes alone
    assert pace.budget == FIRST
    for seconds in (0.01, 0.01, 5.0, 0.01, 0.01):  # one waited for much
        pace.decoded(seconds, 0.0)
    pace.decoded(0.01, FIRST / 2)  # of a little beside it, which went well
    assert pace.budget == FIRST
    pace.decoded(0.06, FIRST / 2)  # of a little that was too much
    assert pace.budget == FIRST / 2


class Played:
    """A tower on a thread of its own that asks for blocks, and an engine that steps when it is told to."""

    def __init__(self, cost: float, budget: float, blocks: int) -> None:
        self.log: list[str] = []
        self.turns = TowerTurns(TowerPace(1.5), lambda: self.log.append("wait"))
        self.turns.pace.budget = budget
        self._cost, self._blocks = cost, blocks
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        for _ in range(self._blocks):
            self.turns.before(self._cost)
            self.log.append("block")
        self.turns.ended()

    def settle(self) -> None:
        """Until the tower has ended, or waits for a step."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with self.turns._told:
                if self.turns._told._waiters or not self.thread.is_alive():
                    return
            time.sleep(0.001)
        raise TimeoutError("the tower neither ends nor waits")

    def step(self, *, is_decoding: bool = True) -> None:
        self.log.append("step")
        self.turns.stepped(None, is_decoding=is_decoding)
        self.settle()

    def blocks(self) -> list[int]:
        """Before the first step, and behind each."""
        return [part.count("b") for part in "".join(word[0] for word in self.log).split("s")]


@pytest.mark.parametrize(
    ("cost", "budget", "expected"),
    [
        (100.0, 100.0, [1] * 8),
        (100.0, 300.0, [3] * 8),
        (100.0, 250.0, [3, 2, 3, 2, 3, 2, 3, 2]),
        (100.0, 50.0, [1, 0] * 4),
        (100.0, 1.0, [1, 0] * 4),
    ],
)
def test_between_two_decode_steps_goes_a_budget_of_blocks(monkeypatch, cost, budget, expected):
    """What is more than the budget waits for the steps that it takes, for one or two at most: images come to an end.
    The device is waited for before more is asked for."""
    monkeypatch.setattr(shared_gpu, "STALE_S", 30.0)
    assert STEPS_A_BLOCK == 2
    played = Played(cost, budget, 200)
    played.turns.stepped(None, is_decoding=True)
    played.turns._credit = 0.0
    played.thread.start()
    played.settle()
    for _ in range(8):
        played.step()
    assert played.blocks() == [0, *expected]
    waited = "".join(word[0] for word in played.log)
    assert "bs" not in waited
    played.step(is_decoding=False)
    played.thread.join(10)
    assert not played.thread.is_alive()


def test_where_nobody_decodes_it_waits_for_the_device_alone():
    played = Played(100.0, 300.0, 9)
    played.thread.start()
    played.thread.join(10)
    assert "".join(word[0] for word in played.log) == "wbbbwbbbwbbb"


def test_an_engine_that_is_not_stepped_any_more_is_waited_for_once(monkeypatch):
    """Whoever has the answers may pause, and images that others wait for go on."""
    monkeypatch.setattr(shared_gpu, "STALE_S", 0.2)
    played = Played(100.0, 100.0, 20)
    played.turns.stepped(None, is_decoding=True)
    started = time.monotonic()
    played.thread.start()
    played.thread.join(10)
    assert not played.thread.is_alive()
    assert 0.2 <= time.monotonic() - started < 0.2 * 8


def test_what_still_runs_counts_in_the_next_step():
    told = []
    turns = TowerTurns(TowerPace(1.5), lambda: None)
    turns.pace.decoded = lambda seconds, work: told.append(work)
    turns.before(100.0)
    turns.stepped(1.0, is_decoding=True)
    turns.stepped(1.0, is_decoding=True)
    turns.ended()
    turns.stepped(1.0, is_decoding=True)
    turns.stepped(1.0, is_decoding=True)
    assert told == [100.0, 100.0, 100.0, 0.0]


def test_now_and_then_a_step_is_alone_so_that_what_it_takes_is_known(monkeypatch):
    """Here it becomes faster while images come without an end, and the tower gets less beside it."""
    monkeypatch.setattr(shared_gpu, "STALE_S", 30.0)
    played = Played(100.0, 100.0, 400)
    played.turns.stepped(None, is_decoding=True)
    played.thread.start()
    played.settle()
    alone_s = 1.0
    for number in range(4 * LOOK_AGAIN):
        played.log.append("step")
        busy = played.turns._beside > 0
        played.turns.stepped(alone_s + busy * 0.5, is_decoding=True)
        played.settle()
        alone_s = 1.0 if number < 2 * LOOK_AGAIN else 0.1
    quiet = [number for number, count in enumerate(played.blocks()) if not count]
    assert len(quiet) >= 3
    assert played.turns.pace.budget < 100.0
    played.turns.stepped(None, is_decoding=False)


@pytest.mark.parametrize("value", [1.0, 0.0, -2.0, 101.0, float("nan")])
def test_a_slowdown_that_cannot_be_is_refused(value):
    with pytest.raises(InputError, match="--tower-slowdown"):
        EncodeOptions(tower_slowdown=value).check()
