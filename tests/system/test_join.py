"""Encode ranks of a second torchrun join a server under load, are killed, join again, and leave: no answer is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.cluster.slots import EXIT_REFUSED
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import REPO, Job, Server

TOKEN = {"Q3VL_TOKEN": "what ranks of this job show one another"}
SAMPLING = SamplingParams(max_new_tokens=64, logprobs=1)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[Asked]:
    return ask_scenes(tmp_path_factory.mktemp("scenes"), seed=515, count=24)


@pytest.fixture(scope="module")
def expected(asked) -> list[Any]:
    return LLM().chat([entry.messages() for entry in asked], SAMPLING)


class Load:
    """Clients that ask one question after another until the block ends; every answer is checked then."""

    def __init__(self, server: Server, asked: list[Asked], expected: list[Any], at_once: int = 3) -> None:
        self._server, self._asked, self._expected = server, asked, expected
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(at_once)
        self._clients = [(at_once, n) for n in range(at_once)]
        self._futures: list[Future[None]] = []
        self.answers: list[tuple[int, int, Any]] = []
        """(question, status, body), in the order in which they came."""

    def _ask(self, at_once: int, first: int) -> None:
        for n in range(first, 10**6, at_once):
            if self._stopping.is_set():
                return
            question = n % len(self._asked)
            self.answers.append((question, *self._server.chat(self._asked[question].content())))

    def __enter__(self) -> Self:
        self._futures = [self._pool.submit(self._ask, *client) for client in self._clients]
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stopping.set()
        self._pool.shutdown()
        if kind is None:
            for future in self._futures:
                future.result()
            for question, status, body in self.answers:
                assert status == 200, body
                assert body["choices"][0]["token_ids"] == self._expected[question].token_ids

    def ranks_since(self, first: int) -> set[int]:
        """Encode ranks that the answers from the `first` one on speak of."""
        answers = [body for _, status, body in self.answers[first:] if status == 200]
        return {rank for body in answers for rank in body["timings"]["encode_ranks"]}

    def until(self, holds: Callable[[], bool], limit_s: float = 30.0) -> None:
        end = time.monotonic() + limit_s
        while not holds():
            for future in self._futures:
                if future.done():
                    future.result()
            assert time.monotonic() < end, [status for _, status, _ in self.answers[-20:]]
            time.sleep(0.05)


def pids(server: Server, role: str) -> dict[int, int]:
    return {entry["rank"]: entry["pid"] for entry in server.processes() if entry["role"] == role}


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=[pytest.mark.acceptance, pytest.mark.timeout(180)])])
def test_encode_ranks_join_under_load_are_killed_join_again_and_leave(world, asked, expected):
    with Server(world, "--hub", "127.0.0.1:0", env=TOKEN) as server, Load(server, asked, expected) as load:
        language = pids(server, "language")
        with Job("encode.py", 1, "--join", server.hub, env=TOKEN) as job:
            load.until(lambda: world in load.ranks_since(0))
            os.kill(pids(server, "encode")[world], signal.SIGKILL)
            load.until(lambda: world + 1 in load.ranks_since(0))
            assert "encode rank: killed by SIGKILL; starting it again" in job.output()

            job.remember_pids()
            job.process.send_signal(signal.SIGTERM)
            job.process.wait(30)
            num_before = len(load.answers) + 3  # those under way
            load.until(lambda: len(load.answers) > num_before + 12)
            assert load.ranks_since(num_before) == {0}
            assert not job.alive()
            for word in ("did not leave", ": exit ", "left over"):
                assert word not in job.output(), job.output()
            assert job.output().count("Traceback") == job.output().count("got signal: 15") == 1
        assert sorted(pids(server, "encode")) == [0]
        assert pids(server, "language") == language
        assert not server.get("/ready")["degraded"]


def test_what_joins_ends_with_the_server_and_who_does_not_fit_is_refused(asked, expected):
    with Server(2, "--hub", "127.0.0.1:0", env=TOKEN) as server:
        ranks = [join_alone("--join", server.hub, env=TOKEN) for _ in range(2)]
        other = join_alone("--join", server.hub, "--dtype", "bfloat16", env=TOKEN)
        output, _ = other.communicate(timeout=60)
        assert other.returncode == EXIT_REFUSED, output
        refusal = "handshake refused: dtype: expected 'float32', got 'bfloat16'"
        assert output == f"encode rank: {refusal}\nencode rank: exit 78; the job ends\n"
        wait_for_ranks(server, [0, 2, 3])
        status, answer = server.chat(asked[0].content())
        assert status == 200
        assert answer["choices"][0]["token_ids"] == expected[0].token_ids
        ranks[0].send_signal(signal.SIGTERM)  # to the slot alone
        output, _ = ranks[0].communicate(timeout=30)
        assert ranks[0].returncode == 0, output
        [left] = re.fullmatch(r"encode rank (2|3): joined\n", output).groups()
        wait_for_ranks(server, [0, 5 - int(left)])
        server.process.send_signal(signal.SIGTERM)
        output, _ = ranks[1].communicate(timeout=30)
        assert ranks[1].returncode == 0, output
        assert output == f"encode rank {5 - int(left)}: joined\n"


def wait_for_ranks(server: Server, encode_ranks: list[int]) -> None:
    end = time.monotonic() + 30
    while sorted(pids(server, "encode")) != encode_ranks:
        assert time.monotonic() < end, server.processes()
        time.sleep(0.05)


def join_alone(*args: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """encode.py without torchrun."""
    plain = {name: value for name, value in os.environ.items() if name not in TOKEN}
    command = [sys.executable, "recipes/encode.py", *args]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPO, env={**plain, **(env or {})}, **pipes)
