"""A language rank: the production sessions over buffers of numbers, and an engine that reads them."""

from __future__ import annotations

from typing import Any

from qwen3vl_disagg.core.errors import Failure, ServerError
from qwen3vl_disagg.language.request_book import RequestBook, Said
from qwen3vl_disagg.protocol import layout
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.messages import (
    Ack,
    Adopt,
    Assign,
    Beat,
    Cancel,
    Frame,
    Header,
    ItemLost,
    KeptRequest,
    Message,
    RequestFailed,
    Room,
    Submit,
)
from qwen3vl_disagg.protocol.session import RECEIVING
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    BreakLink,
    Expect,
    FrameIn,
    LanguageEvent,
    LinkDown,
    LinkUp,
    PayloadEnd,
    Recall,
    Receive,
    RowsReady,
    SendFrame,
    Tell,
    Tick,
)
from tools.simulation import checks, progress_checks
from tools.simulation.encode_checks import answers_stale, changed_nothing
from tools.simulation.engine import SimEngine, Window
from tools.simulation.kept_checks import KeptChecks
from tools.simulation.language_checks import LanguageLedger
from tools.simulation.payload import Payload, run_digests
from tools.simulation.progress_checks import language_bounds
from tools.simulation.stays import Stays
from tools.simulation.world import Channel, SimLink, Violation


