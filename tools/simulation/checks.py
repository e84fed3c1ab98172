"""The invariants I1 to I16 of the transfer protocol, checked after every event that could break them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qwen3vl_disagg.protocol import layout
from qwen3vl_disagg.protocol.allocator import POOLS, BlockAllocator
from qwen3vl_disagg.protocol.encode_sessions import ENCODING, HEADER, PARKED, READY, SENDING, SENT, Outgoing
from qwen3vl_disagg.protocol.link_state import LinkState
from qwen3vl_disagg.protocol.messages import Ack, Frame, Grant, Nack, Resume, Room
from qwen3vl_disagg.protocol.session import DONE, GRANTED, HELD, IDLE, WAITING, RequestSessions, Session
from qwen3vl_disagg.protocol.session_events import Attempt, EncodeEvent, FrameIn, Recall, Receive, RowsReady, Tick
from tools.simulation.payload import Payload
from tools.simulation.world import Violation

_SENDING = (READY, HEADER, SENDING, SENT)


def _pools(rank: Any) -> None:
    """I1: pools add up and are disjoint. Looked at when something has been taken or given back."""
    allocator = rank.sessions.allocator
    free, totals = allocator._free, allocator.totals
    num_free = len(free["rows"]), len(free["deepstack"]), len(free["slots"])
    mark = num_free, len(allocator._leases), len(allocator._quarantine), allocator._generation
    if mark == rank.pools_mark:
        return
    rank.pools_mark = mark
    rows, deepstack, slots = [*free["rows"]], [*free["deepstack"]], [*free["slots"]]
    for leases in (allocator.leases, allocator.quarantined):
        for lease in leases.values():
            rows += lease.rows
            deepstack += lease.deepstack
            slots += lease.slots
    for ids, total in ((rows, totals["rows"]), (deepstack, totals["deepstack"]), (slots, totals["slots"])):
        if len(ids) != total or len(set(ids)) != total:
            _no_quarantined_is_granted(allocator)
            raise Violation("I1", f"{sorted(ids)} should be each of {total} once")


def language_side(rank: Any) -> None:
    """I1, I2, I4, I11, I12: pools add up; received <= granted <= total; nothing without a deadline."""
    sessions = rank.sessions
    allocator = sessions.allocator
    _pools(rank)
    entered, links = rank.ledger.entered, sessions.links
    num_held, is_waiting = 0, False
    for request in sessions.requests.values():
        for session in request.sessions:
            state = session.state
            if session.room is not None:
                num_held += 1
            if session.hold is not None:
                num_held += 1
            if (state is WAITING or state is IDLE) and session.grant is not None:
                raise Violation("I4", f"{session.key} is {state} and has a grant")
            if (
                session.quarantined_as is not None
                and session.quarantined_as not in sessions.pending
                and session.quarantined_as not in sessions.recalled
            ):
                raise Violation(
                    "I2", f"{session.key} waits for blocks of {session.quarantined_as}, which are in no use"
                )
            if state is GRANTED and _is_void(rank, session):
                raise Violation("I11", f"{session.key} waits for the header of a grant over a link that is gone")
            if state is DONE and (session.room is not None or session.hold is not None):
                raise Violation("I15", f"{session.key} is done and holds blocks")
            if state is IDLE or state is DONE:
                continue
            if entered.get(id(session)) is not session.deadline:  # it is set anew when the state is another
                rank.ledger.enters(session)
            if state is WAITING:
                is_waiting = True
                if (session.deadline == math.inf) != (session.encode_rank in links):
                    raise Violation("I11", f"{session.key} waits until {session.deadline}, links are {links.keys()}")
            grant = session.grant
            if grant is not None:
                low = session.received if state is not HELD else grant.row_start
                if not low <= grant.row_stop <= session.visual.num_rows or session.received > grant.row_stop:
                    raise Violation("I4", f"{session.key} received {session.received} of {grant.row_stop}")
    if is_waiting:
        _nobody_waits_in_vain(rank)
    if len(allocator._leases) != num_held:
        raise Violation("I2", f"{len(allocator.leases)} leases are owned, sessions hold {num_held}")
    num_quarantined = 0
    if sessions.pending or sessions.recalled:
        num_quarantined = sum(
            len(leases) for table in (sessions.pending, sessions.recalled) for leases in table.values()
        )
    if len(allocator._quarantine) != num_quarantined:
        raise Violation("I2", f"{len(allocator.quarantined)} leases in quarantine, {num_quarantined} are accounted for")


def _is_void(rank: Any, session: Session) -> bool:
    link = rank.sessions.links.get(session.encode_rank)
    return link is None or link.epoch != rank.granted_over.get(session.key)


def _no_quarantined_is_granted(allocator: BlockAllocator) -> None:
    """I3: blocks in quarantine are neither free nor owned."""
    for pool in POOLS:
        quarantined = {block for lease in allocator.quarantined.values() for block in getattr(lease, pool)}
        owned = {block for lease in allocator.leases.values() for block in getattr(lease, pool)}
        if quarantined & (owned | set(allocator.free_ids(pool))):
            raise Violation("I3", f"{pool} {sorted(quarantined)} are in quarantine, and free or granted")


def _as_due(sessions: Any) -> list[RequestSessions]:
    """The order of grants."""
    return sorted(sessions.requests.values(), key=lambda request: [session.due for session in request.sessions[:1]])


def _lacks_room(session: Session) -> bool:
    grant = session.grant
    return session.state is not DONE and (grant is None or grant.row_stop < session.visual.num_rows)


def _nobody_waits_in_vain(rank: Any) -> None:
    """I11: whoever is first in line gets room as soon as there is some."""
    sessions = rank.sessions
    allocator = sessions.allocator
    begun = unbegun = None
    for request in _as_due(sessions):
        for session in request.sessions:
            if not _lacks_room(session) or (session.request_id, session.item) not in rank.asked:
                continue
            if session.encode_rank in sessions.links and session.state is not IDLE and session.quarantined_as is None:
                if session.state is WAITING and session.room is not None:
                    raise Violation("I11", f"{session.key} has kept its room and is not granted")
                begun = begun or (session if session.hold is not None else None)
                unbegun = unbegun or (session if session.hold is None else None)
            break
    first = begun or unbegun
    if first is None or first.state is not WAITING:
        return
    if not sessions.is_short_of_room:
        raise Violation("I11", f"{first.key} waits for room, and nobody says so")
    if not allocator.num_free("rows"):
        return
    num_rows = first.visual.num_rows - rank.asked[first.request_id, first.item]
    needed = -(-num_rows // sessions.block_size) if sessions.row_sizes.deepstack_embeddings else 0
    is_ranged = needed > min(allocator.totals["deepstack"], layout.MAX_RUNS)
    deepstack = min(needed, 1) if is_ranged else needed if first.hold is None else 0
    if allocator.num_free("deepstack") >= deepstack and (first.hold is not None or allocator.num_free("slots")):
        raise Violation("I11", f"{first.key} waits though there is room")


def granted(rank: Any, grant: Room) -> None:
    """I16, I5, I12: room, DeepStack and slot came together, in the one order; DeepStack goes once. I4: nothing is asked
    for that the engine does not need."""
    sessions = rank.sessions
    session = sessions.find(*grant.key)
    if session is None or session.grant is not grant:
        return  # given and taken back within one event
    if session.room is None or session.hold is None or len(session.hold.slots) != 1:
        raise Violation("I16", f"{grant.request_id}/{grant.item} was granted without blocks and slot")
    size, total = sessions.block_size, session.visual.num_rows
    num_rows = grant.row_stop - grant.row_start
    if not 0 < num_rows <= len(session.room.rows) * size or sum(grant.row_runs) != num_rows:
        raise Violation("I12", f"{num_rows} rows in runs {grant.row_runs} on {len(session.room.rows)} blocks")
    first = rank.asked.get((grant.request_id, grant.item))
    if first is None:
        raise Violation("I4", f"room for item {grant.item} of {grant.request_id}, which is not needed")
    left_s = rank.book.running[grant.request_id].deadline - rank.world.now
    if isinstance(grant, Grant) and abs(grant.timeout_s - left_s) > 1e-6:
        raise Violation("I11", f"{grant.key} may take {grant.timeout_s} s, its request has {left_s} s")
    attempt, delivered = rank.progress.get((grant.request_id, grant.item), (grant.attempt, first))
    if grant.row_start != (delivered if attempt == grant.attempt else first):
        is_mixed = rank.last_attempts.get((grant.request_id, grant.item), grant.attempt) != grant.attempt
        raise Violation("I10" if is_mixed else "I4", f"attempt {grant.attempt} is granted from row {grant.row_start}")
    if grant.row_start != session.received:
        raise Violation("I4", f"a grant from row {grant.row_start}, received are {session.received}")
    if isinstance(grant, Resume) != (grant.row_start > first):
        raise Violation("I6", f"aux goes with rows from {first} on, and only then; not so from {grant.row_start}")
    wanted = (grant.deepstack_start, grant.deepstack_stop)
    if not sessions.row_sizes.deepstack_embeddings:
        expected = (grant.row_start, grant.row_start)
    elif -(-(total - first) // size) > min(sessions.allocator.totals["deepstack"], layout.MAX_RUNS):
        expected = (grant.row_start, grant.row_stop)
    else:
        expected = (first, total) if grant.row_start == first else (grant.row_start, grant.row_start)
    num_blocks = len(session.room.deepstack + session.hold.deepstack)
    if expected[1] - expected[0] > num_blocks * size:
        raise Violation("I16", f"rows were granted without blocks for DeepStack rows {expected}")
    if wanted != expected or sum(grant.deepstack_runs) != wanted[1] - wanted[0]:
        raise Violation("I5", f"DeepStack rows {wanted} granted, should be {expected}")
    if num_blocks > -(-(total - first) // size):
        raise Violation("I12", f"{num_blocks} DeepStack blocks for rows {first} to {total}")
    if len(session.room.rows) > (most := _most_blocks(sessions)):
        raise Violation("I12", f"{len(session.room.rows)} blocks for {grant.key} at once, {most} may be")
    _runs_are_whole(session.room.rows, size, grant.row_runs, sessions.row_sizes.max_run_rows)
    key, room = (grant.request_id, grant.item), session.room.generation
    had_begun, is_kept = key in rank.begun, rank.begun.get(key) == room
    rank.begun[key] = room
    if not is_kept:
        if not rank.ledger.is_tick:  # in which other requests may end later
            _takes_what_is_free(sessions, session, grant)
        _nobody_passed_over(rank, session, had_begun)


def _runs_are_whole(blocks: Sequence[int], size: int, runs: Sequence[int], most: int) -> None:
    """I12: rows go in as few pieces as their places and the length of a piece allow."""
    left, places = sum(runs), [block * size + row for block in blocks for row in range(size)]
    expected: list[int] = []
    for index, place in enumerate(places[:left]):
        if index and place == places[index - 1] + 1 and expected[-1] < most:
            expected[-1] += 1
        else:
            expected.append(1)
    if [*runs] != expected:
        raise Violation("I12", f"{left} rows in blocks {blocks} go in runs {runs}, should be {expected}")


def _most_blocks(sessions: Any) -> int:
    """Of one grant: the numbers of its runs go in a frame."""
    return max(1, layout.MAX_RUNS // -(-sessions.block_size // sessions.row_sizes.max_run_rows))


def _takes_what_is_free(sessions: Any, session: Session, grant: Room) -> None:
    """I11: who gets less than it lacks has got all that was free, or as much as one grant may have."""
    if grant.row_stop == session.total or session.room is None:
        return
    allocator = sessions.allocator
    is_short = session.room.deepstack and not allocator.num_free("deepstack")
    if allocator.num_free("rows") and len(session.room.rows) < _most_blocks(sessions) and not is_short:
        raise Violation("I11", f"{session.key} got {len(session.room.rows)} blocks, and more were free")


def _nobody_passed_over(rank: Any, session: Session, had_begun: bool) -> None:
    """I16: as the requests are due, then by their arrival, then by item; those that have begun before those that have
    not."""
    sessions = rank.sessions
    is_behind = False
    for request in _as_due(sessions):
        for other in request.sessions:
            if other is session:
                is_behind = True
                break
            if not _lacks_room(other):
                continue
            can_use_room = (
                other.state is not IDLE and other.encode_rank in sessions.links and other.quarantined_as is None
            )
            if other.state is WAITING and other.hold is not None and not sessions.allocator.num_free("deepstack"):
                is_ranged = sessions.row_sizes.deepstack_embeddings and not other.hold.deepstack
                can_use_room = can_use_room and not (is_ranged and had_begun)
            if other.request_id == session.request_id:
                raise Violation("I16", f"{session.key} was granted before item {other.item} had its room")
            has_begun = (other.request_id, other.item) in rank.begun
            if can_use_room and (has_begun > had_begun or (has_begun == had_begun and not is_behind)):
                raise Violation("I16", f"{session.key} was granted before {other.key}")
            break


def may_write(rank: Any, job: Receive) -> None:
    """I3, I8: what a receive writes into has not been given to anybody else."""
    allocator = rank.sessions.allocator
    for lease in (job.room, job.hold):
        live = allocator.leases.get(lease.generation) or allocator.quarantined.get(lease.generation)
        if live != lease:
            raise Violation("I3", f"a pending receive writes into freed blocks of {lease.owner}")


def agrees(job: Receive) -> None:
    """I8: receives are posted only for what was granted of this item, down to the number of runs."""
    header, grant, visual = job.header, job.grant, job.visual
    said = (header.request_id, header.item, header.attempt, tuple(header.grid), header.total_rows)
    known = (grant.request_id, grant.item, grant.attempt, tuple(visual.grid), visual.num_rows)
    ranges = (header.row_start, header.row_stop, header.deepstack_start, header.deepstack_stop)
    granted = (grant.row_start, grant.row_stop, grant.deepstack_start, grant.deepstack_stop)
    runs, granted_runs = (header.row_digests, header.deepstack_digests), (grant.row_runs, grant.deepstack_runs)
    if said != known or ranges != granted or [*map(len, runs)] != [*map(len, granted_runs)]:
        raise Violation("I8", f"receives are posted for {header}, granted was {grant} of {known}")


def fits(payload: Payload, job: Receive) -> None:
    """I8: what is sent is what was agreed on; on a process group anything else aborts, or leaves stale bytes."""
    if payload.grant != job.grant:
        raise Violation("I8", f"sent {payload.grant}, posted {job.grant}")


def aux_once(rank: Any, attempt: Attempt, grant: Room) -> None:
    """I6: no aux once rows of the attempt are in use."""
    number, stop = rank.progress.get(attempt[:2], (0, 0))
    if number == attempt[2] and stop > rank.asked.get(attempt[:2], 0):
        raise Violation("I6", f"aux of {attempt} came again after {stop} rows")


def in_order(rank: Any, action: RowsReady) -> None:
    """I4: each row once and in order per attempt, from the first that was asked for; and aux before them (I6)."""
    key = (action.request_id, action.item)
    first = rank.asked.get(key)
    if first is None:
        raise Violation("I4", f"rows {action.start}..{action.stop} of {key}, which nobody asked for")
    number, stop = rank.progress.get(key, (action.attempt, first))
    if number != action.attempt:
        stop = first
    rank.last_attempts[key] = action.attempt
    if action.start != stop or action.stop <= action.start:
        raise Violation("I4", f"rows {action.start}..{action.stop} of {key} delivered, the next is {stop}")
    session = rank.sessions.find(*key, action.attempt)
    if session is None or session.hold is None or session.room is None:
        raise Violation("I2", f"rows of {key} are ready in blocks that nobody holds")
    if rank.aux[session.hold.slots[0]] != (session.visual.num_rows, action.attempt):
        raise Violation("I6", f"rows of {key} before its aux")
    rank.progress[key] = (action.attempt, action.stop)


def may_recall(rank: Any, recall: Recall) -> None:
    """I10: what is recalled was given. Not said of what is given up: the engine knows of that."""
    key = (recall.request_id, recall.item)
    number, _ = rank.progress.get(key, (recall.attempt, 0))
    if number != recall.attempt or (key in rank.asked and key not in rank.progress and not rank.ledger.is_giving_up):
        raise Violation("I10", f"{recall} takes back what was not given: {rank.progress.get(key)}")


def read(rank: Any, window: Any, start: int, stop: int) -> None:
    """I5, I7, I8, I10: every row that is read is the one that was encoded, with its DeepStack, of this attempt."""
    sessions, names = rank.sessions, rank.cluster.names
    size, allocator = sessions.block_size, sessions.allocator
    for lease in (window.room, window.hold):
        live = allocator.leases.get(lease.generation) or allocator.quarantined.get(lease.generation)
        if live != lease:
            raise Violation("I8", f"rows of {window.attempt} are read from blocks that were given back")
    if not window.start <= start < stop <= window.stop:
        raise Violation("I4", f"rows {start}..{stop} of {window.attempt} are to be read, here are those of {window}")
    has_deepstack = bool(sessions.row_sizes.deepstack_embeddings)
    for row in range(start, stop):
        at = row - window.start
        expected = names.row(window.attempt, row)
        cell = rank.rows[window.room.rows[at // size] * size + at % size]
        if cell != expected:
            raise Violation("I7", f"row {row} of {window.attempt} reads {cell}, encoded was {expected}")
        if has_deepstack:
            is_ranged = bool(window.room.deepstack)
            table, place = (window.room.deepstack, at) if is_ranged else (window.hold.deepstack, row - window.first)
            cell = rank.deepstack[table[place // size] * size + place % size] if place // size < len(table) else 0
            if cell != -expected:
                raise Violation("I5", f"DeepStack row {row} of {window.attempt} reads {cell}")


def one_attempt(attempts: dict[int, int], window: Any) -> None:
    """I10: rows of two attempts never meet in one item of a prompt."""
    if window is not None and attempts.get(window.attempt[1], window.attempt[2]) != window.attempt[2]:
        raise Violation("I10", f"after rows of attempt {attempts[window.attempt[1]]} come those of {window.attempt}")


def gap_ends_link(link: LinkState | None, expected: int, frame: Frame) -> None:
    """A frame was lost: the link must be over."""
    if link is not None and frame.epoch == link.epoch and frame.seq > expected:
        raise Violation("I9", f"frame {frame.seq} came after {expected - 1}, and the link goes on")


def unchanged(rank: Any, before: Any, frame: Frame) -> None:
    if rank.snapshot() != before:
        raise Violation("I9", f"a copy of frame {frame.seq} ({type(frame.body).__name__}) changed something")


def may_start(rank: Any, attempt: Attempt) -> None:
    """I13: what is here, or on its way, is not encoded once more."""
    if attempt in rank.tasks or attempt in rank.encoded:
        raise Violation("I13", f"{attempt} is encoded again while its rows are here")


def may_refuse(rank: Any, nack: Nack) -> None:
    """I13: what is kept for a resume is there for it."""
    if nack.key in rank.sessions.items:
        raise Violation("I13", f"{nack.key} is refused though it is here")


def as_due(rank: Any, attempt: Attempt) -> None:
    """I16: no item begins before one that is due before it, unless that one's language rank has its share in memory."""
    sessions = rank.sessions
    begun = sessions.items.get(attempt)
    for key in sessions.queue if begun is not None else ():
        other = sessions.items[key]
        if other.visual.modality == "video" and begun.visual.modality != "video":
            continue  # which may wait for one of their own places
        if other.due < begun.due and (other.language_rank == begun.language_rank or _has_place(rank, other)):
            raise Violation("I16", f"{attempt}, due at {begun.due}, begins before {key}, due at {other.due}")


