"""One item on the language side: its state, the room it is given, the header it accepts. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.disagg.allocator import BlockAllocator, Lease, Want
from qwen3vl_disagg.disagg.layout import MAX_RUNS, RowSizes, blocks_for, row_runs
from qwen3vl_disagg.disagg.messages import Grant, Header, Resume
from qwen3vl_disagg.disagg.session_events import Attempt, Receive

IDLE, WAITING, GRANTED, RECEIVING, HELD, DONE = "idle", "waiting", "granted", "receiving", "held", "done"


@dataclass(slots=True)
class Session:
    """One item. `received` rows are here or were consumed; `grant` is the one under way, or whose rows are held."""

    request_id: str
    item: int
    visual: VisualItem
    state: str = IDLE
    attempt: int = 0
    encode_rank: int = -1
    received: int = 0
    grant: Grant | None = None
    room: Lease | None = None
    hold: Lease | None = None
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
    def is_fully_granted(self) -> bool:
        """Needs no more room."""
        return self.state == DONE or (self.grant is not None and self.grant.row_stop == self.visual.num_rows)


@dataclass(slots=True)
class RequestSessions:
    sessions: list[Session]
    deadline: float


def take_room(session: Session, allocator: BlockAllocator, block_size: int, sizes: RowSizes) -> Grant | None:
    """Leases for as many of the missing rows as there are free blocks, and the grant that says so; None without any.

    The DeepStack of the whole item goes with the initial transfer and stays, unless its pool (or one frame) could
    never take it: then it is ranged, each grant has the DeepStack of its own rows.
    """
    total, start = session.visual.num_rows, session.received
    deepstack_blocks = blocks_for(total, block_size) if sizes.deepstack_embeddings else 0
    is_ranged = deepstack_blocks > min(allocator.totals["deepstack"], MAX_RUNS)
    most = max(1, MAX_RUNS // blocks_for(block_size, sizes.max_run_rows))
    blocks = min(blocks_for(total - start, block_size), allocator.num_free("rows"), most)
    if is_ranged:
        blocks = min(blocks, allocator.num_free("deepstack"))
    if blocks < 1:
        return None
    room = Want(rows=blocks, deepstack=blocks if is_ranged else 0)
    if session.hold is None:
        hold = Want(deepstack=0 if is_ranged else deepstack_blocks, slots=1)
        both = allocator.grant(session.request_id, hold, room)
        if both is None:
            return None
        session.hold, session.room = both
    else:
        alone = allocator.grant(session.request_id, room)
        if alone is None:
            return None
        [session.room] = alone
    stop = min(total, start + blocks * block_size)
    deepstack = (start, stop if is_ranged else start)
    if start == 0 and deepstack_blocks and not is_ranged:
        deepstack = (0, total)
    table = session.room.deepstack if is_ranged else session.hold.deepstack
    runs = row_runs(session.room.rows, block_size, stop - start, sizes.max_run_rows)
    deepstack_runs = row_runs(table, block_size, deepstack[1] - deepstack[0], sizes.max_deepstack_run_rows)
    return (Resume if start else Grant)(
        request_id=session.request_id,
        item=session.item,
        attempt=session.attempt,
        row_start=start,
        row_stop=stop,
        deepstack_start=deepstack[0],
        deepstack_stop=deepstack[1],
        row_runs=[b - a for a, b in runs],
        deepstack_runs=[b - a for a, b in deepstack_runs],
    )


def give_back_room(session: Session, allocator: BlockAllocator) -> None:
    """A grant came to nothing: its blocks; and, as long as nothing was received, all else too."""
    if session.room is not None:
        allocator.free(session.room)
    if session.hold is not None and session.received == 0:
        allocator.free(session.hold)
        session.hold = None
    session.room = session.grant = None


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
