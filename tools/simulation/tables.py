"""The tables of docs/simulation.md and docs/transfer.md, generated.

    python -m tools.simulation.tables states docs/transfer.md
    python -m tools.simulation.tables bugs docs/simulation.md

The second plants every bug on seeds 0 to 9, and counts the schedules until it is found. Tables stand between marks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen3vl_disagg.protocol import encode_sessions, session
from qwen3vl_disagg.protocol.session_events import SessionLimits
from tools.doc_tables import END, put_table, start
from tools.simulation.mutants import MUTANTS, Mutant
from tools.simulation.runner import mutant_names, simulate

SEEDS = range(10)
MOST_SCHEDULES = 1000
_HEADS = {
    "bugs": ("bug", "invariant", "stands for", "what it does"),
    "bugs of the simulator": ("bug", "invariant", "what it does"),
}
"""Name of a table -> its columns; behind them stands what is measured."""


def static_rows(table: str) -> list[tuple[str, ...]]:
    """What a table says of each bug without running anything."""
    rows = [MUTANTS[name] for name in mutant_names()]
    if table == "bugs":
        return [_row(bug) for bug in rows if not bug.is_of_simulator]
    return [(bug.name, bug.fires, bug.about) for bug in rows if bug.is_of_simulator]


def _row(bug: Mutant) -> tuple[str, ...]:
    return bug.name, bug.fires, bug.stands_for, bug.about


def write_tables(text: str, found: Mapping[str, Sequence[int | None]], seeds: Sequence[int] = SEEDS) -> str:
    """The document with both tables anew; `found[bug]`: schedules until it was found on each of the seeds, None if it
    was not. ValueError without their marks."""
    measured = f"schedules until it is found, seeds {', '.join(map(str, seeds))}"
    for table, heads in _HEADS.items():
        rows = [(*row, ", ".join(str(count or "not") for count in found[row[0]])) for row in static_rows(table)]
        text = put_table(text, table, (*heads, measured), rows)
    return text


def write_states(text: str) -> str:
    """The document with the states of both sides anew. ValueError without their marks."""
    for table, states in (("language states", session.STATES), ("encode states", encode_sessions.STATES)):
        rows = []
        for name, state in states.items():
            seconds = None if state.seconds is None else state.seconds(SessionLimits())
            deadline = "the request's" if seconds is None else f"{seconds:g} s, {state.then}"
            rows.append((name, state.meaning, state.leaves_by, deadline))
        text = put_table(text, table, ("state", "meaning", "leaves it by", "deadline"), rows)
    return text


def read_table(text: str, table: str) -> list[tuple[str, ...]]:
    """The rows of a table in the document, cell by cell, without its head."""
    body = text.partition(start(table))[2].partition(END)[0]
    lines = [line.strip("|").split("|") for line in body.splitlines()[2:]]
    return [tuple(cell.strip() for cell in cells) for cells in lines]


def schedules_until_found(name: str, seed: int) -> int | None:
    result = simulate(MOST_SCHEDULES, seed, name)
    return result.schedules if result.violation is not None else None


def main(which: str, path: Path) -> None:
    """Write the tables of `states`, or measure and write those of `bugs`, in place."""
    if which == "states":
        path.write_text(write_states(path.read_text()))
        return
    found: dict[str, list[int | None]] = {}
    for name in mutant_names():
        found[name] = [schedules_until_found(name, seed) for seed in SEEDS]
        print(name, *found[name], file=sys.stderr, flush=True)
    path.write_text(write_tables(path.read_text(), found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
