"""A slot: the process that torchrun starts. It forks what does the work, and supervises. Linux only.

torchrun ends the whole job when one worker dies; a slot lets an encode rank, or the frontend, die alone. It has no
thread, no process group and no CUDA context, so that forking is safe, and has torch imported, so that it is cheap.

Signals: SIGTERM and SIGINT stay blocked in the slot (it waits for them) and in its children. torchrun signals a
worker's whole process group at once, so a rank would otherwise leave while requests run; ranks leave when the hub
tells them to. The frontend unblocks the two and drains. What has not left in time is killed here.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from qwen3vl_disagg.cluster.rendezvous import World
from qwen3vl_disagg.core.errors import (
    CanaryFailed,
    CheckpointError,
    DeviceLost,
    DisaggError,
    Dismissed,
    HandshakeError,
    HubGone,
    InputError,
)
from qwen3vl_disagg.core.host import raise_descriptor_limit
from qwen3vl_disagg.core.logs import start_logging, write_line

logger = logging.getLogger(__name__)
EXIT_INPUT = 2
EXIT_REFUSED = 78
"""A rank that does not fit the others, or computes what its checkpoint does not say. Like bad input, starting it again
would not help, if it never lived."""
EXIT_GONE = 69
"""A rank whose hub is gone for good: how a host notices that the job is over on the others."""
KILL_S = 30.0
"""After a signal torchrun kills what is left of its workers."""
LEAVE_S = 28.0
"""After a signal, children have this long; the slot itself takes some hundredths of a second."""
ORPHAN_S = 5.0
"""After a signal and the end of the frontend, ranks have this long."""
_EXIT_LAST_S = 5.0
_TICK_S = 0.25
_IDLE_TICK_S = 5.0
_LONG_LIFE_S = 10.0
_MAX_BACKOFF_S = 10.0
_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
_WAITED = _STOP_SIGNALS | {signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Child:
    """A process to fork. `body` returns the exit status: 0 says that it was told to leave.

    `is_vital`: its death ends the job; else it is forked again. `sockets`: the only ones of the slot's that it keeps.
    `takes_signals`: SIGTERM and SIGINT are passed on to it. `on_fork` is called in the slot right before it is forked;
    one that `is_stuck` is killed, which is a death like any other. `was_of_use`: in the life that has just ended, so
    that however short that was, it is no sign that the next would be no better.
    """

    name: str
    body: Callable[[], int]
    is_vital: bool
    sockets: tuple[socket.socket, ...] = ()
    takes_signals: bool = False
    on_fork: Callable[[], None] = lambda: None
    is_stuck: Callable[[], bool] = lambda: False
    was_of_use: Callable[[], bool] = lambda: False


@dataclass
class _Running:
    pid: int
    started: float
    num_quick_deaths: int


@dataclass
class Slot:
    """Forks `children` and supervises them. `sockets` are the slot's own, inherited as each child says.

    `is_hub_gone`: whether the frontend has left for good. `on_left(name)` is called when a child has. `on_stop` is
    called once, when the slot begins to end; `on_told` before, if that is because its frontend left by itself, and
    `on_lost`, if one of the others failed for good.
    """

    children: Sequence[Child]
    sockets: Sequence[socket.socket] = ()
    is_hub_gone: Callable[[], bool] = lambda: False
    on_left: Callable[[str], None] = lambda name: None
    on_stop: Callable[[], None] = lambda: None
    on_told: Callable[[], None] = lambda: None
    on_lost: Callable[[], None] = lambda: None
    leave_s: float = LEAVE_S
    orphan_s: float = ORPHAN_S
    _running: dict[str, _Running] = field(default_factory=dict)
    _again: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Name -> (when to fork it again, quick deaths so far)."""
    _has_lived: set[str] = field(default_factory=set)
    _status: int = 0
    _stop_by: float | None = None
    _orphan_by: float | None = None
    _looked_at: float = field(default_factory=time.monotonic)

    def run(self, on_begin: Callable[[], None] = lambda: None) -> int:
        """Until every child has left. The exit status: 0, or that of the failure that ended the slot.

        `on_begin` is called before anything is forked: from then on signals wait.
        """
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
        try:
            on_begin()
            for child in self.children:
                self._fork(child, num_quick_deaths=0)
            while self._running or self._again:
                has_deadlines = bool(self._again) or self._stop_by is not None
                self._take_signal(signal.sigtimedwait(_WAITED, _TICK_S if has_deadlines else _IDLE_TICK_S))
                self._reap()
                self._fork_again()
                self._enforce()
                self._end_stuck()
            return self._status
        finally:
            for running in self._running.values():
                os.kill(running.pid, signal.SIGKILL)
                os.waitpid(running.pid, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _take_signal(self, info: signal.struct_siginfo | None) -> None:
        if info is not None and info.si_signo in _STOP_SIGNALS:
            self._stop()

    def _stop(self) -> None:
        """Fork nothing more, and let the children leave."""
        if self._stop_by is not None:
            return
        self._stop_by = time.monotonic() + self.leave_s
        self._again.clear()
        for child in self.children:
            if child.takes_signals and child.name in self._running:
                os.kill(self._running[child.name].pid, signal.SIGTERM)
        self.on_stop()

    def _reap(self) -> None:
        """Children are waited for one by one: the slot may have others, which are not ours to reap."""
        for child in self.children:
            running = self._running.get(child.name)
            if running is None:
                continue
            pid, wait_status = os.waitpid(running.pid, os.WNOHANG)
            if pid:
                del self._running[child.name]
                self._ended(child, running, os.waitstatus_to_exitcode(wait_status))

    def _ended(self, child: Child, running: _Running, status: int) -> None:
        if status == 0:
            self.on_left(child.name)
            if child.takes_signals and self._stop_by is None:
                self.on_told()
                self._stop()
            return
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit {status}"
        lived = time.monotonic() - running.started
        if lived >= _LONG_LIFE_S or child.was_of_use():
            self._has_lived.add(child.name)
        if not self._is_final(child, status):
            is_quick = lived < _LONG_LIFE_S and not child.was_of_use()
            deaths = running.num_quick_deaths + 1 if is_quick else 0
            # The first deaths are answered at once; what keeps dying is given time.
            pause = min(0.25 * 2.0 ** (deaths - 3), _MAX_BACKOFF_S) if deaths >= 3 else 0.0
            self._again[child.name] = (time.monotonic() + pause, deaths)
            logger.warning("%s: %s; starting it again%s", child.name, how, f" in {pause:g} s" if pause else "")
            return
        logger.error("%s: %s%s", child.name, how, "; the job ends" if self._stop_by is None else "")
        self._status = self._status or (status if status > 0 else 1)
        self.on_left(child.name)
        if self._stop_by is None and not child.takes_signals and status != EXIT_GONE:
            self.on_lost()
        self._stop()
        # Without its frontend nobody tells the ranks of this slot to leave; without its rank a slot has no reason to.
        if child.is_vital:
            self._orphan_by = self._orphan_by or time.monotonic() + self.orphan_s

    def _is_final(self, child: Child, status: int) -> bool:
        """What was wrong from the start will be again; a checkpoint that one lived on and that has vanished may come
        back, and others do without this one."""
        is_wrong = status in (EXIT_INPUT, EXIT_REFUSED) and child.name not in self._has_lived
        return child.is_vital or is_wrong or status == EXIT_GONE or self._stop_by is not None

    def _fork_again(self) -> None:
        for child in self.children:
            due, num_quick_deaths = self._again.get(child.name, (float("inf"), 0))
            if time.monotonic() >= due:
                del self._again[child.name]
                self._fork(child, num_quick_deaths)

    def _enforce(self) -> None:
        if self._stop_by is None:
            return
        now = time.monotonic()
        if self._orphan_by is None and self.is_hub_gone():
            self._orphan_by = now + self.orphan_s
        if now >= min(self._stop_by, self._orphan_by or self._stop_by):
            for name, running in self._running.items():
                logger.error("%s: did not leave in time", name)
                os.kill(running.pid, signal.SIGKILL)

    def _end_stuck(self) -> None:
        """Not after this process itself stood still, as when the whole host did."""
        now = time.monotonic()
        stood_still, self._looked_at = now - self._looked_at > 2 * _IDLE_TICK_S, now
        for child in self.children:
            if child.name in self._running and self._stop_by is None and not stood_still and child.is_stuck():
                logger.error("%s: does not get on", child.name)
                os.kill(self._running[child.name].pid, signal.SIGKILL)

    def _fork(self, child: Child, num_quick_deaths: int) -> None:
        child.on_fork()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _run_child(child, self.sockets, parent)
        self._running[child.name] = _Running(pid, time.monotonic(), num_quick_deaths)


def _run_child(child: Child, sockets: Sequence[socket.socket], parent: int) -> None:
    """In the child, to its end: `os._exit`, so that no hanging thread and nothing of the slot's can hold it up."""
    # 300,000 objects of modules: to look through them for garbage takes 0.2 s, and their pages are shared no more.
    gc.freeze()
    start_logging(child.name)
    status = 1
    try:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        for sock in sockets:
            if sock not in child.sockets:
                sock.close()
        status = child.body()
    except Dismissed:
        status = 0
    except (InputError, CheckpointError) as error:
        logger.error("error: %s", error)
        status = EXIT_INPUT
    except (HandshakeError, CanaryFailed) as error:
        logger.error("%s", error)
        status = EXIT_REFUSED
    except DeviceLost as error:
        logger.error("%s", error)
    except HubGone as error:
        logger.error("%s", error)
        status = EXIT_GONE
    except BaseException:
        logger.exception("failed")
    finally:
        _end_children()
        _leave(status)


def _end_children() -> None:
    """Those that decode media or make prompts. They end by themselves when their pipes close, but one that is just
    starting, at low priority on a busy host, takes seconds to see that. The job is over when nothing of it is left."""
    for task in Path("/proc/self/task").iterdir():
        pids: list[str] = []
        with contextlib.suppress(OSError):  # a thread that has just ended
            pids = (task / "children").read_text().split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _leave(status: int) -> NoReturn:
    """What was printed goes out; whoever read it may have gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def leave_process(status: int) -> NoReturn:
    """End a slot: what was registered for the end, what was printed, and nothing else.

    Python's own way takes every module down, a second of CPU where torch is one of them; on a busy host, with eight
    slots on two cores, that alone is longer than torchrun waits.
    """
    with contextlib.suppress(BaseException):  # each that fails has been printed, with its traceback
        atexit._run_exitfuncs()
    _leave(status)


_runners: list[asyncio.Runner] = []
"""Loops that have ended, with what was left in them: when such a thing is collected, it complains."""


def run_loop(main: Coroutine[Any, Any, int]) -> int:
    """`asyncio.run` for the body of a child: threads that still work, and tasks, are left where they are, because the
    process ends right after, by `os._exit`. A tokenizer or a tower in a thread would hold it up as long as it takes.

    What is there before is not looked at again for garbage.
    """
    gc.collect()
    gc.freeze()
    runner = asyncio.Runner()
    _runners.append(runner)
    return runner.run(main)


def run_worker(run: Callable[[World], int]) -> int:
    """A worker's exit status: what `run` returns, or, told in one line, 2 for bad input, 69 without a hub, and else 1.

    When the arguments are wrong, a host's first worker speaks for all: the others end after it, because torchrun ends
    everybody when one leaves.
    """
    world = World.from_env()
    raise_descriptor_limit()
    start_logging()
    try:
        if world.has_agent:
            die_with_parent(os.getppid())
        status = run(world)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except (InputError, CheckpointError) as error:
        if world.local_rank == 0:
            write_line(sys.stderr, f"error: {error}")
        status = EXIT_INPUT
    except DisaggError as error:
        write_line(sys.stderr, f"error: slot {world.rank}: {error}")
        status = EXIT_GONE if isinstance(error, HubGone) else 1
    if world.local_rank != 0 and status == EXIT_INPUT:
        time.sleep(_EXIT_LAST_S)
    return status


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when its parent dies, even with -9."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
