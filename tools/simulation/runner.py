"""Many schedules, one after another: `python tools/simulate.py`."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.protocol import encode_sessions, session
from tools.simulation import (
    mutants_of_accounts,
    mutants_of_counts,
    mutants_of_deadlines,
    mutants_of_invariants,
    mutants_of_kept,
    mutants_of_others,
    mutants_of_partial_items,
    mutants_of_review,
    mutants_of_routing,
)
from tools.simulation.mutants import MUTANTS, planted
from tools.simulation.schedule import Outcome, run_schedule
from tools.simulation.world import FAULTS

MODULES = (
    mutants_of_deadlines,
    mutants_of_invariants,
    mutants_of_kept,
    mutants_of_others,
    mutants_of_partial_items,
    mutants_of_review,
    mutants_of_routing,
    mutants_of_counts,
    mutants_of_accounts,
)
"""Each registers its bugs when it is imported."""

_SPREAD = 1_000_003
"""Schedule i of seed s has the seed s * _SPREAD + i, so that runs of different seeds share nothing."""

LANGUAGE_STATES, ENCODE_STATES = tuple(session.STATES), tuple(encode_sessions.STATES)


@dataclass
class Result:
    """What came of a run; it ends at the first violation. With a bug planted: at the first one of the invariant that
    the bug names; `others` are those that were passed over."""

    schedules: int = 0
    events: int = 0
    seconds: float = 0.0
    answered: int = 0
    failed: int = 0
    table: Counter[tuple[str, str]] = field(default_factory=Counter)
    violation: Outcome | None = None
    replay: str | None = None
    others: Counter[str] = field(default_factory=Counter)


def mutant_names() -> list[str]:
    """All planted bugs, in a fixed order."""
    return sorted(MUTANTS)


def simulate(
    schedules: int,
    seed: int,
    mutant: str | None = None,
    *,
    first: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Result:
    """Run `schedules` schedules of `seed`, from number `first` on. InputError for a bug that does not exist.

    A planted bug is found when the invariant that it names is broken; what else it breaks is passed over.
    """
    if mutant is not None and mutant not in mutant_names():
        raise InputError(f"--mutant {mutant}: no such bug; `--mutant list` names them", param="mutant")
    result = Result()
    started = time.perf_counter()
    with planted(mutant), _few_collections():
        for number in range(first, first + schedules):
            outcome = run_schedule(Random(seed * _SPREAD + number))
            result.schedules += 1
            result.events += outcome.events
            result.answered += outcome.num_answered
            result.failed += outcome.num_failed
            result.table.update(outcome.table)
            if on_progress is not None:
                on_progress(1)
            if outcome.violation is not None:
                if mutant is not None and outcome.invariant != MUTANTS[mutant].fires:
                    result.others[str(outcome.invariant)] += 1
                    continue
                result.violation = outcome
                bug = f" --mutant {mutant}" if mutant else ""
                result.replay = f"python tools/simulate.py --schedules 1 --seed {seed} --first {number}{bug}"
                break
    result.seconds = time.perf_counter() - started
    return result


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """A schedule is short and makes much: most of what is looked at would be alive."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def states_hit_by(fault: str) -> tuple[str, ...]:
    """Of the sessions of the ranks that it strikes; what it does to the other end shows there as a break."""
    if fault in ("kill-encode", "away", "leave", "poison"):
        return ENCODE_STATES
    return LANGUAGE_STATES if fault == "kill-language" else (*LANGUAGE_STATES, *ENCODE_STATES)


def fault_table(result: Result) -> str:
    """How often each fault hit a session in each state: a Markdown table."""
    states = [*LANGUAGE_STATES, *ENCODE_STATES]
    lines = ["| fault | " + " | ".join(states) + " |", "|---" * (len(states) + 1) + "|"]
    for fault in FAULTS:
        cells = [str(result.table[fault, state]) if state in states_hit_by(fault) else "-" for state in states]
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
