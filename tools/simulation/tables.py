"""The tables of docs/simulation.md, generated.

    python -m tools.simulation.tables docs/simulation.md

plants every bug on seeds 0 to 9, counts the schedules until it is found, and writes the tables between their marks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.simulation.mutants import MUTANTS, Mutant
from tools.simulation.runner import mutant_names, simulate

SEEDS = range(10)
MOST_SCHEDULES = 1000
_END = "<!-- end -->"
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
        lines = ["| " + " | ".join((*heads, measured)) + " |", "|---" * (len(heads) + 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        before, start, rest = text.partition(_start(table))
        _, end, after = rest.partition(_END)
        if not end:
            raise ValueError(f"the document has no place for the table `{table}`")
        text = before + start + "\n".join(lines) + "\n" + end + after
    return text


def _start(table: str) -> str:
    return f"<!-- table: {table} -->\n"


def read_table(text: str, table: str) -> list[tuple[str, ...]]:
    """The rows of a table in the document, cell by cell, without its head."""
    body = text.partition(_start(table))[2].partition(_END)[0]
    lines = [line.strip("|").split("|") for line in body.splitlines()[2:]]
    return [tuple(cell.strip() for cell in cells) for cells in lines]


def schedules_until_found(name: str, seed: int) -> int | None:
    result = simulate(MOST_SCHEDULES, seed, name)
    return result.schedules if result.violation is not None else None


def main(path: Path) -> None:
    """Measure, and write the tables in place."""
    found: dict[str, list[int | None]] = {}
    for name in mutant_names():
        found[name] = [schedules_until_found(name, seed) for seed in SEEDS]
        print(name, *found[name], file=sys.stderr, flush=True)
    path.write_text(write_tables(path.read_text(), found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
