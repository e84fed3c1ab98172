"""One item on the language side: its state, the rows it needs, the header it accepts, and how it gets room. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.allocator import BlockAllocator, Lease, Want
from qwen3vl_disagg.protocol.layout import MAX_RUNS, RowSizes, blocks_for, row_runs
from qwen3vl_disagg.protocol.messages import Grant, Header, Resume
from qwen3vl_disagg.protocol.session_events import Attempt, Expect, Receive
from qwen3vl_disagg.protocol.states import State

IDLE, WAITING, GRANTED, RECEIVING, HELD, DONE = "idle", "waiting", "granted", "receiving", "held", "done"

STATES = {
    IDLE: State("no encode rank is at it", "assignment", (IDLE, WAITING)),
    WAITING: State(
        "for room, or for the link",
        "grant; with rows received: resume",
        (WAITING, GRANTED, IDLE),
        lambda limits: limits.suspend_s,
        "without a link, then lost",
    ),
    GRANTED: State(
        "grant is out",
        "header: receiving; link down: waiting",
        (RECEIVING, WAITING, IDLE),
        lambda limits: limits.grant_s,
        "then abort, lost",
    ),
    RECEIVING: State(
        "receives are posted",
        "payload here: held; broken: waiting, the third time lost; wrong: nack, lost",
        (HELD, WAITING, IDLE),
        lambda limits: 2 * limits.payload_s,
        "more by its size, then the link is broken",
    ),
    HELD: State("the engine reads the rows", "consumed: waiting (more rows) or done", (WAITING, DONE, IDLE)),
    DONE: State("all consumed, or none needed", "end of the request; needed again: idle", (IDLE,)),
}
"""Of an item on the language side. The request's own deadline ends each of them."""


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
    due: float = FIRST_COME
    state: str = IDLE
    attempt: int = 0
    encode_rank: int = -1
    is_alone: bool = False
    first: int = 0
    received: int = 0
    grant: Grant | Resume | None = None
    room: Lease | None = None
    hold: Lease | None = None
    quarantined_as: Attempt | None = None
    """`hold` and `room` are in quarantine since this attempt, and will come back."""
    num_broken: int = 0
    """Payloads that broke since rows came last."""
    deadline: float = math.inf
    receiving_since: float = math.inf

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
        """Rows below `first` are not needed. An item of which none is needed is done; later ones do not wait for it."""
        self.first = self.received = first
        self.state, self.quarantined_as = DONE if first == self.visual.num_rows else IDLE, None


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


def receive_job(session: Session, header: Header, epoch: int, payload_s: float) -> Receive:
    """What to post for a granted session whose header is right."""
    grant, room, hold = session.grant, session.room, session.hold
    if grant is None or room is None or hold is None:
        raise RuntimeError(f"session {session.key} is granted but holds nothing")
    return Receive(session.encode_rank, epoch, header, grant, session.visual, room, hold, payload_s)


def payload_bytes(grant: Grant | Resume, sizes: RowSizes) -> int:
    rows, deepstack_rows = grant.row_stop - grant.row_start, grant.deepstack_stop - grant.deepstack_start
    return sizes.transfer_bytes(rows, deepstack_rows, aux=not isinstance(grant, Resume))


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


# ---- room ----

Leases = dict[Attempt, tuple[Lease, ...]]


def fits_whole(session: Session, allocator: BlockAllocator, block_size: int, sizes: RowSizes) -> bool:
    """Whether all that an item can ever want is free now."""
    blocks = blocks_for(session.total - session.first, block_size)
    deepstack = blocks if sizes.deepstack_embeddings else 0
    wanted = {"rows": blocks, "deepstack": deepstack, "slots": 1}
    is_one_grant = blocks <= MAX_RUNS // blocks_for(block_size, sizes.max_run_rows)
    return is_one_grant and all(allocator.num_free(pool) >= count for pool, count in wanted.items())


