"""One language rank and two encode ranks: the real sessions, joined by model links, with checks at every step.

Everything that can happen next is a move: (function, arguments). Faults are methods of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from qwen3vl_disagg.core.errors import InputError, ServerError
from qwen3vl_disagg.core.failure import Failure
from qwen3vl_disagg.protocol import session_events as ev
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.encode_sessions import EncodeSessions
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import Frame, Stale
from qwen3vl_disagg.protocol.session_events import Attempt
from tests.properties.session_checks import Checks
from tests.properties.session_engine import EngineMoves
from tests.properties.session_parts import (
    LIMITS,
    READY,
    Cells,
    ModelEncode,
    ModelEngine,
    ModelLink,
    ModelRouter,
    attempt_of,
    header_of,
)

Move = tuple[Callable[..., None], tuple[Any, ...]]
RANKS = (0, 1)


class World(EngineMoves):
    def __init__(
        self,
        *,
        block_size: int,
        blocks: int,
        deepstack_blocks: int,
        slots: int,
        row_sizes: RowSizes,
    ) -> None:
        allocator = BlockAllocator(num_blocks=blocks, num_deepstack_blocks=deepstack_blocks, num_slots=slots)
        self.now = 0.0
        self.has_deepstack = row_sizes.deepstack_embeddings > 0
        self.language = LanguageSessions(allocator, block_size, row_sizes, LIMITS)
        self.cells = Cells(block_size, blocks, deepstack_blocks, slots)
        self.encodes = [ModelEncode(EncodeSessions(LIMITS)) for _ in RANKS]
        self.engine, self.router = ModelEngine(), ModelRouter()
        self.links: list[ModelLink] = []
        self.epochs = [0, 0]
        self.old_frames: list[tuple[int, str, Frame]] = []
        self.jobs: dict[Attempt, ev.Receive] = {}
        self.asked: dict[tuple[str, int], int] = {}
        """(request, item) -> the first row that the loop asked for last; none for an item that is not lacking"""
        self.first_of: dict[Attempt, int] = {}
        """Where each attempt's initial transfer begins."""
        self.progress: dict[Attempt, int] = {}
        self.running: dict[str, list[Any]] = {}
        """What the language rank's loop knows of."""
        self.num_requests = 0
        self.checks = Checks(self)

    # ---- sessions ----

    def to_language(self, event: Any) -> list[Any]:
        allocator = self.language.allocator
        before = {**allocator.leases, **allocator.quarantined}
        actions = self.language.handle(event, self.now)
        for action in actions:
            self._do_language(action, event, before)
        self.checks.language_side()
        return actions

    def to_encode(self, rank: int, event: Any) -> list[Any]:
        self.checks.note_given_up(rank, event)
        actions = self.encodes[rank].sessions.handle(event, self.now)
        for action in actions:
            self._do_encode(rank, action, event)
        self.checks.encode_side(rank)
        return actions

    def _do_language(self, action: Any, event: Any, leases: dict[int, Any]) -> None:
        match action:
            case ev.SendFrame():
                link = self.link_of(action.peer, "language")
                assert link is not None
                assert action.frame.epoch == link.epoch
                link.to["encode"].append(action.frame)
                self.checks.sent_by_language(action.frame, leases)
            case ev.BreakLink():
                self.close(action.peer, "language", action.epoch)
            case ev.Receive():
                link = self.link_of(action.encode_rank, "language")
                assert link is not None
                assert action.epoch == link.epoch
                link.receives.append(action)
            case ev.RowsReady():
                attempt = attempt_of(action)
                first = self.asked[attempt[:2]]
                assert self.progress.get(attempt, first) == action.start < action.stop, "I4: rows out of order"
                self.progress[attempt] = action.stop
                self.engine.commands.append(("rows", attempt, action.start, action.stop, self.jobs[attempt]))
            case ev.Recall():
                self.engine.commands.append(("recall", attempt_of(action)))
            case ev.Arrived():
                attempts = [(*attempt_of(action)[:2], number) for number in range(1, action.attempt + 1)]
                is_here = self.checks.total(attempts[0]) in [self.progress.get(attempt) for attempt in attempts]
                assert is_here or attempts[0][:2] not in self.asked or isinstance(event, ev.Expect)
                self.router.of["language"].append(("received", attempt_of(action)))
            case ev.Lost():
                if action.request_id in self.running:
                    self.router.of["language"].append(("lost", attempt_of(action)))
            case _:
                raise AssertionError(f"unexpected {action}")

    def _do_encode(self, rank: int, action: Any, event: Any) -> None:
        encode = self.encodes[rank]
        match action:
            case ev.SendFrame():
                self._post(rank, action.frame)
            case ev.SendHeader():
                attempt, grant = attempt_of(action.grant), action.grant
                assert attempt in encode.encoded, f"I13: {attempt} is gone, its header was to be sent"
                header = header_of(grant, self.checks.total(attempt))
                self._post(rank, Frame(epoch=action.epoch, seq=action.seq, body=header))
            case ev.SendPayload():
                attempt = attempt_of(action.grant)
                assert attempt in encode.encoded, f"I13: {attempt} is gone, its rows were to be sent"
                link = self.link_of(rank, "encode")
                assert link is not None
                assert link.epoch == action.epoch
                link.sends.append(attempt)
                link.arriving.append(action.grant)
            case ev.StartEncode():
                assert action.attempt not in encode.encoding
                assert action.attempt not in encode.encoded, "encoded twice"
                encode.encoding.append(action.attempt)
            case ev.Release():
                self.checks.released(rank, action.attempt, event)
                encode.drop(action.attempt)
            case ev.TellFailed():
                assert event == ev.Tick() or isinstance(event, ev.EncodeFailed)
                encode.drop(action.attempt)
                self.router.of[rank].append(("failed", action.attempt, action.failure.kind))
            case ev.BreakLink():
                self.close(rank, "encode", action.epoch)

    def _post(self, rank: int, frame: Frame) -> None:
        link = self.link_of(rank, "encode")
        assert link is not None
        assert frame.epoch == link.epoch
        link.to["language"].append(frame)

    # ---- links ----

    def link_of(self, rank: int, end: str) -> ModelLink | None:
        return next((link for link in self.links if link.rank == rank and end in link.ups), None)

    def close(self, rank: int, end: str, epoch: int) -> None:
        """One end is gone; the other hears of it later, after what was sent before."""
        link = self.link_of(rank, end)
        if link is not None and link.epoch == epoch:
            link.ups.discard(end)
            link.is_broken = True
            link.to[end].clear()

    def notice(self, link: ModelLink, end: str) -> None:
        link.ups.discard(end)
        link.is_broken = True
        link.to[end].clear()
        event = ev.LinkDown(0 if end == "encode" else link.rank, link.epoch, "gone")
        if end == "language":
            self.to_language(event)
        elif link.is_joined:
            self.to_encode(link.rank, event)

    def link_up(self, rank: int) -> None:
        self.epochs[rank] += 1
        old = self.link_of(rank, "language")
        if old is not None:
            self.notice(old, "language")
        link = ModelLink(rank, self.epochs[rank])
        link.to["encode"].append(READY)
        self.links.append(link)
        self.to_language(ev.LinkUp(rank, link.epoch))

    def deliver(self, link: ModelLink, end: str) -> None:
        frame = link.to[end].popleft()
        if isinstance(frame, str):
            link.is_joined = True
            self.to_encode(link.rank, ev.LinkUp(0, link.epoch))
            return
        link.last[end] = frame
        self.old_frames = [*self.old_frames[-30:], (link.rank, end, frame)]
        self._frame(link.rank, end, frame)

    def _frame(self, rank: int, end: str, frame: Frame) -> list[Any]:
        if end == "language":
            return self.to_language(ev.FrameIn(rank, frame))
        return self.to_encode(rank, ev.FrameIn(0, frame))

    def deliver_again(self, rank: int, end: str, frame: Frame) -> None:
        """I9: a frame that was here before changes nothing; one of an old epoch is answered with the present one."""
        link = self.link_of(rank, end)
        if link is None or (end == "encode" and not link.is_joined):
            return
        before = self.checks.snapshot()
        actions = self._frame(rank, end, frame)
        assert self.checks.snapshot() == before, f"I9: {frame} changed something"
        if frame.epoch == link.epoch:
            assert actions == []
        else:
            assert [action.frame.body for action in actions] == [Stale(epoch=link.epoch)]

    # ---- payloads ----

    def payload_sent(self, link: ModelLink) -> None:
        attempt = link.sends.popleft()
        error = "broken" if link.is_broken else None
        self.to_encode(link.rank, ev.PayloadSent(0, link.epoch, attempt, error))

    def payload_end(self, link: ModelLink, how: str = "ok") -> None:
        """A receive returns. how: ok, digest (it came, but not as announced), broken (part of it may have come)."""
        job, how = link.receives.popleft(), "broken" if link.is_broken else how
        attempt = attempt_of(job.grant)
        self.checks.may_write(job)
        if how != "broken":
            grant = link.arriving.popleft()
            assert grant == job.grant, "payloads and receives do not follow one another"
        self.cells.write(job, attempt, 0.5 if how == "broken" else 1.0)
        if how == "ok":
            self.jobs[attempt] = job
        error = None if how == "ok" else how
        self.to_language(ev.PayloadEnd(link.rank, link.epoch, *attempt, error, how == "broken"))

    # ---- encode ranks ----

    def encoded(self, rank: int, attempt: Attempt, kind: str = "ok") -> None:
        encode = self.encodes[rank]
        encode.encoding.remove(attempt)
        if kind == "ok":
            encode.encoded.add(attempt)
            self.to_encode(rank, ev.Encoded(attempt))
        else:
            error = InputError("no") if kind == "input" else ServerError("no")
            self.to_encode(rank, ev.EncodeFailed(attempt, Failure.of(error)))

    def kill(self, rank: int, *, loses_frames: bool) -> None:
        encode = self.encodes[rank]
        for link in self.links:
            if link.rank == rank:
                if loses_frames:
                    link.to["language"].clear()
                link.ups.discard("encode")
                link.is_broken = True
                link.sends.clear()
        self.encodes[rank] = ModelEncode(EncodeSessions(LIMITS), encode.incarnation + 1)
        self.router.of[rank].append(("down", encode.incarnation + 1))

    # ---- router ----

    def cancel(self, request_id: str) -> None:
        self.router.end(request_id)

    def router_takes(self, source: Any) -> None:
        self.router.take(source)

    def rank_takes(self, target: Any) -> None:
        """A message of the router."""
        kind, subject, *rest = self.router.to[target].popleft()
        if kind == "cancel" and target == "language":
            self.running.pop(subject, None)
            self.engine.commands.append(("cancel", (subject, 0, 0)))
            self.to_language(ev.Forget(subject))
        elif kind == "cancel":
            self.to_encode(target, ev.CancelItems(subject))
        elif kind == "assign":
            self.to_language(ev.Assigned(*subject, rest[0]))
        elif rest[1] == self.encodes[target].incarnation:
            self.to_encode(target, ev.Encode(*subject, 0, rest[0], 1e6))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.to_language(ev.Tick())
        for rank in RANKS:
            self.to_encode(rank, ev.Tick())

    # ---- what can happen without a fault ----

    def moves(self) -> list[Move]:
        self.links = [link for link in self.links if not link.is_over]
        found: list[Move] = []
        for link in self.links:
            for end in sorted(link.ups):
                if link.to[end]:
                    found.append((self.deliver, (link, end)))
                elif len(link.ups) == 1:
                    found.append((self.notice, (link, end)))
            if link.sends:
                found.append((self.payload_sent, (link,)))
            if link.receives and (link.is_broken or link.arriving):
                found.append((self.payload_end, (link,)))
        found += [(self.link_up, (rank,)) for rank in RANKS if self.link_of(rank, "encode") is None]
        for rank in RANKS:
            found += [(self.encoded, (rank, attempt)) for attempt in self.encodes[rank].encoding]
        found += [(self.router_takes, (source,)) for source in self.router.of if self.router.of[source]]
        found += [(self.rank_takes, (target,)) for target in self.router.to if self.router.to[target]]
        if self.engine.batch is not None:
            found.append((self.end_step, ()))
        elif self.engine.commands and not self.engine.known:
            found.append((self.step, ("",)))
        else:
            known = self.engine.known
            found += [(self.step, (r,)) for r in known if self.engine.can_step(r) or self.engine.commands]
            away = {r: sum(sequence.rows) for r, sequence in known.items() if not sequence.is_admitted}
            found += [(self.admit_again, (r, rows)) for r, total in away.items() for rows in (0, total // 2, total)]
        if self.engine.events:
            found.append((self.loop_takes, ()))
        return found

    def settle(self, rng: Random, most: int = 20_000) -> None:
        """Everything that can happen happens, in any order."""
        for _ in range(most):
            moves = self.moves()
            if not moves:
                return
            do, args = rng.choice(moves)
            do(*args)
        raise AssertionError("it never settles")