class SimLanguage:
    """One incarnation of a language rank."""

    def __init__(self, cluster: Any, rank: int) -> None:
        self.cluster, self.world, self.rank = cluster, cluster.world, rank
        self.is_dead, self.frozen_until, self.slowness = False, 0.0, 1.0
        sizes = cluster.sizes
        allocator = BlockAllocator(
            num_blocks=sizes.blocks, num_deepstack_blocks=sizes.deepstack_blocks, num_slots=sizes.slots
        )
        self.sessions = LanguageSessions(allocator, sizes.block_size, sizes.row_sizes, cluster.limits)
        self.rows = [0] * (sizes.blocks * sizes.block_size)
        self.deepstack = [0] * (sizes.deepstack_blocks * sizes.block_size)
        self.aux: list[tuple[int, int] | None] = [None] * sizes.slots
        self.links: dict[int, SimLink] = {}
        self.hub: Channel | None = None
        self.from_hub_channel: Channel | None = None
        self.engine = SimEngine(self)
        self.book = RequestBook(self.engine.cancel, self._to_sessions, self.tell, keep_s=sizes.keep_s)
        self.kept_checks, self.ledger = KeptChecks(self), LanguageLedger(self)
        self.submits: dict[str, Submit] = {}
        """What was begun last under each id."""
        self.offered: list[KeptRequest] = []
        """To the next hub, as it was when the last one was lost."""
        self.asked: dict[tuple[str, int], int] = {}
        """(request, item) -> the first row that the engine asked for last; none for an item that it does not lack"""
        self.progress: dict[tuple[str, int], tuple[int, int]] = {}
        """(request, item) -> (attempt, rows delivered in order, with those that were not asked for)"""
        self.last_attempts: dict[tuple[str, int], int] = {}
        """(request, item) -> attempt whose rows came last since it was asked for"""
        self.begun: dict[tuple[str, int], int] = {}
        """(request, item) -> generation of the room it was granted last"""
        self.num_broken: dict[Attempt, int] = {}
        """Payloads of an attempt that broke since rows came last."""
        self.said_at: dict[int, float] = {}
        """When something was said last over each link."""
        self.stays, self.bounds = Stays(self.world), language_bounds(cluster.limits, cluster.sizes.moving_s)
        self.granted_over: dict[Attempt, int] = {}
        """Epoch of the link over which an attempt's last grant went."""
        self.epochs: dict[Attempt, int] = {}
        """Of the link over which an attempt's last payload comes."""
        self._acked: set[Attempt] = set()
        self.pools_mark: tuple[Any, ...] = ()
        self._jobs: dict[Attempt, Receive] = {}
        self._do = {
            SendFrame: self._send_frame,
            BreakLink: self._break_link,
            Receive: self._receive,
            RowsReady: self._rows_ready,
            Recall: self._recall,
            Tell: self._tell,
        }

    # ---- sessions ----

    def handle(self, event: LanguageEvent) -> None:
        kind, awaited = type(event), None
        if kind is PayloadEnd:
            awaited = self.sessions.find(*event.key)  # type: ignore[union-attr]
            if awaited is not None and awaited.state is not RECEIVING:
                awaited = None
        self.ledger.before(event)
        actions = self.sessions.handle(event, self.world.now)
        for action in actions:
            self._do[type(action)](action)  # type: ignore[operator]
        if changed_nothing(event, actions):
            return
        checks.language_side(self)
        if kind is LinkUp or kind is LinkDown:
            self.ledger.after_link(event)  # type: ignore[arg-type]
        if kind is PayloadEnd:
            self.ledger.after_payload(event, awaited)  # type: ignore[arg-type]

    def _to_sessions(self, event: LanguageEvent) -> None:
        (self._expect if isinstance(event, Expect) else self.handle)(event)  # type: ignore[arg-type]

    def _expect(self, event: Expect) -> None:
        """What the engine needs from now on; what was before is over."""
        firsts = dict(zip(event.lacking, event.first_rows, strict=True))
        for item in range(len(event.items)):
            key = (event.request_id, item)
            for table in (self.asked, self.progress, self.begun, self.last_attempts):
                table.pop(key, None)
            if item in firsts:
                self.asked[key] = firsts[item]
        self.handle(event)

    def _send_frame(self, action: SendFrame) -> None:
        self.cluster.check_wire(action.frame)
        self.ledger.sends(action)
        body = action.frame.body
        if type(body) is Ack:
            self._acked.add(body.key)
        elif isinstance(body, Room):
            self.granted_over[body.key] = action.frame.epoch
            checks.granted(self, body)
        progress_checks.may_beat(self, action.peer, action.frame)
        link = self.links.get(action.peer)
        if link is not None and link.epoch == action.frame.epoch:
            link.to_encode.send(action.frame)

    def _break_link(self, action: BreakLink) -> None:
        self.ledger.does(action)
        link = self.links.get(action.peer)
        if link is not None and link.epoch == action.epoch:
            self.world.at(0.0, self, link.close, self, action.reason)

    def _receive(self, job: Receive) -> None:
        checks.agrees(job)
        self.ledger.does(job)
        self.epochs[job.grant.request_id, job.grant.item, job.grant.attempt] = job.epoch
        link = self.links.get(job.encode_rank)
        if link is not None and link.epoch == job.epoch:
            link.post_receive(job)
        else:
            self.world.at(0.0, self, self._end, job, "the link is gone", True)

    def _end(self, job: Receive, error: str | None, is_broken: bool = False) -> None:
        grant = job.grant
        attempt = grant.key
        if is_broken:
            self.num_broken[attempt] = self.num_broken.get(attempt, 0) + 1
        was_awaited = self.sessions.find(*attempt) is not None
        self.handle(PayloadEnd(*attempt, job.encode_rank, job.epoch, error, is_broken))
        if is_broken:
            progress_checks.gives_up(self, attempt, was_awaited)

    def payload_broke(self, link: SimLink, job: Receive) -> None:
        """The receive ran into its timeout; some of the rows may have been written before."""
        checks.may_write(self, job)
        for start, _ in self._runs(job.room.rows, job.grant.row_runs)[:1]:
            self.rows[start] = -999_999
        self._end(job, "the payload did not get through", True)

    def payload_came(self, link: SimLink, payload: Payload, job: Receive) -> None:
        """Place the rows, then check what lies there against what the header promised."""
        checks.may_write(self, job)
        checks.fits(payload, job)
        rows, deepstack = list(payload.rows), list(payload.deepstack)
        world = self.world
        if world.happens("corrupt"):
            link.count("corrupt")
            rows[world.rng.randrange(len(rows))] += 1
        if world.happens("truncate"):
            link.count("truncate")
            rows[-1] = self.rows[self._runs(job.room.rows, job.grant.row_runs)[-1][1] - 1]
        if world.happens("allocation"):
            self.count_states("allocation")
            self._end(job, "out of memory", True)
            return
        grant = job.grant
        table = job.room.deepstack or job.hold.deepstack
        _place(self.deepstack, self._runs(table, grant.deepstack_runs), deepstack)
        _place(self.rows, self._runs(job.room.rows, grant.row_runs), rows)
        if payload.aux is not None:
            checks.aux_once(self, payload.attempt, grant)
            self.aux[job.hold.slots[0]] = payload.aux
        error = self._problem(job)
        if error is None:
            self._jobs[payload.attempt] = job
        self._end(job, error)

    def _runs(self, blocks: tuple[int, ...], lengths: list[int]) -> list[tuple[int, int]]:
        sizes = self.cluster.sizes
        return layout.row_runs(blocks, sizes.block_size, sum(lengths), sizes.row_sizes.max_run_rows)

    def _problem(self, job: Receive) -> str | None:
        """What a receiver checks: aux, and the digest of each run."""
        grant, header = job.grant, job.header
        if self.aux[job.hold.slots[0]] != (job.visual.num_rows, grant.attempt):
            return f"aux says {self.aux[job.hold.slots[0]]}"
        rows = _gather(self.rows, self._runs(job.room.rows, grant.row_runs))
        deepstack = _gather(self.deepstack, self._runs(job.room.deepstack or job.hold.deepstack, grant.deepstack_runs))
        if run_digests(rows, grant.row_runs, grant.row_start) != header.row_digests:
            return "digest of rows"
        if run_digests(deepstack, grant.deepstack_runs, grant.deepstack_start) != header.deepstack_digests:
            return "digest of DeepStack rows"
        return None

    def _rows_ready(self, action: RowsReady) -> None:
        attempt = action.key
        self.ledger.does(action)
        job = self._jobs.pop(attempt, None)
        if job is None:
            raise Violation("I7", f"rows {action.start}..{action.stop} of {attempt} are ready, but did not come well")
        checks.in_order(self, action)
        self.num_broken.pop(attempt, None)
        window = Window(attempt, self.asked[attempt[:2]], action.start, action.stop, job.room, job.hold)
        self.world.at(0.0, self, self.engine.provide, window)

    def _recall(self, action: Recall) -> None:
        checks.may_recall(self, action)
        self.progress.pop((action.request_id, action.item), None)
        self.world.at(0.0, self, self.engine.recall, action)

    def _tell(self, action: Tell) -> None:
        message = action.message
        self.ledger.tells(message)
        if isinstance(message, ItemLost):
            progress_checks.has_no_link(self, message)
            self._jobs.pop(message.key, None)
            self.progress.pop((message.request_id, message.item), None)
        self.kept_checks.of_sessions(message)
        self.book.of_sessions(message, self.world.now)
        if isinstance(message, RequestFailed):
            self.ledger.is_over(message.request_id)

    # ---- the engine ----

    def hear(self, event: Said, of: Submit) -> None:
        if self.submits[event.request_id] is not of:
            with self.kept_checks.hearing_late(event, event.request_id):
                self.book.hear(event, self.world.now)
            return
        if event.request_id not in self.kept_checks.entries:
            self.book.hear(event, self.world.now)
            return
        with self.kept_checks.hearing(event):
            self.book.hear(event, self.world.now)

    def preempted(self, request_id: str, of: Submit) -> None:
        if self.submits[request_id] is of:
            self.book.preempted(request_id)
            self.ledger.was_preempted(request_id)
            return
        running = self.book.running.get(request_id)
        missing = None if running is None else set(running.missing)
        with self.kept_checks.hearing_late("its end of pages", request_id):
            self.book.preempted(request_id)
        if running is not None and running.missing != missing:
            raise Violation("I17", f"{request_id} lacks {missing}, and not {running.missing}")

    # ---- links ----

    def link_up(self, link: SimLink) -> None:
        if not link.to_language.is_open:
            return
        old = self.links.get(link.encode.rank)
        is_first = self.world.random() < 0.5  # of the two the sessions may hear in either order
        if old is not None and is_first:
            old.close(self, "a new link takes its place")
        self.links[link.encode.rank] = link
        self._acked.clear()
        self.said_at[link.encode.rank] = self.world.now
        self.handle(LinkUp(link.encode.rank, link.epoch))
        if old is not None and not is_first:
            old.close(self, "a new link has taken its place")
        progress_checks.last_acks_come_again(self, link, self._acked)
        if self.world.random() < 0.1:
            self.world.at(self.world.random(), self, self._hear_again, link)

    def _hear_again(self, link: SimLink) -> None:
        """Of a link that is here, and of the end of the one before: nothing may change."""
        before, peer = self.snapshot(), link.encode.rank
        state = self.sessions.links.get(peer)
        if self.links.get(peer) is not link or state is None or state.epoch != link.epoch:
            return
        self.handle(LinkUp(peer, link.epoch))
        self.handle(LinkDown(peer, link.epoch - 1, "late news"))
        if self.snapshot() != before:
            raise Violation("I9", f"late news of links between {self.rank} and {peer} changed something")

    def lost_link(self, link: SimLink, reason: str) -> None:
        if self.links.get(link.encode.rank) is link:
            del self.links[link.encode.rank]
        self.handle(LinkDown(link.encode.rank, link.epoch, reason))

    def take(self, link: SimLink, frame: Frame) -> None:
        state = self.sessions.links.get(link.encode.rank)
        expected = 0 if state is None else state.num_received + (type(frame.body) is not Beat)
        ledger, peer = self.ledger, link.encode.rank
        is_next = state is not None and state.epoch == frame.epoch and frame.seq == expected
        if is_next and type(frame.body) is not Beat:
            ledger.frame_comes(peer, frame)
            was_right = isinstance(frame.body, Header) and ledger.is_right(frame.body)
            was_whole = ledger.was_whole
            self.handle(FrameIn(peer, frame))
            ledger.frame_was_taken(peer, frame, was_right, was_whole)
            return
        self.handle(FrameIn(peer, frame))
        if state is not None and frame.seq > expected:
            checks.gap_ends_link(self.sessions.links.get(link.encode.rank), expected, frame)

    def take_copy(self, link: SimLink, frame: Frame) -> None:
        """A frame that was here before, or comes too late: nothing may change."""
        before, state = self.snapshot(), self.sessions.links.get(link.encode.rank)
        self.handle(FrameIn(link.encode.rank, frame))
        checks.unchanged(self, before, frame)
        if state is not None:
            answers_stale(state.epoch, frame, self.ledger.sent)

    def snapshot(self) -> Any:
        sessions = [
            (s.state, s.attempt, s.received, s.room, s.hold)
            for request in self.sessions.requests.values()
            for s in request.sessions
        ]
        links = [(link.epoch, link.num_received) for link in self.sessions.links.values()]
        return sessions, links, dict(self.sessions.pending), dict(self.sessions.recalled)

    def count_states(self, fault: str, peer: int | None = None) -> None:
        for request in self.sessions.requests.values():
            for session in request.sessions:
                if peer is None or session.encode_rank == peer or session.encode_rank < 0:
                    self.world.table[fault, session.state] += 1

    # ---- hub ----

    def close_hub(self) -> None:
        """Both ways of the connection are over."""
        for channel in (self.hub, self.from_hub_channel):
            if channel is not None:
                channel.is_open = False

    def tell(self, message: Message) -> None:
        self.kept_checks.told(message)
        self.ledger.told_last = message
        if self.hub is not None:
            self.hub.send(message)

    def from_hub(self, message: Message) -> None:
        self.ledger.heard(message)
        now, checks_of_kept = self.world.now, self.kept_checks
        match message:
            case Submit():
                self.submits[message.request_id] = message
                checks_of_kept.begun(message)
                self.book.begin(message, now)
                if self.world.happens("allocation", 0.3):
                    checks_of_kept.forgotten(message.request_id)
                    self.book.fail(message.request_id, Failure.of(ServerError("out of memory")))
                    self.ledger.has_failed(message.request_id)
                else:
                    self.engine.add(message)
            case Adopt():
                with checks_of_kept.adopting(message):
                    self.book.adopt(message, now)
                self.engine.may_fail(message.request_id)
            case Assign():
                whole = self.ledger.assigning(message)
                self.handle(message)
                self.ledger.was_assigned(whole)
            case Cancel(sample=None):
                checks_of_kept.forgotten(message.request_id)
                self.book.forget(message.request_id)
            case Cancel(sample=int(sample)):
                checks_of_kept.cut(message.request_id, sample)
                self.ledger.cutting(message.request_id, sample)
                self.book.forget_answer(message.request_id, sample, now)
                self.ledger.was_cut(message.request_id)

    def lost_hub(self) -> None:
        self.ledger.hub_lost()
        self.kept_checks.losing_hub()
        self.book.hub_lost(self.world.now)
        self.kept_checks.lost_hub()
        self.offered = self.book.offer(self.sessions.last_attempt)
        self.kept_checks.offers(self.offered)

    def tick(self) -> None:
        self.handle(Tick())
        self.book.look(self.world.now)
        progress_checks.language_on_time(self)
        self.ledger.on_time()
        self.kept_checks.on_time()
        self.world.at(1.0, self, self.tick)


def _place(buffer: list[int], runs: list[tuple[int, int]], cells: list[int]) -> None:
    at = 0
    for start, stop in runs:
        buffer[start:stop] = cells[at : at + stop - start]
        at += stop - start


def _gather(buffer: list[int], runs: list[tuple[int, int]]) -> list[int]:
    return [cell for start, stop in runs for cell in buffer[start:stop]]
