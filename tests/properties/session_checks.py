"""The invariants I1 to I16 of the transfer protocol, over both sides of a `World`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qwen3vl_disagg.protocol import room as room_module
from qwen3vl_disagg.protocol.allocator import POOLS
from qwen3vl_disagg.protocol.encode_sessions import HEADER, PARKED, SENDING, SENT
from qwen3vl_disagg.protocol.messages import Abort, Ack, Frame, Grant, Nack, Resume
from qwen3vl_disagg.protocol.session import DONE, GRANTED, HELD, IDLE, RECEIVING, WAITING
from qwen3vl_disagg.protocol.session_events import Attempt, CancelItems, Encode, FrameIn, Receive, Tick
from tests.properties.session_parts import LIMITS, attempt_of

if TYPE_CHECKING:
    from tests.properties.session_world import World


class Checks:
    def __init__(self, world: World) -> None:
        self.world = world
        self.totals: dict[tuple[str, int], int] = {}

    def total(self, attempt: Attempt) -> int:
        """Rows of an item, also of a request that is over."""
        return self.totals[attempt[:2]]

    # ---- after every event ----

    def language_side(self) -> None:
        sessions = self.world.language
        allocator = sessions.allocator
        for pool in POOLS:
            ids = list(allocator.free_ids(pool))
            for leases in (allocator.leases, allocator.quarantined):
                ids += [i for lease in leases.values() for i in getattr(lease, pool)]
            assert sorted(ids) == list(range(allocator.totals[pool])), f"I1: {pool} {sorted(ids)}"
        held = [s for request in sessions.requests.values() for s in request.sessions]
        owned = [lease for s in held for lease in (s.room, s.hold) if lease is not None]
        assert sorted(lease.generation for lease in owned) == sorted(allocator.leases), "I2: somebody lost a lease"
        assert all(lease.owner == s.request_id for s in held for lease in (s.room, s.hold) if lease), "I2"
        apart = [lease for table in (sessions.pending, sessions.lent) for leases in table.values() for lease in leases]
        assert sorted(lease.generation for lease in apart) == sorted(allocator.quarantined), "I2: quarantine"
        for session in held:
            self._session(session)
        self._pending()
        self._short_of_room()

    def _session(self, s: Any) -> None:
        grant = s.grant
        assert 0 <= s.first <= s.received <= s.total, "I4"
        assert s.first == self.world.asked.get((s.request_id, s.item), s.total), "I4: not what was asked for"
        if grant is not None:
            low = grant.row_start if s.state == HELD else s.received
            assert low <= (s.received if s.state == HELD else grant.row_start) <= grant.row_stop <= s.total, "I4"
            assert attempt_of(grant) == s.key, "I10: a grant of another attempt"
        if s.state in (GRANTED, RECEIVING, HELD):
            assert s.room is not None, "I16"
            assert s.hold is not None, "I16"
        else:
            assert s.grant is None, f"a {s.state} item has a grant"
        assert s.hold is None or len(s.hold.slots) == 1
        assert s.room is None or s.hold is not None, "I16: rows without a slot"
        if s.state == DONE:
            assert s.hold is None, "I15: blocks kept by an item that needs none"
        apart = {**self.world.language.pending, **self.world.language.lent}
        assert s.apart is None or (s.apart in apart and s.hold is None), "blocks that never come back"
        if s.state == GRANTED:
            assert s.deadline < math.inf, "I11: no deadline"
            assert s.encode_rank in self.world.language.links, "granted over a link that is gone"
        if s.state == WAITING and s.encode_rank not in self.world.language.links:
            assert s.deadline < math.inf, "I11: no deadline"

    def _pending(self) -> None:
        """Every posted receive has blocks that nobody else can get, and the tables know of it."""
        world = self.world
        posted = [job for link in world.links for job in link.receives]
        keys = [attempt_of(job.grant) for job in posted]
        assert len(set(keys)) == len(keys), "two receives for one attempt"
        sessions = [s for request in world.language.requests.values() for s in request.sessions]
        receiving = {s.key for s in sessions if s.state == RECEIVING}
        assert set(keys) == receiving | world.language.pending.keys(), "posted receives and tables differ"
        for job in posted:
            self.may_write(job)

    def _short_of_room(self) -> None:
        """Whoever waits for nothing but blocks is known to wait."""
        sessions = self.world.language
        for request in sessions.requests.values():
            for s in request.sessions:
                if s.is_fully_granted:
                    continue
                if s.state == WAITING and s.encode_rank in sessions.links and s.apart is None:
                    assert sessions.is_short_of_room, f"{s.key} waits, and nobody knows"
                break

    def encode_side(self, rank: int) -> None:
        encode = self.world.encodes[rank]
        sessions, most = encode.sessions, LIMITS.max_items + LIMITS.max_parked
        assert len(encode.encoding) + len(encode.encoded) <= most, "I12: too many items in memory"
        assert sessions.num_parked <= LIMITS.max_parked, "I12"
        assert sessions.num_in_memory <= LIMITS.max_items + LIMITS.max_parked, "I12"
        assert len(sessions.ended) <= LIMITS.max_ended, "I12"
        states = {key: item.state for key, item in sessions.items.items()}
        in_memory = {key for key, state in states.items() if state not in ("early", "assigned", "queued")}
        assert in_memory == {*encode.encoding, *encode.encoded}, "I15: memory and tables differ"
        assert {key for key, item in sessions.items.items() if item.is_encoded} == encode.encoded
        encode.parked_at = {
            key: encode.parked_at.get(key, self.world.now) for key, state in states.items() if state == PARKED
        }
        for item in sessions.items.values():
            assert item.deadline < math.inf or item.state in (HEADER, SENDING, SENT), "I11: no deadline"
        for outlet in sessions.outlets.values():
            assert all(states.get(key) == "ready" for key in outlet.ready)

    # ---- at single events ----

    def sent_by_language(self, frame: Frame, leases: dict[int, Any]) -> None:
        if isinstance(frame.body, Grant):
            self._granted(frame.body, leases)

    def _granted(self, grant: Grant, leases: dict[int, Any]) -> None:
        sessions = self.world.language
        session = sessions.find(*attempt_of(grant))
        if session is None or session.grant is not grant:
            return  # taken back within the same event
        size, total = sessions.block_size, session.total
        first = self.world.asked[grant.request_id, grant.item]
        if not isinstance(grant, Resume):
            self.world.first_of[attempt_of(grant)] = first
        room, hold = session.room, session.hold
        is_kept, had_begun = room.generation in leases, hold.generation in leases
        assert had_begun or grant.row_start == first, "I16"
        # I4: the missing rows, from the first
        assert grant.row_start == session.received < grant.row_stop <= total
        assert isinstance(grant, Resume) == (grant.row_start > first)
        rows = grant.row_stop - grant.row_start
        assert rows <= len(room.rows) * size
        assert is_kept or len(room.rows) == -(-rows // size), "I12: blocks that are not needed"
        assert grant.row_stop == total or rows == len(room.rows) * size, "blocks left empty"
        assert sum(grant.row_runs) == rows
        assert len(grant.row_runs) <= room_module.MAX_RUNS
        assert all(length <= sessions.row_sizes.max_run_rows for length in grant.row_runs)
        # I5: DeepStack goes once, unless it can never fit
        item_blocks = -(-(total - first) // size) if self.world.has_deepstack else 0
        is_ranged = self._is_ranged(total - first)
        deepstack = (grant.deepstack_start, grant.deepstack_stop)
        if is_ranged:
            assert deepstack == (grant.row_start, grant.row_stop)
            assert (len(room.deepstack), len(hold.deepstack)) == (len(room.rows), 0)
        else:
            is_initial = grant.row_start == first and item_blocks
            assert deepstack == ((first, total) if is_initial else (grant.row_start,) * 2)
            assert (len(room.deepstack), len(hold.deepstack)) == (0, item_blocks)
        assert sum(grant.deepstack_runs) == deepstack[1] - deepstack[0]
        if not is_kept:
            self._in_order(session, leases)

    def _in_order(self, session: Any, leases: dict[int, Any]) -> None:
        """I16: everybody before has all it needs, or cannot use room now; earlier items of the request have all.
        Those that had begun before this event come before those that had not."""
        sessions, is_behind = self.world.language, False
        had_begun = session.hold.generation in leases
        for request in sessions.requests.values():
            for other in request.sessions:
                if other is session:
                    is_behind = True
                    break
                if not other.is_fully_granted:
                    assert other.request_id != session.request_id, "I16: an earlier item of the request lacks room"
                    cannot = other.encode_rank not in sessions.links or other.state == IDLE or other.apart is not None
                    cannot = cannot or self._lacks_deepstack(other)
                    has_begun = other.hold is not None and other.hold.generation in leases
                    is_before = has_begun > had_begun or (has_begun == had_begun and not is_behind)
                    assert cannot or not is_before, f"I16: {session.key} before {other.key} ({other.state})"
                    break

    def _lacks_deepstack(self, s: Any) -> bool:
        """Each grant of a ranged item needs DeepStack blocks; there may be rows for the next one, but none of these."""
        allocator = self.world.language.allocator
        num_rows = s.total - self.world.asked[s.request_id, s.item]
        return s.state == WAITING and self._is_ranged(num_rows) and not allocator.num_free("deepstack")

    def _is_ranged(self, num_rows: int) -> bool:
        sessions = self.world.language
        item_blocks = -(-num_rows // sessions.block_size) if self.world.has_deepstack else 0
        return item_blocks > min(sessions.allocator.totals["deepstack"], room_module.MAX_RUNS)

    def may_write(self, job: Receive) -> None:
        """I3: what a pending receive writes into is owned or in quarantine until it returns."""
        self._leased(job, "is written into")

    def may_read(self, job: Receive) -> None:
        self._leased(job, "is read")

    def _leased(self, job: Receive, what: str) -> None:
        allocator = self.world.language.allocator
        for lease in (job.room, job.hold):
            known = allocator.leases.get(lease.generation) or allocator.quarantined.get(lease.generation)
            assert known == lease, f"I3: lease {lease} was given back, and {what}"

    def note_given_up(self, rank: int, event: Any) -> None:
        """Of which attempts somebody else says now that they are over."""
        encode = self.world.encodes[rank]
        for key in encode.sessions.items:
            if isinstance(event, FrameIn):
                body = event.frame.body
                is_over = isinstance(body, (Abort, Nack)) and attempt_of(body) == key
            elif isinstance(event, Encode):
                is_over = key[:2] == (event.request_id, event.item) and key[2] < event.attempt
            else:
                is_over = isinstance(event, CancelItems) and event.request_id == key[0]
            if is_over:
                encode.given_up.add(key)

    def released(self, rank: int, attempt: Attempt, event: Any) -> None:
        """I13: rows live until all are acknowledged or the lease ends, unless somebody gives the attempt up, or
        too many wait."""
        encode, now = self.world.encodes[rank], self.world.now
        if attempt not in encode.encoded or attempt in encode.given_up:
            return
        body = event.frame.body if isinstance(event, FrameIn) else None
        if isinstance(body, Ack) and attempt_of(body) == attempt and body.received == self.total(attempt):
            return
        if isinstance(event, Tick) and now - encode.parked_at.get(attempt, now) > LIMITS.lease_s - 1e-6:
            return
        assert encode.sessions.num_parked >= LIMITS.max_parked, f"I13: rows of {attempt} dropped at {event}"
        others = [t for key, t in encode.parked_at.items() if encode.sessions.items.get(key) and key != attempt]
        assert encode.parked_at.get(attempt, now) <= min(others, default=math.inf), "not the one that waited longest"

    def snapshot(self) -> Any:
        world = self.world
        language = world.language
        sessions = [
            (s.key, s.state, s.encode_rank, s.first, s.received, s.grant, s.room, s.hold, s.deadline)
            for request in language.requests.values()
            for s in request.sessions
        ]
        links = [(peer, link.epoch, link.num_received) for peer, link in language.links.items()]
        pools = [language.allocator.free_ids(pool) for pool in POOLS]
        encodes = []
        for encode in world.encodes:
            items = [
                (i.attempt, i.state, i.deadline, i.grant, i.is_encoded, i.is_dropped, i.total)
                for i in encode.sessions.items.values()
            ]
            outlets = [
                (peer, o.state.epoch, o.state.num_received, o.turn, tuple(o.ready))
                for peer, o in encode.sessions.outlets.items()
            ]
            encodes.append((items, outlets, tuple(encode.sessions.queue), tuple(encode.sessions.ended)))
        return sessions, links, pools, dict(language.pending), dict(language.lent), encodes
