"""Rows as numbers: who wrote them can be read off. A row of embeddings is a positive number, its DeepStack the same
negated; both tell the attempt and the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3vl_disagg.disagg.layout import item_ranges
from qwen3vl_disagg.disagg.messages import Grant, Resume
from qwen3vl_disagg.disagg.session_events import Attempt

MAX_ROWS = 64


class Names:
    """A number for each attempt."""

    def __init__(self) -> None:
        self._numbers: dict[Attempt, int] = {}

    def row(self, attempt: Attempt, row: int) -> int:
        number = self._numbers.setdefault(attempt, len(self._numbers) + 1)
        return number * MAX_ROWS + row


@dataclass(slots=True)
class Payload:
    """What one `SendPayload` puts on a link."""

    attempt: Attempt
    grant: Grant
    aux: tuple[int, int] | None
    """(rows, attempt)"""
    deepstack: list[int]
    rows: list[int]
    num_bytes: int = field(default=0)


def run_digest(cells: Sequence[int], start: int) -> int:
    """Like the real one: each row with a weight for its place in the item."""
    return sum([(2 * row + 1) * cell for row, cell in enumerate(cells, start)])


def run_digests(cells: Sequence[int], runs: Sequence[int], start: int) -> list[int]:
    """`cells` are rows `start ..` of an item; one digest for each run."""
    return [run_digest(cells[a - start : b - start], a) for a, b in item_ranges(runs, start)]


def make_payload(names: Names, attempt: Attempt, grant: Grant, total: int) -> Payload:
    """The rows that a grant asks for, as their encoder knows them."""
    rows = [names.row(attempt, row) for row in range(grant.row_start, grant.row_stop)]
    deepstack = [-names.row(attempt, row) for row in range(grant.deepstack_start, grant.deepstack_stop)]
    aux = None if isinstance(grant, Resume) else (total, attempt[2])
    return Payload(attempt, grant, aux, deepstack, rows, len(rows) + len(deepstack))
