"""What an encode rank was told, beside what its sessions remember: which grant holds, when each state has to end, whose
turn it is, who has a place, and what is in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3vl_disagg.protocol.encode_sessions import ENCODING, HEADER, PARKED, READY, SENDING, SENT, Outgoing
from qwen3vl_disagg.protocol.messages import Abort, Ack, Beat, Frame, Grant, HeaderOk, Nack, Resume, Room, Stale
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    BreakLink,
    EncodeEvent,
    FrameIn,
    ItemFailed,
    LanguageEvent,
    LinkDown,
    LinkUp,
    PayloadSent,
    SendFrame,
    SendHeader,
    SendPayload,
    StartEncode,
    Tell,
    Tick,
)
from tools.simulation.world import Violation

_IN_MEMORY = (ENCODING, READY, HEADER, SENDING, SENT)
_MOMENT_S = 1e-6


class EncodeLedger:
    """Of one incarnation."""

    def __init__(self, rank: Any) -> None:
        self.rank, self.sessions = rank, rank.sessions
        self._grants: dict[Attempt, Grant] = {}
        """The first of each attempt that is here."""
        self._rooms: dict[Attempt, tuple[int, int, Room]] = {}
        """What was granted last, and not acknowledged: language rank, epoch, grant."""
        self._came_at: dict[Attempt, float] = {}
        self._came_from: dict[Attempt, int] = {}
        self._dues: dict[Attempt, float] = {}
        self._payload_s: dict[Attempt, float] = {}
        """How long the payload that is sent may take, as its receiver says."""
        self._entered: dict[Attempt, float] = {}
        """Deadline, when it was seen first."""
        self._links: dict[int, int] = {}
        """Language rank -> epoch of the last link."""
        self._ready: dict[int, list[Attempt]] = {}
        """What waited for its link's turn, in order."""
        self._dropped: set[Attempt] = set()
        """Given up, and their payload has still to follow."""
        self._parked: set[Attempt] = set()
        self.began: Attempt | None = None
        """What was begun last by this event."""

    # ---- what it is told ----

    def heard(self, peer: int, frame: Frame) -> None:
        """A frame comes that is the next one."""
        body, items = frame.body, self.sessions.items
        if isinstance(body, Grant) and body.key not in items:
            now = self.rank.world.now
            of_request = [item.due for key, item in items.items() if key[0] == body.request_id]
            self._grants[body.key], self._came_at[body.key], self._came_from[body.key] = body, now, peer
            self._dues[body.key] = of_request[0] if of_request else now + body.due_s
        elif isinstance(body, HeaderOk):
            self._payload_s[body.key] = max(self.sessions.limits.payload_s, body.payload_s)
        if isinstance(body, Room):
            self._rooms[body.key] = peer, frame.epoch, body
        elif isinstance(body, Ack) and body.key in self._rooms and self._rooms[body.key][2].row_stop == body.received:
            del self._rooms[body.key]

    def _granted(self, attempt: Attempt) -> Room | None:
        return self._rooms[attempt][2] if attempt in self._rooms else None

    def taken(self, peer: int, frame: Frame) -> None:
        """I11, I13, I15: it has been handled, and its link goes on."""
        body = frame.body
        if not isinstance(body, (Room, Ack, Nack, Abort)):
            return
        item = self.sessions.items.get(body.key)
        if isinstance(body, Grant) and item is None:
            raise Violation("I11", f"{body.key} is granted, and is not here")
        if isinstance(body, Resume) and item is None and not self._is_refused(body):
            raise Violation("I11", f"{body.key} is to be resumed, is gone, and that is not said")
        if item is None or item.language_rank != peer:
            return
        if isinstance(body, Room) and item.grant is not body:
            raise Violation("I11", f"{body.key} was granted {body}, the encode rank goes by {item.grant}")
        is_whole = isinstance(body, Ack) and body.received == item.visual.num_rows and item.is_encoded
        if is_whole or isinstance(body, Nack):
            raise Violation("I15", f"{body.key} is {item.state} after {body}")

    def _is_refused(self, resume: Resume) -> bool:
        said = [one.frame.body for one in self.rank.said]
        return any(isinstance(body, Nack) and body.key == resume.key for body in said)

    # ---- what it does ----

    def does(self, action: Any) -> None:
        match action:
            case StartEncode():
                self._begins(action)
            case SendHeader(grant=grant):
                self._is_its_turn(action.peer, grant.key)
                if grant is not self._granted(grant.key):
                    raise Violation("I8", f"{grant} is answered, granted was {self._granted(grant.key)}")
            case SendPayload(grant=grant):
                payload_s = self._payload_s.get(grant.key)
                if grant is not self._granted(grant.key) or action.payload_s != payload_s:
                    raise Violation("I11", f"{grant} is sent in {action.payload_s} s, its receiver waits {payload_s}")
            case BreakLink():
                event = self.rank.event
                if isinstance(event, PayloadSent) and (event.language_rank, event.epoch) != (action.peer, action.epoch):
                    raise Violation("I11", f"{action}, for {event}")
            case Tell(message=ItemFailed() as message):
                if message.key in self.sessions.items and not self.sessions.items[message.key].is_dropped:
                    raise Violation("I15", f"{message.key} has failed, and goes on")

    def may_release(self, attempt: Attempt) -> None:
        """I13: rows go when they are not needed any more, or for want of room, and then those that wait longest."""
        event = self.rank.event
        if (
            isinstance(event, Tick)
            or attempt in self._dropped
            or (isinstance(event, ItemFailed) and event.key == attempt)
        ):
            return
        if isinstance(event, FrameIn):
            body = event.frame.body
            is_over = isinstance(body, (Ack, Nack, Abort)) and body.key == attempt
            if is_over or (isinstance(body, Grant) and body.key[:2] == attempt[:2]):
                return
        peer = self._came_from.get(attempt)
        parked = [o for o in self.sessions.items.values() if o.state is PARKED and o.language_rank == peer]
        if len(parked) < self.sessions.limits.max_parked:
            raise Violation("I13", f"rows of {attempt} go after {event}, and there is room for them")
        just_now = self.rank.world.now + self.sessions.limits.lease_s
        until = self._entered[attempt] if attempt in self._parked else just_now
        if until > min(o.deadline for o in parked):
            raise Violation("I13", f"rows of {attempt} go, and others have waited for longer")

    def _begins(self, action: StartEncode) -> None:
        """I11, I16: with what its grant says of it."""
        attempt, now = action.attempt, self.rank.world.now
        grant, due = self._grants[attempt], self._dues[attempt]
        said = (action.visual, action.is_alone, action.due)
        if said != (grant.visual, grant.is_alone, due):
            raise Violation("I16", f"{attempt} begins as {said}, granted as {(grant.visual, grant.is_alone, due)}")
        if abs(action.waited_s - (now - self._came_at[attempt])) > _MOMENT_S:
            raise Violation("I11", f"{attempt} came at {self._came_at[attempt]}, waited {action.waited_s} s at {now}")
        if attempt in self.sessions.items:
            self.began = attempt
            is_gone = self._came_from[attempt] not in self.sessions.outlets
            if is_gone and not isinstance(self.rank.event, Tick):  # in which it may break later
                raise Violation("I11", f"{attempt} is begun, and its link is gone")

    def _is_its_turn(self, peer: int, attempt: Attempt) -> None:
        """I16: payloads go in the order in which they are ready."""
        for other in self._ready.get(peer, ()):
            if other == attempt:
                return
            item = self.sessions.items.get(other)
            if item is not None and item.state is READY:
                raise Violation("I16", f"{attempt} goes before {other}, which was ready before it")

    # ---- what must hold ----

    def after(self, event: EncodeEvent) -> None:
        """I11, I12, I15, I16: each item is in the lines that its state belongs to, and in no other; memory is bounded;
        what is due first is first in the queue."""
        sessions = self.sessions
        items, outlets, queue = sessions.items, sessions.outlets, sessions.queue
        entered = self._entered
        num_encoding = num_clips = num_ready = num_sending = num_parked = 0
        for attempt, item in items.items():
            state = item.state
            if entered.get(attempt) is not item.deadline:  # it is set anew when the state is another
                entered[attempt] = item.deadline
                self._enters(attempt, item)
            if item.is_dropped:
                self._dropped.add(attempt)
                if state is not HEADER:
                    raise Violation("I15", f"{attempt} was given up, and is {state}")
            if state is ENCODING:
                num_encoding += 1
                num_clips += item.visual.modality == "video"
                if item.grant is None:
                    self._is_void(attempt)
                if attempt in self.rank.encoded:
                    raise Violation("I11", f"{attempt} is encoded, and counts as being encoded")
            elif state is PARKED:
                num_parked += 1
                if item.grant is not None:
                    raise Violation("I11", f"{attempt} is parked, granted is {item.grant}")
                self._is_void(attempt)
            elif item.grant is None:
                raise Violation("I11", f"{attempt} is {state}, and nothing is granted")
            elif state is READY:
                num_ready += 1
            elif state is HEADER or state is SENDING:
                num_sending += 1
                if outlets[item.language_rank].turn != attempt:
                    raise Violation("I8", f"{attempt} is {state}, and it is not its turn")
            elif state is SENT:
                num_sending += 1
        num_in_memory = num_encoding + num_ready + num_sending + num_parked
        num_queued, num_waiting = len(items) - num_in_memory, 0
        for peer, outlet in outlets.items():
            ready = outlet.ready
            if ready or peer in self._ready:
                self._ready[peer] = list(ready)
                num_waiting += len(ready)
                if ready and outlet.turn is None:
                    raise Violation("I11", f"{ready[0]} is ready for {peer}, and nobody has the turn")
        if num_waiting != num_ready or len(queue) != num_queued:
            raise Violation("I15", f"{num_queued} items are queued, {num_ready} ready; in line are {queue}")
        if len(self.rank.visuals) != num_in_memory:
            raise Violation("I15", f"{self.rank.visuals.keys()} are in memory, the sessions have {items.keys()}")
        if num_in_memory > 1:
            self._is_bounded(num_encoding, num_clips, num_in_memory, num_parked)
        if num_parked or self._parked:
            self._parked = {attempt for attempt, item in items.items() if item.state is PARKED}
        if type(event) is LinkDown or type(event) is LinkUp:
            self._is_linked(event)
        if len(entered) > 2 * len(items) + 16:
            self._forget()
        if self.began is not None:
            self._may_begin(self.began)
        if queue:
            self._is_full()
        if type(event) is PayloadSent and event.error is not None:
            sent_over = outlets.get(event.language_rank)
            if sent_over is not None and sent_over.state.epoch == event.epoch:
                raise Violation("I11", f"a payload of {event.attempt} was not sent, and its link goes on")

    def _is_linked(self, event: LinkUp | LinkDown) -> None:
        """I9: a link that is gone is gone, and it alone; the last one that came is there."""
        links = {peer: outlet.state.epoch for peer, outlet in self.sessions.outlets.items()}
        is_as_told(event, links, self._links)

    def _is_bounded(self, num_encoding: int, num_clips: int, num_in_memory: int, num_parked: int) -> None:
        limits, num_languages = self.sessions.limits, self.rank.cluster.sizes.num_language
        places, most_parked = limits.max_items + limits.max_urgent, limits.max_parked * num_languages
        most = places * num_languages + most_parked
        if len(self.rank.encoded) > most:
            raise Violation("I12", f"rows of {len(self.rank.encoded)} items in memory")
        if num_encoding > places or num_clips > limits.max_clips + limits.max_urgent:
            raise Violation("I12", f"{num_encoding} items are encoded at a time, {num_clips} clips")
        if num_in_memory > most or num_parked > most_parked:
            raise Violation("I12", f"{num_in_memory} items in memory, {num_parked} parked")

    def _is_void(self, attempt: Attempt) -> None:
        """I11: a grant is void once its link is gone, or its rows are acknowledged, and not before."""
        if attempt in self._rooms:
            peer, epoch, grant = self._rooms[attempt]
            outlet = self.sessions.outlets.get(peer)
            if outlet is not None and outlet.state.epoch == epoch:
                raise Violation("I11", f"{attempt} goes on without {grant}, which holds")

    def _forget(self) -> None:
        """Attempts that are over."""
        self._dropped &= self.sessions.items.keys()
        for table in (
            self._entered,
            self._came_from,
            self._grants,
            self._rooms,
            self._came_at,
            self._dues,
            self._payload_s,
        ):
            for attempt in table.keys() - self.sessions.items.keys():
                del table[attempt]

    def _enters(self, attempt: Attempt, item: Outgoing) -> None:
        """I11: each state has the time that it is meant to have, no less and no more."""
        rank, limits, state, seconds = self.rank, self.sessions.limits, item.state, None
        if state is HEADER:
            seconds = limits.answer_s
        elif state is PARKED:
            seconds = limits.lease_s
        elif state is SENDING:
            seconds = 2 * self._payload_s[attempt]
        elif state is SENT:
            seconds = limits.answer_s + self._payload_s[attempt] - limits.payload_s
        until = rank.request_ends[attempt] if seconds is None else rank.world.now + seconds
        if abs(item.deadline - until) > _MOMENT_S:
            invariant = "I13" if state is PARKED and item.deadline < until else "I11"
            raise Violation(invariant, f"{attempt} is {state} until {item.deadline}, should be {until}")
        if item.due != self._dues[attempt]:
            raise Violation("I16", f"{attempt} is due at {item.due}, should be {self._dues[attempt]}")

    # ---- places ----

    def _others(self, but: Attempt | None) -> list[Outgoing]:
        return [item for key, item in self.sessions.items.items() if key != but and item.state in _IN_MEMORY]

    def _why_not(self, item: Outgoing, others: list[Outgoing]) -> str | None:
        """What keeps an item from a place beside these: so many places of each kind are for all, `max_urgent` more for
        what is due before those that have them. Clips above their number are not counted with the images, and those
        of a rank that are above it not with that rank's."""
        limits = self.sessions.limits
        encoding = [o for o in others if o.state is ENCODING]
        clips = [o for o in encoding if o.visual.modality == "video"]
        of_rank = [o for o in others if o.language_rank == item.language_rank]
        share = limits.max_items if len(self.sessions.outlets) < 2 else (limits.max_items + 1) // 2

        def above(those: list[Outgoing]) -> int:
            num_clips = sum(1 for o in those if o in clips and o.due <= item.due)
            return max(0, num_clips - limits.max_clips)

        kinds = [
            ("items", encoding, limits.max_items, above(encoding)),
            ("items of its rank", of_rank, share, above(of_rank)),
        ]
        if item.visual.modality == "video":
            kinds.append(("clips", clips, limits.max_clips, 0))
        for name, in_places, most, more in kinds:
            num_before = len([o for o in in_places if o.due <= item.due])
            if num_before >= most + more or len(in_places) >= most + limits.max_urgent:
                return f"{len(in_places)} {name}"
        return None

    def _may_begin(self, attempt: Attempt) -> None:
        """I12: what was begun last had a place."""
        item = self.sessions.items.get(attempt)
        if item is not None and item.state is ENCODING and (reason := self._why_not(item, self._others(attempt))):
            raise Violation("I12", f"{attempt} is begun beside {reason}")

    def _is_full(self) -> None:
        """I11: what waits for a place has none. I16: the queue is in order, among equals by arrival."""
        others, last = self._others(None), (-math.inf, -math.inf)
        for attempt in self.sessions.queue:
            item = self.sessions.items[attempt]
            if self._why_not(item, others) is None:
                raise Violation("I11", f"{attempt} waits for a place, and there is one")
            if (item.due, self._came_at[attempt]) < last:
                raise Violation("I16", f"{attempt}, due at {item.due}, is behind what is due at {last}")
            last = item.due, self._came_at[attempt]


