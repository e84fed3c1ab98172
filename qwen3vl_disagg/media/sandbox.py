"""The limits that a decoding child puts on itself before it sees a byte of anybody's media."""

from __future__ import annotations

import resource
import signal

MAX_MEMORY = 3 * 2**30
MAX_OPEN_FILES = 32
_NO_MORE_PROCESSES = 0


def enter(max_memory: int = MAX_MEMORY, *, may_fork: bool = False) -> None:
    """No core dump, no file written, few files open, bounded memory, no process or thread started.

    The last one, which `may_fork` leaves out, does not bind the superuser. Signals keep their default action, so that
    CPU time which runs out kills.
    """
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_AS, max_memory),
        *([] if may_fork else [(resource.RLIMIT_NPROC, _NO_MORE_PROCESSES)]),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def start_nothing() -> None:
    """From now on no process and no thread is started, unless by the superuser."""
    resource.setrlimit(resource.RLIMIT_NPROC, (_NO_MORE_PROCESSES, _NO_MORE_PROCESSES))


def allow_cpu(seconds: float) -> None:
    """From now on so much CPU time, user and system, of all threads; then SIGPROF kills this process. 0: no limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
