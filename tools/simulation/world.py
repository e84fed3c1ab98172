"""Virtual time, and connections that can be hurt. One source of random numbers decides everything."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any, Protocol

from qwen3vl_disagg.protocol.messages import Frame

FRAME_FAULTS = ("drop", "duplicate", "reorder", "delay", "corrupt", "truncate", "header", "endless")
"""What can happen to one frame or payload of a link. header: it says something else than what was granted; endless: a
payload that does not come to its end."""
RANK_FAULTS = (
    "partition",
    "one-way",
    "black-hole",
    "kill-encode",
    "kill-language",
    "kill-hub",
    "away",
    "leave",
    "poison",
    "freeze",
    "slow",
    "break",
    "allocation",
)
"""What can happen to a rank, or to a connection. black-hole: frames pass, payloads do not; away: encode ranks are dead
for long; leave: one asks to be let go; poison: an item ends each process that encodes it."""
FAULTS = FRAME_FAULTS + RANK_FAULTS

SILENCE_S = 4.0
RETURN_S = 3.0
"""After its link has broken, a send or receive returns within this time."""
STUCK_S = 12.0
"""One that is stuck returns after this time even so."""


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{invariant}: {what}")
        self.invariant = invariant


class Process(Protocol):
    """Whatever can be frozen or dead; events of a dead one vanish, those of a frozen one wait."""

    is_dead: bool
    frozen_until: float
    slowness: float


class World:
    """The clock and the queue of events. `faults`: which kinds may happen, up to `faults_until`."""

    def __init__(self, rng: Random, faults: frozenset[str], faults_until: float, rate: float) -> None:
        self.rng = rng
        self.random = rng.random
        self.now = 0.0
        self.num_events = 0
        self.faults, self.faults_until, self.rate = faults, faults_until, rate
        self.table: Counter[tuple[str, str]] = Counter()
        """(fault, state of a session that it hit) -> times"""
        self._heap: list[tuple[float, float, int, Any, Callable[..., None], tuple[Any, ...]]] = []
        """(when, when it came, count, ..): what comes to a frozen process keeps its order when it is frozen again."""
        self._count = 0

    def at(self, delay: float, owner: Process | None, do: Callable[..., None], *args: Any) -> None:
        """Let `owner` do this after `delay` seconds, unless it is dead by then."""
        self._count += 1
        time = self.now + delay
        heappush(self._heap, (time, time, self._count, owner, do, args))

    def at_time(self, time: float, owner: Process | None, do: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heappush(self._heap, (time, time, self._count, owner, do, args))

    def run(self, until: float) -> None:
        """All events before `until`, in order."""
        heap, pop = self._heap, heappop
        while heap and heap[0][0] < until:
            time, came, count, owner, do, args = pop(heap)
            if owner is not None:
                if owner.is_dead:
                    continue
                if owner.frozen_until > time:
                    heappush(heap, (owner.frozen_until, came, count, owner, do, args))
                    continue
            self.now = time
            self.num_events += 1
            do(*args)
        self.now = max(self.now, until)

    def happens(self, fault: str, times: float = 1.0) -> bool:
        """Whether this kind of fault strikes now; `times` as often as usual."""
        return self.now < self.faults_until and fault in self.faults and self.random() < times * self.rate

    def delay(self, slowness: float = 1.0) -> float:
        return (0.001 + 0.02 * self.random()) * slowness


class Channel:
    """One direction of a TCP connection: in order, nothing lost, until somebody hurts it."""

    __slots__ = ("deliver", "heard_at", "held", "is_open", "last", "link", "owner", "said_at", "sender", "world")

    def __init__(
        self,
        world: World,
        sender: Process,
        owner: Process,
        deliver: Callable[..., None],
        link: SimLink | None = None,
    ) -> None:
        self.world, self.sender, self.owner, self.deliver, self.link = world, sender, owner, deliver, link
        self.last = 0.0
        self.said_at = self.heard_at = world.now
        """When something was said last; when that was said which has arrived last."""
        self.is_open = True
        self.held: deque[Any] | None = None
        """While a partition lasts: what is not through yet."""

    @property
    def is_through(self) -> bool:
        """Nothing that was said is still under way."""
        return self.is_open and self.held is None and self.last < self.world.now

    def send(self, message: Any) -> None:
        if not self.is_open:
            return
        self.said_at = self.world.now
        if self.held is not None:
            self.held.append(message)
            return
        world = self.world
        arrival = world.now + (0.001 + 0.02 * world.random()) * self.sender.slowness
        if arrival < self.last:
            arrival = self.last
        if self.link is None:  # of the hub
            arrival += 3.0 * world.random() if world.happens("delay") else 0.0
        elif world.now < world.faults_until and world.faults:
            arrival = self._hurt(message, arrival)
            if arrival < 0:
                return
        if arrival > self.last:
            self.last = arrival
        world.at_time(arrival, self.owner, self._arrive, message, world.now)

    def _hurt(self, message: Any, arrival: float) -> float:
        """When the frame arrives; negative: never."""
        world, link = self.world, self.link
        if link is None:
            raise RuntimeError("only frames of links are hurt")
        if world.happens("delay"):
            link.count("delay")
            arrival += 3.0 * world.random()
        if world.happens("drop"):
            link.count("drop")
            return -1.0
        if world.happens("corrupt") or world.happens("truncate"):
            # It does not decode: the receiving end closes the connection.
            link.count("corrupt" if world.random() < 0.5 and "corrupt" in world.faults else "truncate")
            world.at_time(arrival, self.owner, link.close, self.owner, "a frame does not decode")
            return -1.0
        if world.happens("duplicate"):
            link.count("duplicate")
            later = 0.05 if world.random() < 0.7 else 6.0
            seen: list[bool] = []
            world.at_time(arrival + later * world.random(), self.owner, self._arrive_again, message, seen)
            world.at_time(arrival, self.owner, self._arrive, message, world.now, seen)
            self.last = max(self.last, arrival)
            return -1.0
        if world.happens("reorder"):
            link.count("reorder")
            world.at_time(arrival + 0.05, self.owner, self._arrive, message, world.now)
            return -1.0
        return arrival

    def _arrive(self, message: Any, said_at: float, seen: list[bool] | None = None) -> None:
        if self.is_open:
            if seen is not None:
                seen.append(True)
            if said_at > self.heard_at:
                self.heard_at = said_at
            self.deliver(message)

    def _arrive_again(self, message: Any, seen: list[bool]) -> None:
        """A copy of what was here before, possibly after the connection's end, as one of an old epoch would come."""
        link = self.link
        if link is not None and seen:
            link.rank_at(self.owner).take_copy(link, message)

    def hold(self) -> None:
        if self.held is None:
            self.held = deque()

    def heal(self) -> None:
        held, self.held = self.held, None
        for message in held or ():
            self.send(message)


