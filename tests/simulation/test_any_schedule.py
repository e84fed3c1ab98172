"""Any schedule: hypothesis chooses the first random numbers of one (its cluster, its faults, its requests and what
happens first), and shrinks what fails."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tools.simulation.schedule import run_schedule

NUM_EXAMPLES = settings().max_examples


class Fed(Random):
    """The numbers it is given; when they are used up, those of a seed, others for each list of numbers."""

    def __init__(self, numbers: list[float], seed: int) -> None:
        super().__init__(f"{seed} {numbers}")
        self._numbers = numbers[::-1]

    def random(self) -> float:
        return self._numbers.pop() if self._numbers else super().random()


@given(numbers=st.lists(st.floats(0, 1, exclude_max=True, width=32), max_size=40), seed=st.integers(0, 2**32))
@settings(max_examples=max(NUM_EXAMPLES, min(8 * NUM_EXAMPLES, 2000)))
def test_no_schedule_that_can_be_chosen_breaks_an_invariant(numbers, seed):
    assert run_schedule(Fed(numbers, seed)).violation is None