def _has_place(rank: Any, item: Outgoing) -> bool:
    """Whether the share of the item's language rank has room for it. Not said where a link was lost just now: with it
    places came free one after another."""
    sessions = rank.sessions
    if len(sessions.outlets) != rank.num_outlets:
        return False
    in_memory = (ENCODING, *_SENDING)
    dues = [i.due for i in sessions.items.values() if i.language_rank == item.language_rank and i.state in in_memory]
    most = sessions.limits.max_items
    share = most if len(sessions.outlets) < 2 else -(-most // 2)
    return sum(due <= item.due for due in dues) < share and len(dues) < share + sessions.limits.max_urgent


def may_release(rank: Any, event: EncodeEvent, attempt: Attempt) -> None:
    """I13: rows live until the last acknowledgement or the end of the lease, within the bound on parked items; or of
    their request."""
    now, lease = rank.world.now, rank.lease_until.get(attempt)
    if now >= rank.request_ends[attempt]:
        lease = None
    has_room = rank.sessions.num_parked < rank.sessions.limits.max_parked  # of all ranks: less than one may keep
    if isinstance(event, Tick) and lease is not None and now < lease and has_room:
        item = rank.sessions.items.get(attempt)
        if item is None or item.state is PARKED:
            raise Violation("I13", f"rows of {attempt} dropped {lease - now:.1f} s before their lease ends")
    if isinstance(event, FrameIn) and isinstance(event.frame.body, Ack):
        body, visual = event.frame.body, rank.visuals.get(attempt)
        is_same = body.key == attempt
        if is_same and visual is not None and body.received < visual.num_rows:
            raise Violation("I13", f"rows of {attempt} dropped after {body.received} were acknowledged")
