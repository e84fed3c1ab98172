"""A run: the server, its clients, and the events that are done to it when their time comes."""

from __future__ import annotations

import heapq
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from tools.chaos_parts.bad_input import Bad
from tools.chaos_parts.far_host import FarHost
from tools.chaos_parts.job import Command, Rank, Server
from tools.chaos_parts.load import Load
from tools.chaos_parts.processes import send
from tools.chaos_parts.questions import Asked
from tools.chaos_parts.record import Record
from tools.chaos_parts.schedule import Event
from tools.chaos_parts.watch import watch

MOST_JOINED = 2
TICK_S = 0.1
SAMPLE_S = 10.0
LANGUAGE_END_S = 30.0
"""After a language rank's death the job has ended by itself."""
LEFT_S = 60.0
"""After SIGTERM a joined rank has left, also one that was still loading."""
WHOLE_S = 120.0
"""After the last event the server is whole again."""
MOST_RESTARTS = 20


class Skipped(Exception):
    """An event that cannot be, and why."""


@dataclass
class Done:
    """`target`: what was hit; `until`: when it was over, on the record's clock, if that is not at once."""

    target: str = ""
    until: float = 0.0
    note: str = ""


class Ordeal:
    """`follow` does the events on the thread that calls it, which has to be the main one."""

    def __init__(self, server: Server, load: Load, record: Record, far: FarHost, *, kills_language: bool) -> None:
        self._server, self._load, self._record, self._far = server, load, record, far
        self._kills_language = kills_language
        self._later: list[tuple[float, int, bool, Callable[[], None]]] = []
        """When, in which order, whether it is a repair, and what."""
        self._numbers = count()
        self._paused_s = 0.0
        self._num_restarts = 0
        self._cut_until = 0.0

    def follow(self, events: Sequence[Event], seconds: float) -> None:
        """Each at its time, until `seconds` are over; what was stopped or cut goes on then."""
        for event in events:
            self._at(event.at, partial(self._do, event))
        self._sample_again(0.0)
        while (now := self._now()) < seconds:
            while self._later and self._later[0][0] <= now:
                heapq.heappop(self._later)[-1]()
            self._look_after_job()
            time.sleep(TICK_S)
        self._finish()

    def _now(self) -> float:
        """On the schedule's clock, which stands still while the server is started again."""
        return self._record.now() - self._paused_s

    def _at(self, at: float, what: Callable[[], None], *, is_repair: bool = False) -> None:
        heapq.heappush(self._later, (at, next(self._numbers), is_repair, what))

    def _finish(self) -> None:
        """Nothing stays stopped or cut. What else is still to come does not."""
        for _, _, is_repair, what in sorted(self._later, key=lambda entry: entry[:2]):
            if is_repair:
                what()
        self._later.clear()

    def _sample_again(self, at: float) -> None:
        def sample() -> None:
            self._record.sample(watch(self._server, self._record.now()))
            self._sample_again(max(at + SAMPLE_S, self._now()))

        self._at(at, sample)

    # ---- the server itself ----

    def _look_after_job(self) -> None:
        for name, status in self._server.forget_ended():
            self._record.say(f"a joined rank has ended with {status}: {name}")
        if self._server.has_ended():
            ended = self._server.command.process.returncode if self._server.command else None
            self._record.trouble(f"the job ended by itself, with status {ended}: {self._server.log}")
            self._start_again(Event(self._now(), "job-ended", {}), self._record.now())

    def _start_again(self, event: Event, since: float) -> None:
        """Clients see no server meanwhile, and the schedule waits."""
        self._num_restarts += 1
        if self._num_restarts > MOST_RESTARTS:
            raise RuntimeError(f"the server was started again {MOST_RESTARTS} times")
        self._server.kill()
        self._server.start()
        until = self._record.now()
        self._paused_s += until - since
        self._record.did(event, since, until, note="the server was started again")

    # ---- events ----

    def _do(self, event: Event) -> None:
        start = self._record.now()
        try:
            done = self._act(event)
        except Skipped as reason:
            self._record.skip(event, str(reason))
            return
        except (OSError, subprocess.SubprocessError) as error:
            self._record.skip(event, f"{type(error).__name__}: {error}")
            return
        if done is not None:
            self._record.did(event, start, max(done.until, self._record.now()), done.target, done.note)

    def _act(self, event: Event) -> Done | None:
        args = event.args
        given = {name: value for name, value in args.items() if name != "target"}
        match event.kind:
            case "kill-encode":
                return Done(self._kill(self._rank("encode", args)).name)
            case "stop-encode":
                return self._stop(args)
            case "kill-frontend":
                return Done(self._kill(self._rank("frontend", args)).name)
            case "kill-language":
                self._kill_language(event)
                return None
            case "burst":
                self._load.burst(**given)
            case "bad-input":
                self._load.bad_input(**given)
            case "hang-up":
                self._load.hang_up(**given)
            case "slow-clients":
                self._load.slow(**given)
            case "join":
                return self._join()
            case "leave":
                return self._leave(args)
            case "kill-join":
                joined = self._a_joined(args)
                joined.kill()
                return Done(joined.log.name)
            case "partition":
                return self._partition(args["seconds"])
        return Done()

    def _rank(self, role: str, args: Any) -> Rank:
        """The one that was hit when this was first done, or else the one that `pick` chooses."""
        ranks = [rank for rank in self._server.ranks() if rank.role == role]
        if not ranks:
            raise Skipped(f"no {role} is there")
        named = [rank for rank in ranks if rank.name == args.get("target")]
        return named[0] if named else ranks[int(args.get("pick", 0) * len(ranks))]

    def _kill(self, rank: Rank) -> Rank:
        if not send(rank.process, signal.SIGKILL):
            raise Skipped(f"{rank.name} had just ended")
        return rank

    def _stop(self, args: Any) -> Done:
        rank = self._rank("encode", args)
        if not send(rank.process, signal.SIGSTOP):
            raise Skipped(f"{rank.name} had just ended")
        self._at(self._now() + args["seconds"], lambda: self._go_on(rank), is_repair=True)
        return Done(rank.name, self._record.now() + args["seconds"])

    def _go_on(self, rank: Rank) -> None:
        is_there = send(rank.process, signal.SIGCONT)
        self._record.say(f"{rank.name} goes on" if is_there else f"{rank.name} has ended while it was stopped")

    def _kill_language(self, event: Event) -> None:
        """The job ends with it. The line in the log comes when it is there again."""
        if not self._kills_language:
            raise Skipped("--kill-language is not given")
        if self._num_restarts >= MOST_RESTARTS:
            raise Skipped(f"the server was started again {MOST_RESTARTS} times")
        start = self._record.now()
        rank = self._kill(self._rank("language", event.args))
        deadline = time.monotonic() + LANGUAGE_END_S
        while not self._server.has_ended() and time.monotonic() < deadline:
            time.sleep(TICK_S)
        took = self._record.now() - start
        if not self._server.has_ended():
            self._record.trouble(f"{rank.name} was killed and the job did not end in {LANGUAGE_END_S:.0f} s")
        self._record.say(f"{rank.name} was killed; the job ended after {took:.1f} s")
        self._start_again(event, start)

    def _join(self) -> Done:
        if len(self._server.joined) >= MOST_JOINED:
            raise Skipped(f"{MOST_JOINED} have joined already")
        self._server.join()
        return Done(note=self._far.reason)

    def _a_joined(self, args: Any) -> Command:
        if not self._server.joined:
            raise Skipped("no rank has joined")
        return self._server.joined[int(args["pick"] * len(self._server.joined))]

    def _leave(self, args: Any) -> Done:
        joined = self._a_joined(args)
        joined.remember()
        joined.process.send_signal(signal.SIGTERM)
        self._at(self._now() + LEFT_S, lambda: self._check_left(joined))
        return Done(joined.log.name)

    def _check_left(self, joined: Command) -> None:
        if not joined.has_ended():
            self._record.trouble(f"a joined rank has not left {LEFT_S:.0f} s after SIGTERM: {joined.log}")
            joined.kill()
        elif left := joined.left_over():
            self._record.trouble(f"a joined rank left {len(left)} processes behind: {joined.log}")

    def _partition(self, seconds: float) -> Done:
        if self._far.reason:
            raise Skipped(self._far.reason)
        if self._now() < self._cut_until:
            raise Skipped("the link is cut already")
        self._far.cut()
        self._cut_until = self._now() + seconds
        self._at(self._cut_until, self._heal, is_repair=True)
        return Done(until=self._record.now() + seconds, note=f"{len(self._server.joined)} ranks are beyond it")

    def _heal(self) -> None:
        self._far.heal()
        self._record.say("the link is there again")


def afterwards(server: Server, load: Load, record: Record, pool: Sequence[Asked], bad: Sequence[Bad]) -> None:
    """When all is over the server is whole again, answers each request of the pool, and none of the bad ones."""
    deadline = time.monotonic() + WHOLE_S
    while not server.is_whole() and time.monotonic() < deadline:
        time.sleep(0.2)
    if not server.is_whole():
        record.trouble(f"the server is not whole {WHOLE_S:.0f} s after the last event")
    outcomes = [load.ask(asked, near="afterwards")[0] for asked in pool]
    outcomes += [load.send_bad(one, near="afterwards") for one in bad]
    for outcome in outcomes:
        if outcome.verdict != "right":
            record.trouble(f"when all was over, {outcome.name}: {outcome.verdict} {outcome.note}"[:300])
