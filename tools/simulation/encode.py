"""An encode rank: the production sessions, and a tower that takes virtual time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from qwen3vl_disagg.core.errors import DisaggError, Failure, InputError, ServerError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.encode_sessions import PARKED, EncodeSessions
from qwen3vl_disagg.protocol.messages import (
    Abort,
    Ack,
    Beat,
    Decoded,
    EncodingBegun,
    EncodingEnded,
    Frame,
    Grant,
    Header,
    ItemFailed,
    LinksUp,
    Message,
    Nack,
    Room,
    Stale,
    Stop,
)
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    BreakLink,
    Encoded,
    EncodeEvent,
    FrameIn,
    LinkDown,
    LinkUp,
    PayloadSent,
    Release,
    SendFrame,
    SendHeader,
    SendPayload,
    StartEncode,
    Tell,
    Tick,
)
from tools.simulation import checks, progress_checks
from tools.simulation.encode_checks import EncodeLedger, answers_stale, changed_nothing
from tools.simulation.payload import Payload, make_payload, run_digests, wrong_header
from tools.simulation.progress_checks import encode_bounds
from tools.simulation.stays import Stays
from tools.simulation.world import Channel, SimLink, Violation


class SimEncode:
    """One incarnation of an encode rank."""

    def __init__(self, cluster: Any, rank: int) -> None:
        self.cluster, self.world, self.rank = cluster, cluster.world, rank
        self.is_dead, self.frozen_until, self.slowness = False, 0.0, 1.0
        self.sessions = EncodeSessions(cluster.limits)
        self.links: dict[int, SimLink] = {}
        self.hub: Channel | None = None
        self.from_hub_channel: Channel | None = None
        self.visuals: dict[Attempt, VisualItem] = {}
        self.tasks: set[Attempt] = set()
        """To be encoded, or being encoded; of these, `inside` has begun."""
        self.inside: dict[Attempt, str] = {}
        self._queue: deque[StartEncode] = deque()
        self._is_alone = False
        self.encoded: set[Attempt] = set()
        self.lease_until: dict[Attempt, float] = {}
        self.request_ends: dict[Attempt, float] = {}
        self.num_steps: Counter[Attempt] = Counter()
        """Grants heard and headers sent: what is parked, granted and parked again began a new lease; so did what was
        given up and granted again, between two looks."""
        self.said_at: dict[int, float] = {}
        """When something was said last over each link."""
        self.stays, self.bounds = Stays(self.world), encode_bounds(cluster.limits, cluster.sizes.moving_s)
        self.is_leaving = False
        self.on_stop: Callable[[], None] | None = None
        self._do = {
            SendFrame: self._send_frame,
            BreakLink: self._break_link,
            StartEncode: self._start,
            SendHeader: self._send_header,
            SendPayload: self._send_payload,
            Release: self._release,
            Tell: self._tell,
        }
        self.ledger = EncodeLedger(self)
        self.said: list[SendFrame] = []
        """By this event."""
        self.event: EncodeEvent = Tick()
        self.num_outlets = 0
        """Before the event."""

    # ---- sessions ----

    def handle(self, event: EncodeEvent) -> None:
        self.event, self.num_outlets = event, len(self.sessions.outlets)
        if self.said:
            self.said.clear()
        self.ledger.began = None
        actions = self.sessions.handle(event, self.world.now)
        for action in actions:
            kind = type(action)
            self._do[kind](action)  # type: ignore[operator]
            if kind is not SendFrame and kind is not Release:
                self.ledger.does(action)
        if not changed_nothing(event, actions):
            self.ledger.after(event)

    def _send_frame(self, action: SendFrame) -> None:
        self.cluster.check_wire(action.frame)
        self.said.append(action)
        if isinstance(action.frame.body, Nack):
            checks.may_refuse(self, action.frame.body)
        progress_checks.may_beat(self, action.peer, action.frame)
        link = self.links.get(action.peer)
        if link is not None and link.epoch == action.frame.epoch:
            link.to_language.send(action.frame)

    def _break_link(self, action: BreakLink) -> None:
        link = self.links.get(action.peer)
        if link is not None and link.epoch == action.epoch:
            self.world.at(0.0, self, link.close, self, action.reason)

    def _start(self, action: StartEncode) -> None:
        attempt = action.attempt
        checks.may_start(self, attempt)
        checks.as_due(self, attempt)
        self.visuals[attempt] = action.visual
        self.tasks.add(attempt)
        self._queue.append(action)
        self._let_in()

    def _let_in(self) -> None:
        """Work begins in the order in which it came; what is to be alone waits for those before it, and is waited for.
        As the pipeline's gate does it."""
        while self._queue:
            attempt, visual, is_alone = self._queue[0].attempt, self._queue[0].visual, self._queue[0].is_alone
            if attempt in self.tasks and attempt not in self.inside:
                if self.inside and (is_alone or self._is_alone):
                    return
                digest = self.inside[attempt] = visual.digest
                self._is_alone = is_alone
                self.tell(EncodingBegun(digest=digest))
                seconds = (0.02 + self.cluster.sizes.encode_s * self.world.random()) * self.slowness
                self.world.at(seconds, self, self._finish, attempt)
            self._queue.popleft()

    def _end_work(self, attempt: Attempt, *, is_well: bool = False) -> None:
        self.tasks.discard(attempt)
        digest = self.inside.pop(attempt, None)
        if digest is not None:
            self.tell(EncodingEnded(digest=digest, is_well=is_well))
            self._let_in()

    def _finish(self, attempt: Attempt) -> None:
        if attempt not in self.inside:
            return
        digest = self.inside[attempt]
        if digest == "poison":
            self.count_states("poison")
            self.cluster.end_process(self, 0.05)
            return
        self._end_work(attempt, is_well=digest != "bad")
        if digest == "bad":
            self._fail(attempt, InputError("not an image"))
        elif self.world.happens("allocation"):
            self.count_states("allocation")
            self._fail(attempt, ServerError("out of memory"))
        else:
            self.tell(Decoded(request_id=attempt[0], item=attempt[1], attempt=attempt[2]))
            self.encoded.add(attempt)
            self.handle(Encoded(attempt))

    def _send_header(self, action: SendHeader) -> None:
        grant = action.grant
        attempt = grant.key
        payload = self._payload(action)
        header = Header(
            request_id=grant.request_id,
            item=grant.item,
            attempt=grant.attempt,
            total_rows=self.visuals[attempt].num_rows,
            row_start=grant.row_start,
            row_stop=grant.row_stop,
            deepstack_start=grant.deepstack_start,
            deepstack_stop=grant.deepstack_stop,
            grid=self.visuals[attempt].grid,
            row_digests=run_digests(payload.rows, grant.row_runs, grant.row_start),
            deepstack_digests=run_digests(payload.deepstack, grant.deepstack_runs, grant.deepstack_start),
        )
        self.num_steps[attempt] += 1
        link = self.links.get(action.peer)
        if link is not None and self.world.happens("header", 4.0):
            link.count("header")
            header = wrong_header(self.world.rng, header, self._attempts_but(attempt))
        self._send_frame(SendFrame(action.peer, Frame(epoch=action.epoch, seq=action.seq, body=header)))

    def _attempts_but(self, attempt: Attempt) -> list[Attempt]:
        """Of all encode ranks."""
        return [other for encode in self.cluster.encodes for other in encode.sessions.items if other != attempt]

    def _payload(self, action: SendHeader | SendPayload) -> Payload:
        grant = action.grant
        attempt = grant.key
        if attempt not in self.encoded:
            raise Violation("I13", f"rows of {attempt} are gone, but were to be sent")
        return make_payload(self.cluster.names, attempt, grant, self.visuals[attempt].num_rows)

    def _send_payload(self, action: SendPayload) -> None:
        link = self.links.get(action.language_rank)
        if link is not None and link.epoch == action.epoch:
            payload = self._payload(action)
            self.cluster.count_payload(payload)
            link.post_send(payload)

    def sent(self, link: SimLink, payload: Payload, error: str | None) -> None:
        self.handle(PayloadSent(link.language.rank, link.epoch, payload.attempt, error))

    def _release(self, action: Release) -> None:
        attempt = action.attempt
        if attempt not in self.visuals:
            raise Violation("I13", f"{attempt} is released, and is not in memory")
        checks.may_release(self, self.event, attempt)
        self.ledger.may_release(attempt)
        self._end_work(attempt)
        self.encoded.discard(attempt)
        for table in (self.visuals, self.lease_until, self.request_ends):
            table.pop(attempt, None)

    def _fail(self, attempt: Attempt, error: DisaggError) -> None:
        request_id, item, number = attempt
        self.handle(ItemFailed(request_id=request_id, item=item, attempt=number, failure=Failure.of(error)))

    def _tell(self, action: Tell) -> None:
        self.tell(action.message)

    # ---- links ----

    def link_up(self, link: SimLink) -> None:
        if not link.to_encode.is_open:
            return
        self.links[link.language.rank] = link
        link.to_language.said_at = self.world.now  # the sessions hear of it now
        self.tell_links()
        self.said_at[link.language.rank] = self.world.now
        self.handle(LinkUp(link.language.rank, link.epoch))
        if self.world.random() < 0.1:
            self.world.at(self.world.random(), self, self._hear_again, link)

    def _hear_again(self, link: SimLink) -> None:
        """Of a link that is here, and of the end of the one before: nothing may change."""
        before, peer = self.snapshot(), link.language.rank
        outlet = self.sessions.outlets.get(peer)
        if self.links.get(peer) is not link or outlet is None or outlet.state.epoch != link.epoch:
            return
        self.handle(LinkUp(peer, link.epoch))
        self.handle(LinkDown(peer, link.epoch - 1, "late news"))
        if self.snapshot() != before:
            raise Violation("I9", f"late news of links between {self.rank} and {peer} changed something")
        if self.world.happens("break"):
            link.count("break")
            stale = Frame(epoch=link.epoch, seq=outlet.state.num_received + 1, body=Stale(epoch=link.epoch + 1))
            self.handle(FrameIn(peer, stale))
            if peer in self.sessions.outlets:
                raise Violation("I9", f"the other end of {peer} is at a later epoch, and the link goes on")

    def lost_link(self, link: SimLink, reason: str) -> None:
        if self.links.get(link.language.rank) is link:
            del self.links[link.language.rank]
            self.tell_links()
        self.handle(LinkDown(link.language.rank, link.epoch, reason))
        self.world.at(0.05 + 0.3 * self.world.random(), self, self.cluster.connect, self, link.language.rank)

    def take(self, link: SimLink, frame: Frame) -> None:
        body, peer = frame.body, link.language.rank
        outlet = self.sessions.outlets.get(peer)
        if type(body) is Beat:
            self._take_beat(outlet, peer, frame)
            return
        expected = 0 if outlet is None else outlet.state.num_received + 1
        is_next = False
        if outlet is not None and outlet.state.epoch == frame.epoch and frame.seq == expected:
            is_next = True
            self.ledger.heard(peer, frame)
        if type(body) is not Ack:
            if isinstance(body, (Abort, Nack)):
                self.lease_until.pop(body.key, None)
            attempt = body.key if isinstance(body, Room) else None
            if attempt in self.sessions.items:
                self.num_steps[attempt] += 1
            elif isinstance(body, Grant) and attempt:
                self.request_ends[attempt] = self.world.now + body.timeout_s
            self.handle(FrameIn(peer, frame))
            if isinstance(body, Abort):
                progress_checks.is_given_up(self, frame, body.key, peer)
            if attempt in self.sessions.items:  # a frame behind a gap is not taken
                progress_checks.one_attempt_is_made(self, attempt)
            if outlet is not None and frame.seq > expected and peer in self.sessions.outlets:
                checks.gap_ends_link(self.sessions.outlets[peer].state, expected, frame)
            if is_next and self.sessions.outlets.get(peer) is outlet:
                self.ledger.taken(peer, frame)
            return
        item = self.sessions.items.get(body.key)
        was_parked = item is not None and item.state == PARKED
        self.handle(FrameIn(link.language.rank, frame))
        if item is not None and item.state == PARKED and not was_parked:
            self.lease_until[item.attempt] = self.world.now + self.sessions.limits.lease_s
        if is_next and self.sessions.outlets.get(peer) is outlet:
            self.ledger.taken(peer, frame)

    def _take_beat(self, outlet: Any, peer: int, frame: Frame) -> None:
        expected = 0 if outlet is None else outlet.state.num_received
        self.handle(FrameIn(peer, frame))
        if outlet is not None and frame.seq > expected and peer in self.sessions.outlets:
            checks.gap_ends_link(self.sessions.outlets[peer].state, expected, frame)

    def take_copy(self, link: SimLink, frame: Frame) -> None:
        """A frame that was here before, or comes too late: nothing may change."""
        before, outlet = self.snapshot(), self.sessions.outlets.get(link.language.rank)
        self.handle(FrameIn(link.language.rank, frame))
        checks.unchanged(self, before, frame)
        if outlet is not None:
            answers_stale(outlet.state.epoch, frame, self.said)

    def snapshot(self) -> Any:
        items = [(i.attempt, i.state, i.grant, i.is_dropped) for i in self.sessions.items.values()]
        links = [(o.state.epoch, o.state.num_received, o.turn, list(o.ready)) for o in self.sessions.outlets.values()]
        return items, links, list(self.sessions.queue), set(self.encoded)

    def count_states(self, fault: str, peer: int | None = None) -> None:
        for item in self.sessions.items.values():
            if peer is None or item.language_rank == peer:
                self.world.table[fault, item.state] += 1

    # ---- hub ----

    def close_hub(self) -> None:
        """Both ways of the connection are over."""
        for channel in (self.hub, self.from_hub_channel):
            if channel is not None:
                channel.is_open = False

    def tell(self, message: Message) -> None:
        if self.hub is not None:
            self.hub.send(message)

    def tell_links(self) -> None:
        links = sorted((rank, link.epoch) for rank, link in self.links.items())
        self.tell(LinksUp(language_ranks=[rank for rank, _ in links], epochs=[epoch for _, epoch in links]))

    def from_hub(self, message: Message) -> None:
        if isinstance(message, Stop) and self.on_stop is not None:
            self.on_stop()

    def lost_hub(self) -> None:
        """Its language ranks say over the links what nobody wants any more."""

    def tick(self) -> None:
        self.handle(Tick())
        progress_checks.encode_on_time(self)
        self.world.at(1.0, self, self.tick)
