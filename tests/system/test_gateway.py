"""nginx with the shipped configuration before two jobs: one is replaced under load, streams come as they are made."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.gateway import NGINX, Gateway
from tests.support.http import Reply, post_json, request, sse_lines
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Server, free_port

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(280),
    pytest.mark.skipif(not NGINX.exists(), reason="nginx is not installed"),
]
PATH = "/v1/chat/completions"
MAX_WAITING, MAX_RUNNING, FAIL_S = 8, 4, 5.0
"""FAIL_S: fail_timeout of the configuration."""


class Jobs:
    """Two servers of one rank each on ports that stay, behind a gateway. Leaving the block ends all of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ports = [free_port(), free_port()]
        self.servers: dict[int, Server] = {}

    def start(self, port: int) -> Server:
        """Returns at once; see `Server.wait_ready`."""
        command = [sys.executable, "-m", "qwen3vl_disagg", "serve", "--world", "1"]
        limits = [f"--max-waiting={MAX_WAITING}", f"--max-running={MAX_RUNNING}", "--kv-cache-gib=0.25"]
        self.servers[port] = Server(1, *limits, port=port, command=command)
        return self.servers[port]

    def stop(self, port: int) -> int:
        """By SIGTERM; returns the exit status. Nothing of it may be left."""
        server = self.servers[port]
        server.remember_pids()
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(40)
        assert not server.alive()
        return status

    def kill(self, port: int) -> None:
        """Everything of it, without a word, as if its host were gone."""
        server = self.servers[port]
        server.remember_pids()
        server.process.kill()
        for pid in server.alive():
            os.kill(pid, signal.SIGKILL)
        server.process.wait(10)

    def __enter__(self) -> Self:
        try:
            for port in self.ports:
                self.start(port)
            for server in self.servers.values():
                server.wait_ready()
            self.gateway = Gateway(self._folder, self.ports).__enter__()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "gateway"):
            self.gateway.__exit__()
        for server in self.servers.values():
            server.__exit__()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Iterator[Jobs]:
    with Jobs(tmp_path_factory.mktemp("nginx")) as jobs:
        yield jobs


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[Asked]:
    return ask_scenes(tmp_path_factory.mktemp("scenes"), seed=77, count=16)


def body_of(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32, **fields}


def long_body(**fields: Any) -> dict[str, Any]:
    return body_of("Tell a long story.", ignore_eos=True, **{"max_tokens": 400, **fields})


def ask_plain(url: str, asked: Asked) -> str:
    reply = post_json(url + PATH, body_of(asked.content()))
    assert reply.status == 200, reply.data
    return reply.json["choices"][0]["message"]["content"]


def ask_streamed(url: str, asked: Asked) -> str:
    """AssertionError unless it is a stream that came to its end."""
    lines = [line[6:] for line in sse_lines(url + PATH, body_of(asked.content(), stream=True)) if line[:6] == "data: "]
    assert lines[-1] == "[DONE]", lines[-3:]
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


