"""One item on the language side: its state, the rows it needs, and the header it accepts. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.allocator import Lease
from qwen3vl_disagg.protocol.messages import Grant, Header, Resume
from qwen3vl_disagg.protocol.session_events import Attempt, Expect, Receive

IDLE, WAITING, GRANTED, RECEIVING, HELD, DONE = "idle", "waiting", "granted", "receiving", "held", "done"


@dataclass(slots=True)
class Session:
    """One item. Rows from `first` on are needed; those below `received` are here or were consumed. `grant` is the one
    under way, or whose rows are held.

    `hold` and `room` stay with the item, through lost links and attempts, until its rows are consumed.
    """

    request_id: str
    item: int
    visual: VisualItem
    request_deadline: float
    state: str = IDLE
    attempt: int = 0
    encode_rank: int = -1
    is_alone: bool = False
    first: int = 0
    received: int = 0
    grant: Grant | Resume | None = None
    room: Lease | None = None
    hold: Lease | None = None
    apart: Attempt | None = None
    """`hold` and `room` are in quarantine since this attempt, and will come back."""
    num_broken: int = 0
    """Payloads that broke since rows came last."""
    deadline: float = math.inf

    @property
    def key(self) -> Attempt:
        return self.request_id, self.item, self.attempt

    @property
    def ids(self) -> dict[str, Any]:
        """What every frame about the attempt begins with."""
        return {"request_id": self.request_id, "item": self.item, "attempt": self.attempt}

    @property
    def total(self) -> int:
        return self.visual.num_rows

    @property
    def is_under_way(self) -> bool:
        """Somebody sends, or will send, rows of this attempt."""
        return self.state not in (IDLE, DONE) and self.received < self.visual.num_rows

    @property
    def is_fully_granted(self) -> bool:
        """Needs no more room."""
        return self.state == DONE or (self.grant is not None and self.grant.row_stop == self.visual.num_rows)

    def need_from(self, first: int) -> None:
        """Rows below `first` are not needed. An item of which none are is done, and in nobody's way."""
        self.first = self.received = first
        self.state, self.apart = DONE if first == self.visual.num_rows else IDLE, None


@dataclass(slots=True)
class RequestSessions:
    sessions: list[Session]
    deadline: float


def first_rows(event: Expect) -> list[int]:
    """The first row that is needed of each item; the number of its rows where none is. ValueError for a row that an
    item does not have.

    Of items of 4, 10 and 6 rows, [1, 2] lacking from rows [3, 0]: [4, 3, 0].
    """
    rows = [visual.num_rows for visual in event.items]
    firsts = list(rows)
    for index, first in zip(event.lacking, event.first_rows or [0] * len(event.lacking), strict=True):
        if not 0 <= index < len(rows):
            raise ValueError(f"{event.request_id} lacks item {index} of {len(rows)}")
        if not 0 <= first < rows[index]:
            raise ValueError(f"{event.request_id} needs item {index} from row {first} of {rows[index]}")
        firsts[index] = first
    return firsts


def receive_job(session: Session, header: Header, epoch: int) -> Receive:
    """What to post for a granted session whose header is right."""
    grant, room, hold = session.grant, session.room, session.hold
    if grant is None or room is None or hold is None:
        raise RuntimeError(f"session {session.key} is granted but holds nothing")
    return Receive(session.encode_rank, epoch, header, grant, session.visual, room, hold)


def header_problem(session: Session, header: Header) -> str | None:
    """What a header says other than the prompt and the grant do."""
    grant, visual = session.grant, session.visual
    if grant is None:
        return "nothing was granted"
    pairs = {
        "grid": (tuple(visual.grid), tuple(header.grid)),
        "total_rows": (visual.num_rows, header.total_rows),
        "rows": ((grant.row_start, grant.row_stop), (header.row_start, header.row_stop)),
        "deepstack_rows": (
            (grant.deepstack_start, grant.deepstack_stop),
            (header.deepstack_start, header.deepstack_stop),
        ),
        "runs": (len(grant.row_runs), len(header.row_digests)),
        "deepstack_runs": (len(grant.deepstack_runs), len(header.deepstack_digests)),
    }
    wrong = [f"{name}: expected {mine}, got {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
    return "; ".join(wrong) or None
