"""Each process of a running job is out of descriptors for a while, under load, and while more clients come than it may
let in: requests are right or end typed, and afterwards the job is whole, without a restart."""

from __future__ import annotations

import contextlib
import itertools
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checked_load import Load, is_whole, loaded_server, wait_whole
from tests.support.server import Server

pytestmark = pytest.mark.acceptance
FEW_S, WHOLE_S, NUM_MORE = 20.0, 60.0, 40


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Iterator[Load]:
    with loaded_server(tmp_path_factory.mktemp("scenes")) as load:
        yield load


def lowest_free(pid: int) -> int:
    used = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return next(number for number in itertools.count() if number not in used)


@contextlib.contextmanager
def no_more_descriptors(pid: int) -> Iterator[None]:
    """What is open stays; a new one would get the lowest free number, and there is none below the limit but those that
    are closed meanwhile."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free(pid), before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def more_clients(server: Server) -> Iterator[None]:
    """Connections that ask nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(NUM_MORE):
            stack.enter_context(socket.create_connection((server.host, server.port), timeout=5))
        yield


@pytest.mark.parametrize("who", ["frontend", "encode 0", "language 2", "all"])
def test_a_process_without_descriptors(load, who):
    server = load.server
    before = {f"{one['role']} {one.get('rank', '')}".strip(): one["pid"] for one in server.processes()}
    chosen = list(before.values()) if who == "all" else [before[who]]
    said = len(server.output())
    with load:
        time.sleep(2)
        with contextlib.ExitStack() as stack:
            for pid in chosen:
                stack.enter_context(no_more_descriptors(pid))
            with more_clients(server):
                time.sleep(FEW_S)
        whole_s = wait_whole(server, WHOLE_S)
        time.sleep(3)
    after = {f"{one['role']} {one.get('rank', '')}".strip(): one["pid"] for one in server.processes()}
    print(f"{who}: {dict(load.ends)}, longest {load.longest:.1f} s, whole after {whole_s:.1f} s")
    log = server.output()[said:]
    print("\n".join(line for line in log.splitlines() if "request" not in line and "busy" not in line)[-1500:])
    assert is_whole(server)
    load.check()
    assert load.ends["right"] > 20
    assert before == after, "nothing died"
    assert who not in ("frontend", "all") or "cannot accept connections: Too many open files" in log