def in_line(
    requests: Iterable[RequestSessions], links: Container[int], can_start_anew: Callable[[Session], bool]
) -> list[Session]:
    """The first item of each request that lacks room and could use some now. One whose room is in quarantine waits for
    it, unless it can have all it wants anew: then it wants no more, and nobody waits for it.

    Those that have kept their room need none from anybody and come first; then those that have begun; each in the
    order in which they are due, then in that of the requests.
    """
    line = []
    for request in requests:
        for session in request.sessions:
            if not session.is_fully_granted:
                is_quarantined = session.quarantined_as is not None and not can_start_anew(session)
                if session.encode_rank in links and session.state != IDLE and not is_quarantined:
                    line.append(session)
                break
    return (
        line
        if len(line) < 2
        else sorted(line, key=lambda s: (s.state != WAITING or s.room is None, s.hold is None, s.due))
    )


def take_room(
    session: Session, allocator: BlockAllocator, block_size: int, sizes: RowSizes, now: float
) -> Grant | Resume | None:
    """Leases for as many of the missing rows as there are free blocks, and the grant that says so; None without any.
    Room that the item has kept is used again.

    The DeepStack of all rows that are needed goes with the initial transfer and stays, unless its pool (or one frame)
    could never take it: then it is ranged, each grant has the DeepStack of its own rows.
    """
    total, start, is_initial = session.total, session.received, session.received == session.first
    deepstack_blocks = blocks_for(total - session.first, block_size) if sizes.deepstack_embeddings else 0
    is_ranged = deepstack_blocks > min(allocator.totals["deepstack"], MAX_RUNS)
    if session.room is None or session.hold is None:
        most = max(1, MAX_RUNS // blocks_for(block_size, sizes.max_run_rows))
        blocks = min(blocks_for(total - start, block_size), allocator.num_free("rows"), most)
        if is_ranged:
            blocks = min(blocks, allocator.num_free("deepstack"))
        if blocks < 1:
            return None
        wants = [Want(rows=blocks, deepstack=blocks if is_ranged else 0)]
        if session.hold is None:
            wants.append(Want(deepstack=0 if is_ranged else deepstack_blocks, slots=1))
        leases = allocator.grant(session.request_id, *wants)
        if leases is None:
            return None
        session.room, session.hold = leases[0], leases[1] if len(leases) > 1 else session.hold
        session.quarantined_as = None
    if session.hold is None:
        raise RuntimeError(f"{session.key} has room for rows, but no slot")
    stop = min(total, start + len(session.room.rows) * block_size)
    deepstack = (start, stop if is_ranged else start)
    if is_initial and deepstack_blocks and not is_ranged:
        deepstack = (start, total)
    table = session.room.deepstack if is_ranged else session.hold.deepstack
    runs = row_runs(session.room.rows, block_size, stop - start, sizes.max_run_rows)
    deepstack_runs = row_runs(table, block_size, deepstack[1] - deepstack[0], sizes.max_deepstack_run_rows)
    rows: dict[str, Any] = {
        **session.ids,
        "row_start": start,
        "row_stop": stop,
        "deepstack_start": deepstack[0],
        "deepstack_stop": deepstack[1],
        "row_runs": [b - a for a, b in runs],
        "deepstack_runs": [b - a for a, b in deepstack_runs],
    }
    if not is_initial:
        return Resume(**rows)
    timeout_s, due_s = session.request_deadline - now, session.due - now
    return Grant(**rows, visual=session.visual, timeout_s=timeout_s, is_alone=session.is_alone, due_s=due_s)


def end_quarantine(where: Leases, key: Attempt, session: Session | None, allocator: BlockAllocator) -> bool:
    """Blocks in quarantine under `key`, if there are any, go back to the session that waits for them, or to the
    pool."""
    leases = where.pop(key, ())
    is_awaited = session is not None and session.quarantined_as == key
    for lease in leases:
        (allocator.reclaim if is_awaited else allocator.release)(lease)
    if session is not None and leases and is_awaited:
        session.quarantined_as, (session.room, session.hold) = None, leases
    return bool(leases)