class SimLink:
    """A link of one epoch: two channels, and payloads matched with the receives that were posted for them, in order."""

    def __init__(self, world: World, encode: Any, language: Any, epoch: int) -> None:
        self.world, self.encode, self.language, self.epoch = world, encode, language, epoch
        self.to_language = Channel(world, encode, language, self._to_language, self)
        self.to_encode = Channel(world, language, encode, self._to_encode, self)
        self.began_at = world.now
        self.is_broken = False
        self.hole_until = 0.0
        """Until then payloads do not get through."""
        self._sends: deque[Any] = deque()
        self._receives: deque[Any] = deque()
        self._endless_sends: list[Any] = []
        self._endless_receives: list[Any] = []
        """Of payloads that do not come to their end."""

    @property
    def is_sound(self) -> bool:
        """Both ends take it for open, and nothing is held back."""
        ways = (self.to_language, self.to_encode)
        return self.language.links.get(self.encode.rank) is self and all(w.is_open and w.held is None for w in ways)

    def rank_at(self, process: Process) -> Any:
        return self.encode if process is self.encode else self.language

    def count(self, fault: str) -> None:
        """A fault has hit this link: which states were its sessions in?"""
        self.encode.count_states(fault, self.language.rank)
        self.language.count_states(fault, self.encode.rank)

    def _to_language(self, frame: Frame) -> None:
        self.language.take(self, frame)

    def _to_encode(self, frame: Frame) -> None:
        self.encode.take(self, frame)

    def close(self, by: Process, reason: str) -> None:
        """One end closes the connection (or has noticed that it is gone); the other hears of it a little later."""
        mine, other = (self.to_encode, self.language) if by is self.encode else (self.to_language, self.encode)
        if not mine.is_open:
            return
        mine.is_open = False
        self.rank_at(by).lost_link(self, reason)
        theirs = self.to_language if by is self.encode else self.to_encode
        # A partition holds the news back, until the other end finds the silence too long.
        patience = SILENCE_S if theirs.held is not None else 0.03
        self.world.at(patience * self.world.random(), other, self.close, other, "the peer closed")
        self.end_payloads()

    def end_payloads(self) -> None:
        """Posted sends and receives end with an error, some of them only after their own timeout."""
        if self.is_broken:
            return
        self.is_broken = True
        for job in self._receives:
            self._fail_receive(job)
        for payload in self._sends:
            self._fail_send(payload)
        for payload in self._endless_sends:
            self._fail_send(payload)
        for job in self._endless_receives:
            self._fail_receive(job)
        for waiting in (self._receives, self._sends, self._endless_receives, self._endless_sends):
            waiting.clear()

    def _fail_send(self, payload: Any, seconds: float = RETURN_S) -> None:
        self.world.at(seconds * self.world.random(), self.encode, self.encode.sent, self, payload, "broken")

    def _fail_receive(self, job: Any, seconds: float = RETURN_S) -> None:
        self.world.at(seconds * self.world.random(), self.language, self.language.payload_broke, self, job)

    def post_send(self, payload: Any) -> None:
        if self.is_broken:
            self.world.at(self.world.delay(), self.encode, self.encode.sent, self, payload, "broken")
            return
        self._sends.append(payload)
        self._match()

    def post_receive(self, job: Any) -> None:
        if self.is_broken:
            self._fail_receive(job)
            return
        self._receives.append(job)
        self._match()

    def _match(self) -> None:
        while self._sends and self._receives:
            payload, job = self._sends.popleft(), self._receives.popleft()
            is_in_hole = self.hole_until > self.world.now
            if is_in_hole and self.world.random() < 0.8:
                self._fail_send(payload, 0.3)
                self._fail_receive(job, 0.3)
                continue
            if is_in_hole or self.world.happens("endless"):
                if not is_in_hole:
                    self.count("endless")
                self._never_end(payload, job)
                continue
            slowness = max(self.encode.slowness, self.language.slowness)
            done = self.world.delay(2.0 * slowness) + self.encode.cluster.sizes.payload_s * self.world.random()
            self.world.at(done, None, self._complete, payload, job)

    def _never_end(self, payload: Any, job: Any) -> None:
        """Each end gives up after its own time; or is stuck, and does so when the link breaks, or much later."""
        self._endless_sends.append(payload)
        self._endless_receives.append(job)
        limit = job.payload_s
        for time_out in (self._send_times_out, self._receive_times_out):
            self.world.at(limit if self.world.random() < 0.7 else STUCK_S, None, time_out, payload, job)

    def _send_times_out(self, payload: Any, _: Any) -> None:
        if any(payload is other for other in self._endless_sends):
            self._endless_sends = [other for other in self._endless_sends if other is not payload]
            self.world.at(0.0, self.encode, self.encode.sent, self, payload, "timed out")

    def _receive_times_out(self, _: Any, job: Any) -> None:
        if any(job is other for other in self._endless_receives):
            self._endless_receives = [other for other in self._endless_receives if other is not job]
            self.world.at(0.0, self.language, self.language.payload_broke, self, job)

    def _complete(self, payload: Any, job: Any) -> None:
        if self.is_broken and self.world.random() < 0.5:
            self._fail_receive(job)
            self._fail_send(payload)
            return
        self.world.at(self.world.delay(), self.encode, self.encode.sent, self, payload, None)
        self.world.at(self.world.delay(), self.language, self.language.payload_came, self, payload, job)
