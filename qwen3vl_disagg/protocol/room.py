"""Who is next in line for room on a language rank, what it gets, and how it gets it back. Pure."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import msgspec

from qwen3vl_disagg.protocol.allocator import BlockAllocator, Lease, Want
from qwen3vl_disagg.protocol.layout import MAX_RUNS, RowSizes, blocks_for, row_runs
from qwen3vl_disagg.protocol.messages import Grant, Resume
from qwen3vl_disagg.protocol.session import IDLE, WAITING, RequestSessions, Session
from qwen3vl_disagg.protocol.session_events import Attempt

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
    order of the requests.
    """
    line = []
    for request in requests:
        for session in request.sessions:
            if not session.is_fully_granted:
                is_apart = session.apart is not None and not can_start_anew(session)
                if session.encode_rank in links and session.state != IDLE and not is_apart:
                    line.append(session)
                break
    return sorted(line, key=lambda s: (s.state != WAITING or s.room is None, s.hold is None))


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
        session.apart = None
    if session.hold is None:
        raise RuntimeError(f"{session.key} has room for rows, but no slot")
    stop = min(total, start + len(session.room.rows) * block_size)
    deepstack = (start, stop if is_ranged else start)
    if is_initial and deepstack_blocks and not is_ranged:
        deepstack = (start, total)
    table = session.room.deepstack if is_ranged else session.hold.deepstack
    runs = row_runs(session.room.rows, block_size, stop - start, sizes.max_run_rows)
    deepstack_runs = row_runs(table, block_size, deepstack[1] - deepstack[0], sizes.max_deepstack_run_rows)
    resume = Resume(
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
    if not is_initial:
        return resume
    return Grant(
        **msgspec.structs.asdict(resume),
        visual=session.visual,
        timeout_s=session.request_deadline - now,
        is_alone=session.is_alone,
    )


def end_quarantine(where: Leases, key: Attempt, session: Session | None, allocator: BlockAllocator) -> bool:
    """Blocks that were kept apart under `key`, if there are any, go back to the session that waits for them, or to the
    pool."""
    leases = where.pop(key, ())
    is_awaited = session is not None and session.apart == key
    for lease in leases:
        (allocator.reclaim if is_awaited else allocator.release)(lease)
    if session is not None and leases and is_awaited:
        session.apart, (session.room, session.hold) = None, leases
    return bool(leases)
