"""What a language rank was told, and what it says: deadlines to the moment, answers to headers and payloads, and that
what the router and the encode ranks hear is true."""

from __future__ import annotations

import math
from typing import Any

from qwen3vl_disagg.protocol import payload_time
from qwen3vl_disagg.protocol.messages import (
    Abort,
    Ack,
    Adopt,
    Assign,
    Beat,
    Frame,
    Grant,
    Header,
    HeaderOk,
    ItemLost,
    ItemReceived,
    Message,
    Nack,
    RequestFailed,
    Room,
    Submit,
)
from qwen3vl_disagg.protocol.session import DONE, GRANTED, HELD, IDLE, RECEIVING, WAITING, Session
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    BreakLink,
    Expect,
    FrameIn,
    LanguageEvent,
    LinkDown,
    LinkUp,
    PayloadEnd,
    Receive,
    RowsReady,
    SendFrame,
    Tick,
)
from tools.simulation.encode_checks import is_as_told
from tools.simulation.stays import Stays
from tools.simulation.world import Violation

_MOMENT_S = 1e-6


class LanguageLedger:
    """Of one incarnation."""

    def __init__(self, rank: Any) -> None:
        self.rank, self.sessions, self.world = rank, rank.sessions, rank.world
        self.entered: dict[int, float] = {}
        self._states: dict[int, str] = {}
        """Of each session: deadline and state, when they were seen first."""
        self.ends: dict[str, float] = {}
        self.dues: dict[str, float] = {}
        """When each request has to end, and when its first token is due."""
        self.assigned: dict[tuple[str, int], Assign] = {}
        self._epochs: dict[int, int] = {}
        """Encode rank -> epoch of the last link."""
        self._moved: dict[tuple[int, int], tuple[float, float]] = {}
        """(encode rank, epoch) -> bytes, and seconds that they took, of late."""
        self._told: set[Attempt] = set()
        """Attempts of which the hub knows that it needs nothing more of them."""
        self._receiving: dict[Attempt, tuple[float, Receive]] = {}
        self._moving_s: dict[Attempt, float] = {}
        self.sent: list[SendFrame] = []
        self._did: list[Any] = []
        """By this event; frames and the rest."""
        self._stays, self._linked_at, self._all_linked_at = Stays(self.world), dict[int, float](), 0.0
        self.told_last: Message | None = None
        self._cut: tuple[str, int | None] | None = None
        self._event: LanguageEvent = Tick()
        self._before: Session | None = None

    # ---- what it is told ----

    def heard(self, message: Message) -> None:
        """By the hub."""
        now = self.world.now
        match message:
            case Submit():
                self.ends[message.request_id] = now + message.timeout_s
                self.dues[message.request_id] = now + message.due_s
            case Adopt():
                self.ends[message.request_id] = now + message.timeout_s
            case Assign():
                key = (message.request_id, message.item)
                last = self.assigned.get(key)
                if last is not None and message.attempt <= last.attempt:
                    raise Violation("I10", f"attempt {message.attempt} at {key} comes after attempt {last.attempt}")
                self.assigned[key] = message

    def before(self, event: LanguageEvent) -> None:
        self._event = event
        if self.sent:
            self.sent.clear()
        if self._did:
            self._did.clear()
        kind = type(event)
        if kind is FrameIn or kind is Tick:
            return
        if isinstance(event, LinkUp):
            self._epochs[event.peer] = max(event.epoch, self._epochs.get(event.peer, 0))
        elif isinstance(event, Expect):
            self._is_as_submitted(event.request_id, event.deadline, event.due)
        elif isinstance(event, PayloadEnd):
            self._payload_is_here(event)

    @property
    def is_tick(self) -> bool:
        return type(self._event) is Tick

    @property
    def is_giving_up(self) -> bool:
        """The engine has just said what it needs from now on, and what was before is over."""
        return isinstance(self._event, Expect)

    def _payload_is_here(self, event: PayloadEnd) -> None:
        since, job = self._receiving.pop(event.key, (0.0, None))
        session, link = self.sessions.find(*event.key), self.sessions.links.get(event.encode_rank)
        is_awaited = session is not None and session.state is RECEIVING and event.error is None
        if job is not None and is_awaited and link is not None and link.epoch == event.epoch == job.epoch:
            num_bytes, seconds = self._moved.get((event.encode_rank, event.epoch), (0.0, 0.0))
            num_bytes, seconds = num_bytes + self._num_bytes(job.grant), seconds + self.world.now - since
            if num_bytes > payload_time.LATELY_BYTES:
                num_bytes, seconds = num_bytes / 2, seconds / 2
            self._moved[event.encode_rank, event.epoch] = num_bytes, seconds

    def _num_bytes(self, grant: Room) -> int:
        sizes = self.sessions.row_sizes
        each = sizes.input_embeddings + sizes.fill_ids + sizes.mrope_positions
        num_bytes = each * (grant.row_stop - grant.row_start)
        num_bytes += sizes.deepstack_embeddings * (grant.deepstack_stop - grant.deepstack_start)
        return num_bytes + (sizes.aux_datas if isinstance(grant, Grant) else 0)

    def _is_as_submitted(self, request_id: str, deadline: float, due: float | None = None) -> None:
        expected = self.ends[request_id], self.dues[request_id]
        if deadline != expected[0] or due not in (None, expected[1]):
            raise Violation("I11", f"{request_id} ends at {deadline}, due at {due}; should be {expected}")

    def hub_lost(self) -> None:
        """The next one counts attempts on from where they are here."""
        self._told.clear()

    # ---- what it says ----

    def sends(self, action: SendFrame) -> None:
        body = action.frame.body
        if type(body) is Beat:
            return
        self.sent.append(action)
        if isinstance(body, Room):
            assign = self.assigned.get((body.request_id, body.item))
            if assign is None or (assign.attempt, assign.encode_rank) != (body.attempt, action.peer):
                raise Violation("I10", f"{body.key} is granted to encode rank {action.peer}; assigned is {assign}")
            if isinstance(body, Grant):
                self._is_as_assigned(body, assign)
        elif isinstance(body, Ack):
            _, stop = self.rank.progress.get((body.request_id, body.item), (0, 0))
            session = self.sessions.find(*body.key)
            if session is not None and body.received != session.received:
                raise Violation("I13", f"{body.received} rows of {body.key} are acknowledged, here are {stop}")

    def _is_as_assigned(self, grant: Grant, assign: Assign) -> None:
        """I16: a grant says what was said of the item."""
        visual = self.rank.book.running[grant.request_id].items[grant.item]
        left_s = self.dues[grant.request_id] - self.world.now
        said = (grant.visual, grant.is_alone)
        if said != (visual, assign.is_alone) or abs(grant.due_s - left_s) > _MOMENT_S:
            raise Violation("I16", f"{grant} is due in {left_s} s; assigned was {assign}")

    def tells(self, message: Message) -> None:
        """I11: what the router hears of an item is true."""
        self._did.append(message)
        if isinstance(message, ItemReceived):
            if message.key in self._told:
                raise Violation("I11", f"{message} is told once more")
            self._told.add(message.key)
        if isinstance(message, ItemReceived) and not isinstance(self._event, Expect):
            key = message.request_id, message.item
            _, stop = self.rank.progress.get(key, (0, 0))
            session = self.sessions.requests[message.request_id].sessions[message.item]
            if key in self.rank.asked and stop != session.visual.num_rows:
                raise Violation("I11", f"{message} is told after {stop} of {session.visual.num_rows} rows")
        elif isinstance(message, ItemLost):
            request = self.sessions.requests.get(message.request_id)
            session = None if request is None else request.sessions[message.item]
            if session is None or session.attempt != message.attempt or session.state is not IDLE:
                raise Violation("I11", f"{message} is told, and its session goes on")
            is_silent = isinstance(self._event, Tick) and session.encode_rank not in self.sessions.links
            epoch = self._epochs.get(session.encode_rank, 0) if is_silent else 0
            if message.dead_epoch != epoch:
                raise Violation("I11", f"{message} speaks of epoch {message.dead_epoch}, the last link had {epoch}")

    def does(self, action: Any) -> None:
        self._did.append(action)
        event = self._event
        if isinstance(action, BreakLink) and isinstance(event, PayloadEnd):
            if (event.encode_rank, event.epoch) != (action.peer, action.epoch):
                raise Violation("I11", f"{action}, for {event}")
        elif isinstance(action, Receive):
            self._receiving[action.grant.key] = self.world.now, action
            num_bytes, seconds = self._moved.get((action.encode_rank, action.epoch), (0.0, 0.0))
            rate = payload_time.FLOOR_RATE
            if num_bytes >= payload_time.KNOWN_BYTES:
                rate = max(rate, num_bytes / max(seconds, _MOMENT_S) / payload_time.SLOWER)
            moving_s = self._moving_s[action.grant.key] = self._num_bytes(action.grant) / rate
            expected = self.sessions.limits.payload_s + moving_s
            said = [one.frame.body.payload_s for one in self.sent if isinstance(one.frame.body, HeaderOk)]
            if abs(action.payload_s - expected) > _MOMENT_S or said != [action.payload_s]:
                raise Violation("I11", f"a payload may take {action.payload_s} s, said is {said}, should be {expected}")

    # ---- requests that are over, or begin again ----

    def was_preempted(self, request_id: str) -> None:
        """I15: it needs no rows for now, and has no room."""
        request = self.sessions.requests.get(request_id)
        for session in () if request is None else request.sessions:
            if session.is_under_way or session.room is not None or session.hold is not None:
                raise Violation("I15", f"{session.key} was preempted, and is {session.state}")

    def has_failed(self, request_id: str) -> None:
        """I11: it was given up here, and that is said."""
        last = self.told_last
        if not isinstance(last, RequestFailed) or last.request_id != request_id:
            raise Violation("I11", f"{request_id} has failed, and nobody hears of it")
        self.is_over(request_id)

    def is_over(self, request_id: str) -> None:
        """I15: the book has forgotten it, and the engine is told."""
        if request_id in self.rank.book.running or self.rank.engine.cancelled != (request_id, None):
            raise Violation("I15", f"{request_id} is over, and goes on")

    def cutting(self, request_id: str, sample: int) -> None:
        running = self.rank.book.running.get(request_id)
        self._cut = None if running is None else (request_id, sample if running.open - {sample} else None)
        self.rank.engine.cancelled = None

    def was_cut(self, request_id: str) -> None:
        """I15: nor does the engine go on with one answer."""
        if self.rank.engine.cancelled != self._cut:
            raise Violation("I15", f"{self._cut} is not wanted, the engine hears of {self.rank.engine.cancelled}")

    # ---- what must hold ----

    def enters(self, session: Session) -> None:
        """I11: each state has the time that it is meant to have, no less and no more."""
        state, now, limits = session.state, self.world.now, self.sessions.limits
        old, before = self._states.get(id(session), state), self.entered.get(id(session), math.inf)
        self._states[id(session)], self.entered[id(session)] = state, session.deadline
        until = math.inf
        if state is GRANTED:
            until = now + limits.grant_s
        elif state is RECEIVING and not (old is RECEIVING and now >= before):
            until = now + 2 * (limits.payload_s + self._moving_s[session.key])
        elif state is RECEIVING:  # it returns by itself, once its link is broken
            link = self.sessions.links.get(session.encode_rank)
            if link is not None and link.epoch <= self.rank.epochs[session.key]:
                raise Violation("I11", f"{session.key} has not come in time, and its link goes on")
        elif state is WAITING and session.encode_rank not in self.sessions.links:
            until = now + limits.suspend_s
        is_right = session.deadline == until or abs(session.deadline - until) < _MOMENT_S
        if state in (WAITING, GRANTED, RECEIVING, HELD) and not is_right:
            raise Violation("I11", f"{session.key} is {state} until {session.deadline}, should be {until}")

    def assigning(self, assign: Assign) -> Session | None:
        """The session, if all its rows are here: the news of that may be under way."""
        request = self.sessions.requests.get(assign.request_id)
        session = None if request is None else request.sessions[assign.item]
        is_whole = session is not None and session.state in (HELD, DONE) and session.received == session.total
        return session if is_whole else None

    def was_assigned(self, whole: Session | None) -> None:
        """I13: what is here is not encoded and sent once more."""
        if whole is not None and whole.state not in (HELD, DONE):
            raise Violation("I13", f"all rows of {whole.key} are here, and another attempt is {whole.state}")

    def frame_comes(self, peer: int, frame: Frame) -> None:
        """One that is the next."""
        body = frame.body
        session = self.sessions.find(*body.key) if isinstance(body, (Header, Nack, Abort)) else None
        self._before = session if session is not None and session.encode_rank == peer else None
        if isinstance(body, Header) and session is not None and session.state is not GRANTED:
            self._before = None

    def frame_was_taken(self, peer: int, frame: Frame, was_right: bool, was_whole: bool) -> None:
        """I8: a header is answered once, with yes if it is right. I11: who gives an attempt up is believed."""
        body, session = frame.body, self._before
        if isinstance(body, Header):
            answers = [one.frame.body for one in self.sent if isinstance(one.frame.body, (HeaderOk, Nack))]
            kinds = [type(answer) for answer in answers if answer.key == body.key and self.sent[0].peer == peer]
            num_jobs = sum(isinstance(one, Receive) for one in self._did)
            if kinds != [HeaderOk if was_right else Nack] or num_jobs != was_right:
                raise Violation("I8", f"{body} is answered with {answers}; right is {was_right}")
        is_given_up = session is not None and isinstance(body, (Header, Nack, Abort)) and not was_right
        key = getattr(body, "key", None)
        is_told = any(isinstance(one, ItemLost) and one.key == key for one in self._did)
        if is_told and session is None:
            raise Violation("I11", f"{body} from encode rank {peer} ends an attempt that is not its own")
        if is_given_up and not was_whole and not is_told:
            raise Violation("I11", f"{key} was given up with {body}, and that is not told")

    def is_right(self, header: Header) -> bool:
        """Whether a header says what was granted."""
        session = self._before
        if session is None or session.grant is None:
            return False
        grant, visual = session.grant, session.visual
        rows = (header.row_start, header.row_stop, header.deepstack_start, header.deepstack_stop)
        runs = (len(header.row_digests), len(header.deepstack_digests))
        return (
            rows == (grant.row_start, grant.row_stop, grant.deepstack_start, grant.deepstack_stop)
            and runs == (len(grant.row_runs), len(grant.deepstack_runs))
            and (tuple(header.grid), header.total_rows) == (tuple(visual.grid), visual.num_rows)
        )

    @property
    def was_whole(self) -> bool:
        return self._before is not None and self._before.received == self._before.total

    def after_link(self, event: LinkUp | LinkDown) -> None:
        is_as_told(event, {peer: link.epoch for peer, link in self.sessions.links.items()}, {})

    def after_payload(self, event: PayloadEnd, session: Session | None) -> None:
        """I11, I13: what came is acknowledged, handed on and told; a link over which a payload broke is over.
        `session`: the one that waited for it."""
        link = self.sessions.links.get(event.encode_rank)
        if event.is_broken and link is not None and link.epoch == event.epoch:
            raise Violation("I11", f"a payload of {event.key} broke, and its link goes on")
        if session is None:
            return
        link = self.sessions.links.get(session.encode_rank)
        bodies = [one.frame.body for one in self.sent]
        if event.error is None:
            is_acked = any(isinstance(body, Ack) and body.key == event.key for body in bodies)
            is_told = any(isinstance(one, ItemReceived) for one in self._did)
            is_ready = any(isinstance(one, RowsReady) and one.key == event.key for one in self._did)
            is_whole = session.received == session.total
            if not is_ready or is_told != is_whole:
                raise Violation("I11", f"{event.key} came: told {is_told}, ready {is_ready}")
            if is_acked != (link is not None):
                raise Violation("I13", f"{event.key} came, acknowledged is {is_acked}")
        elif not event.is_broken:
            is_refused = any(isinstance(body, Nack) and body.key == event.key for body in bodies)
            is_told = any(isinstance(one, ItemLost) and one.key == event.key for one in self._did)
            if not is_told or is_refused != (link is not None):
                raise Violation("I11", f"{event.key} came wrong: told {is_told}, refused {is_refused}")

    def _are_remembered(self) -> None:
        """I9: epochs of links that are gone, as long as somebody may speak of them. I15: and no longer."""
        sessions = self.sessions
        if self._epochs.keys() == sessions._last_epochs.keys() == sessions.links.keys():
            self._all_linked_at = self.world.now
            return
        stays = self._stays.look(self.world.now)
        forget_s = sessions.limits.forget_s
        at = {session.encode_rank for request in sessions.requests.values() for session in request.sessions}
        for peer, epoch in list(self._epochs.items()):
            if peer in sessions.links:
                self._linked_at[peer] = self.world.now
            gone_s = 0.0 if peer in sessions.links else stays.stay((peer, epoch))
            is_free = peer not in at and stays.stay((peer, "free")) > 0
            at_most_s = self.world.now - max(self._linked_at.get(peer, 0.0), self._all_linked_at)
            known = sessions._last_epochs.get(peer)
            if known is None and (peer in sessions.links or peer in at or at_most_s < forget_s):
                raise Violation("I9", f"epoch {epoch} of encode rank {peer} is forgotten after {at_most_s} s")
            if known is not None and (known != epoch or (gone_s >= forget_s and is_free)):
                raise Violation("I15", f"epoch {known} of encode rank {peer} is kept, the last was {epoch}")
            if known is None:
                del self._epochs[peer]
        stays.done()

    def on_time(self) -> None:
        self._are_remembered()
        for request_id, running in self.rank.book.running.items():
            self._is_as_submitted(request_id, running.deadline, running.due)
            request = self.sessions.requests.get(request_id)
            for session in () if request is None else request.sessions:
                if request.deadline != running.deadline or session.request_deadline != running.deadline:
                    raise Violation("I11", f"{session.key} ends at {session.request_deadline}, not {running.deadline}")