def answers_stale(epoch: int, frame: Frame, sent: list[SendFrame]) -> None:
    """I9: who speaks of an old link is told so, once, and no more."""
    expected = 1 if frame.epoch < epoch and not isinstance(frame.body, Stale) else 0
    said = [one.frame.body for one in sent]
    if len(said) != expected or not all(isinstance(body, Stale) and body.epoch == epoch for body in said):
        raise Violation("I9", f"a frame of epoch {frame.epoch} is answered with {said}, now is epoch {epoch}")


def changed_nothing(event: EncodeEvent | LanguageEvent, actions: Sequence[Any]) -> bool:
    """Mostly: a tick or a beat after which nothing was said but beats. The look after the next event is soon enough."""
    kind = type(event)
    if kind is Tick:
        return not actions or all(type(action) is SendFrame for action in actions)
    return not actions and kind is FrameIn and type(event.frame.body) is Beat  # type: ignore[union-attr]


def is_as_told(event: LinkUp | LinkDown, links: Mapping[int, int], last: dict[int, int]) -> None:
    """I9: `links` are there now; `last`: the last epoch that came, of each peer."""
    if isinstance(event, LinkUp):
        last[event.peer] = max(event.epoch, last.get(event.peer, 0))
        if event.epoch == last[event.peer] and links.get(event.peer) not in (None, event.epoch):
            raise Violation("I9", f"{event}, and the link has epoch {links.get(event.peer)}")
    elif links.get(event.peer) == event.epoch:
        raise Violation("I9", f"{event}, and the link goes on")
