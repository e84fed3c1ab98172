"""SIGSTOP, for as long as matters, to each process of a job under load: requests are right or end typed, and afterwards
the job is whole, without a restart, or with one that was said."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.checked_load import Load, is_whole, loaded_server, wait_whole
from tests.support.server import Server
from tools.chaos_parts.processes import look

pytestmark = pytest.mark.acceptance
WHOLE_S = 90


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Iterator[Load]:
    with loaded_server(tmp_path_factory.mktemp("scenes")) as load:
        yield load


def pids(server: Server) -> dict[str, int]:
    """Name -> pid of what the frontend knows, of the slots above and of the keeper."""
    found = {f"{one['role']} {one['rank']}" if "rank" in one else one["role"]: one["pid"] for one in server.processes()}
    slots = {f"slot of {name}": look(pid).parent for name, pid in found.items()}
    first = slots["slot of frontend"]
    server.remember_pids()
    below = [pid for pid in server.pids if (process := look(pid)) is not None and process.parent == first]
    [keeper] = set(below) - set(found.values())
    return {**found, **slots, "keeper": keeper}


@pytest.mark.parametrize(
    ("who", "seconds", "is_restarted"),
    [
        ("encode 0", 15, False),
        ("encode 1", 65, False),
        ("language 2", 15, False),
        ("frontend", 14, False),
        ("frontend", 30, True),
        ("keeper", 30, False),
        ("slot of frontend", 30, False),
        ("slot of language 2", 65, False),
    ],
)
def test_a_process_that_stands_still(load, who, seconds, is_restarted):
    server = load.server
    before, said = pids(server), len(server.output())
    with load:
        time.sleep(2)
        os.kill(before[who], signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(before[who], signal.SIGCONT)
        whole_s = wait_whole(server, WHOLE_S)
        time.sleep(3)
    after, log = pids(server), server.output()[said:]
    changed = sorted(name for name in before if before[name] != after.get(name))
    times = f"longest {load.longest:.1f} s, whole after {whole_s:.1f} s"
    print(f"{who}, {seconds} s: {dict(load.ends)}, {times}, new: {changed}")
    print("\n".join(line for line in log.splitlines() if "request" not in line and "busy" not in line)[-1500:])
    assert is_whole(server)
    load.check()
    assert load.ends["right"] > 20
    assert bool(changed) == is_restarted
    assert not changed or "starting it again" in log
