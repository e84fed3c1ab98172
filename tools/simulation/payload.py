"""Rows as numbers: who wrote them can be read off. A row of embeddings is a positive number, its DeepStack the same
negated; both tell the attempt and the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec

from qwen3vl_disagg.protocol.layout import item_ranges
from qwen3vl_disagg.protocol.messages import Header, Resume, Room
from qwen3vl_disagg.protocol.session_events import Attempt

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
    grant: Room
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


def make_payload(names: Names, attempt: Attempt, grant: Room, total: int) -> Payload:
    """The rows that a grant asks for, as their encoder knows them."""
    first = names.row(attempt, 0)
    rows = [*range(first + grant.row_start, first + grant.row_stop)]
    deepstack = [*range(-first - grant.deepstack_start, -first - grant.deepstack_stop, -1)]
    aux = None if isinstance(grant, Resume) else (total, attempt[2])
    return Payload(attempt, grant, aux, deepstack, rows, len(rows) + len(deepstack))


def wrong_header(rng: Random, header: Header, others: Sequence[Attempt]) -> Header:
    """One that says something else than what was granted, of the same item or of another of `others`."""
    change = msgspec.structs.replace
    kind = rng.choice(("grid", "total", "rows", "levels", "digests", "digests", "request", "attempt", "other"))
    more = rng.choice((-1, 1))
    if kind == "grid":
        t, h, w = header.grid
        return change(header, grid=rng.choice(((t, w, h), (t + 1, h, w), (t, h, w + 2))))
    if kind == "total":
        return change(header, total_rows=header.total_rows + more)
    if kind == "rows":
        return change(
            header, **rng.choice(({"row_start": header.row_start + more}, {"row_stop": header.row_stop + more}))
        )
    if kind == "levels":
        stop = header.deepstack_start if header.deepstack_stop > header.deepstack_start else header.row_stop
        return change(header, deepstack_stop=stop)
    if kind == "digests":
        digests = rng.choice(("row_digests", "deepstack_digests"))
        return change(header, **{digests: [*getattr(header, digests), 0]})
    if kind == "other" and others:
        request_id, item, attempt = rng.choice(others)
        return change(header, request_id=request_id, item=item, attempt=attempt)
    if kind == "attempt":
        return change(header, attempt=header.attempt + more)
    return change(header, request_id="nobody's")