class Load:
    """Clients that ask, plain and streamed in turn, until the block ends. Each answer must be the expected one."""

    def __init__(self, url: str, asked: list[Asked], at_once: int = 5) -> None:
        self._url, self._asked, self._at_once = url, asked, at_once
        self._expected = [ask_plain(url, one) for one in asked]
        self._stopping, self._pool = threading.Event(), ThreadPoolExecutor(at_once)
        self._futures: list[Future[None]] = []
        self.failures: list[str] = []
        self.num_plain = self.num_streamed = 0

    def _client(self, first: int) -> None:
        for number in range(first, 10**6, self._at_once):
            if self._stopping.is_set():
                return
            question, is_streamed = number % len(self._asked), bool(number // self._at_once % 2)
            try:
                text = (ask_streamed if is_streamed else ask_plain)(self._url, self._asked[question])
                if text != self._expected[question]:
                    raise AssertionError(f"{text!r} in place of {self._expected[question]!r}")
            except Exception as error:
                self.failures.append(f"question {question}, streamed {is_streamed}: {error!r}")
            self.num_streamed += is_streamed
            self.num_plain += not is_streamed

    @property
    def num_asked(self) -> int:
        return self.num_plain + self.num_streamed

    def wait_for_more(self, count: int, limit_s: float = 60.0) -> None:
        end, wanted = time.monotonic() + limit_s, self.num_asked + count
        while self.num_asked < wanted:
            assert time.monotonic() < end, f"{self.num_asked} answers, {wanted} were wanted"
            time.sleep(0.02)

    def __enter__(self) -> Self:
        self._futures = [self._pool.submit(self._client, number) for number in range(self._at_once)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._pool.shutdown()


def in_the_log(gateway: Gateway, name: str) -> Any:
    """The line of the request that was called so. It is written when the request is over."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for line in gateway.passed():
            if line.id == name:
                return line
        time.sleep(0.05)
    raise AssertionError(f"no line of {name}")


def test_no_request_is_lost_while_each_job_is_replaced_under_load(jobs, asked):
    gateway = jobs.gateway
    with Load(gateway.url, asked) as load:
        load.wait_for_more(30)
        for port in jobs.ports:
            started = time.monotonic()
            assert jobs.stop(port) == 0
            print(f"job at {port} left {time.monotonic() - started:.1f} s after SIGTERM")
            load.wait_for_more(20)
            jobs.start(port).wait_ready()
            first = len(gateway.passed())
            end = time.monotonic() + 2 * FAIL_S + 5
            while not any(line.ports == [port] for line in gateway.passed(since=first)):
                assert time.monotonic() < end, "the new job gets nothing"
                time.sleep(0.1)
            load.wait_for_more(20)
    again = [line for line in gateway.passed() if len(line.ports) > 1]
    print(f"{load.num_plain} plain, {load.num_streamed} streamed, {len(again)} given to the other job")
    print([(line.ports, line.statuses) for line in again])
    assert load.failures == []
    assert min(load.num_plain, load.num_streamed) > 30
    assert again, "no request met a job that was going: nothing was shown"


def test_events_of_a_stream_come_one_by_one(jobs):
    times = []
    started = time.monotonic()
    for line in sse_lines(jobs.gateway.url + PATH, long_body(stream=True)):
        if line.startswith("data: "):
            times.append(time.monotonic() - started)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    num_apart = sum(gap > 1e-4 for gap in gaps)
    print(f"{len(times)} events, the first after {times[0]:.3f} s, the last after {times[-1]:.3f} s; {num_apart} apart")
    assert len(times) > 50
    assert times[0] < times[-1] / 3
    assert num_apart > len(times) / 2
    assert max(gaps) < times[-1] / 3, "many came at once, after a pause"


def came_to_its_end(stream: Iterator[str]) -> bool:
    try:
        return "data: [DONE]" in list(stream)
    except http.client.HTTPException:
        return False


def test_a_job_that_dies_breaks_what_has_begun_and_is_not_asked_again_at_once(jobs):
    gateway, victim = jobs.gateway, jobs.ports[0]
    other = jobs.ports[1]
    time.sleep(FAIL_S)  # what was before is forgotten
    streams = [sse_lines(gateway.url + PATH, long_body(stream=True, max_tokens=1000)) for _ in range(2)]
    for stream in streams:  # one at each job
        next(stream)
    first = len(gateway.passed())
    jobs.kill(victim)
    assert sorted(came_to_its_end(stream) for stream in streams) == [False, True]
    assert sorted(line.ports for line in gateway.passed(since=first)) == sorted([[victim], [other]]), "begun again"
    first += 2
    started, num_asked = time.monotonic(), 0
    while time.monotonic() - started < 2.4 * FAIL_S:
        reply = post_json(gateway.url + PATH, body_of("Hello", max_tokens=2))
        assert reply.status == 200, reply.data
        num_asked += 1
        time.sleep(0.05)
    lines = gateway.passed(since=first)
    tries = [line for line in lines if victim in line.ports]
    print(f"{num_asked} requests in {time.monotonic() - started:.1f} s, {len(tries)} tries at the dead job")
    assert num_asked > 40
    assert 1 <= len(tries) <= 3
    assert all(line.ports in ([victim, other], [other]) for line in lines)
    jobs.start(victim).wait_ready()


def test_too_much_is_told_to_the_client_and_who_waits_as_told_is_served(jobs):
    time.sleep(FAIL_S)
    first = len(jobs.gateway.passed())
    url = jobs.gateway.url + PATH

    def insist(_: int) -> tuple[list[Reply], Reply]:
        refused, end = [], time.monotonic() + 200
        while (reply := post_json(url, long_body(max_tokens=100))).status == 429 and time.monotonic() < end:
            refused.append(reply)
            time.sleep(float(reply.headers["retry-after"]))
        return refused, reply

    with ThreadPoolExecutor(60) as pool:
        ended = list(pool.map(insist, range(60)))
    refused = [reply for some, _ in ended for reply in some]
    print(f"{len(refused)} refusals, at once {sum(bool(some) for some, _ in ended)} of {len(ended)}")
    assert [reply.status for _, reply in ended] == [200] * len(ended)
    assert refused
    for reply in refused:
        assert reply.json["error"]["code"] == "overloaded"
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert all(len(line.ports) == 1 for line in jobs.gateway.passed(since=first)), "a 429 went to the other job, too"


def test_names_go_through_both_ways_and_what_is_of_one_job_is_closed(jobs):
    reply = post_json(jobs.gateway.url + PATH, body_of("Hello", max_tokens=1), headers={"X-Request-ID": "mine.1"})
    assert (reply.status, reply.headers["x-request-id"]) == (200, "mine.1")
    assert in_the_log(jobs.gateway, "mine.1").status == 200
    given = post_json(jobs.gateway.url + PATH, body_of("Hello", max_tokens=1)).headers["x-request-id"]
    assert in_the_log(jobs.gateway, given).status == 200
    large = post_json(jobs.gateway.url + PATH, b'"' + b" " * (64 * 2**20) + b'"', headers={"X-Request-ID": "mine.2"})
    assert (large.status, large.headers["x-request-id"]) == (413, "mine.2")
    assert large.json["error"]["code"] == "request_too_large"
    for path, status in (("/metrics", 404), ("/debug/trace", 404), ("/ui/live", 404), ("/ready", 200), ("/ui", 200)):
        assert request(jobs.gateway.url + path).status == status, path


def test_without_any_job_the_answer_says_when_to_ask_again(jobs):
    for port in jobs.ports:
        jobs.kill(port)
    for path in (PATH, "/v1/messages"):
        reply = post_json(jobs.gateway.url + path, body_of("Hello"), headers={"X-Request-ID": "mine.3"})
        assert (reply.status, reply.headers["retry-after"]) == (503, "5")
        assert reply.headers["x-request-id"] == "mine.3"
        assert reply.json["error"]["code"] == "unavailable"
        assert ("type" in reply.json) == (path == "/v1/messages")
