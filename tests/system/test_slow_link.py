"""A job over two hosts that are far apart: 50 ms each way, 1 % loss, 20 Mbit/s, control connections encrypted."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.asking import Asking
from tests.support.certificates import Authority
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Job, Server
from tests.support.slow_link import Line, SlowHosts

TOKEN = {"Q3VL_TOKEN": "what ranks of this job show one another"}
HUB_PORT, CUT_S = 7007, 30.0
TYPED = {503, 504}
LONGEST_S = 60.0
"""Of a request over the cut: it waits for the link and is answered, or ends with an error."""


@contextmanager
def far_apart(folder) -> Iterator[tuple[SlowHosts, Server, Job]]:
    """The frontend and language ranks 1 and 2 on one host, encode ranks 3 and 4 on the other, started before there is
    a link. Encode rank 0, without which there is no job, stands still: every row has to cross the link."""
    authority = Authority(folder)
    with SlowHosts(Line()) as hosts:
        hub = f"{hosts.address['a']}:{HUB_PORT}"
        near_args = ["--encode-ranks", "1", "--prefix-cache", "off", "--hub", hub, *authority.sign("near").args]
        server = Server(3, *near_args, prefix=hosts.prefix("a"), host=hosts.front, env=TOKEN)
        far_args = ["--join", hub, *authority.sign("far").args]
        hosts.set_link("down")
        with server, Job("encode.py", 2, *far_args, prefix=hosts.prefix("b"), env=TOKEN) as job:
            job.wait_for("no way to .*; trying again for 120 s")
            hosts.set_link("up")
            for rank in (3, 4):
                job.wait_for(f"encode rank {rank}: joined")
            stopped = ranks(server)["encode", 0]
            os.kill(stopped, signal.SIGSTOP)
            try:
                wait_until(lambda: ("encode", 0) not in ranks(server), 30.0)
                yield hosts, server, job
            finally:
                os.kill(stopped, signal.SIGKILL)


def ranks(server: Server) -> dict[tuple[str, int | None], int]:
    """Role and number -> pid, of those that the hub has."""
    return {(entry["role"], entry.get("rank")): entry["pid"] for entry in server.processes()}


def wait_until(holds: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def check(asking: Asking, expected: list[Any]) -> dict[int | str, int]:
    """Every answer is right, or ended typed; how many of which status."""
    counts: dict[int | str, int] = {}
    for question, _, status, body, _ in asking.answers:
        counts[status] = counts.get(status, 0) + 1
        if status == 200:
            assert body["choices"][0]["token_ids"] == expected[question].token_ids
        else:
            assert status in TYPED, (status, body)
            assert body["error"]["code"], body
    return counts


def first_token_s(answer: tuple[int, float, int | str, Any, float]) -> float:
    return answer[4] - answer[3]["timings"]["decode"] / 1e3


def say_first_tokens(title: str, answers: list[Any]) -> None:
    times = sorted(map(first_token_s, answers))
    percentiles = [times[int(len(times) * share)] for share in (0.5, 0.95, 0.99)]
    mean = statistics.mean(times)
    print(f"{title}: {len(times)} answers, first token mean {mean:.2f} s, p50 / p95 / p99 {percentiles}")


@pytest.mark.acceptance
@pytest.mark.timeout(400)
def test_answers_are_right_over_a_slow_link_and_it_may_be_cut_for_30_seconds(tmp_path):
    asked: list[Asked] = ask_scenes(tmp_path / "scenes", seed=717, count=60)
    expected = LLM().chat([entry.messages() for entry in asked], SamplingParams(max_new_tokens=64))
    with far_apart(tmp_path / "tls") as (hosts, server, job):
        before = ranks(server)
        with Asking(server, asked, at_once=4) as asking:
            wait_until(lambda: len(asking.answers) >= 60, 120.0)
        assert set(check(asking, expected)) == {200}
        say_first_tokens("link up", asking.answers)
        used = {rank for *_, body, _ in asking.answers for rank in body["timings"]["encode_ranks"]}
        assert used == {3, 4}

        with Asking(server, asked, at_once=4, timeout_s=LONGEST_S) as asking:
            time.sleep(3.0)
            hosts.cut(CUT_S)
            healed = time.monotonic()
            wait_until(lambda: len(asking.since(healed)) >= 40, 60.0)
        counts = check(asking, expected)
        after = [answer for answer in asking.answers if answer[1] > healed and answer[2] == 200]
        print(f"link cut for {CUT_S:g} s: {counts}; first right answer {after_s(after, healed):.1f} s after it")
        print(f"longest request {max(answer[4] for answer in asking.answers):.1f} s")
        say_first_tokens("asked after the cut", after)
        assert {rank for *_, body, _ in after for rank in body["timings"]["encode_ranks"]} == {3, 4}
        assert ranks(server) == before
        for output in (server.output(), job.output()):
            assert "starting it again" not in output, output


def after_s(answers: list[Any], moment: float) -> float:
    return min(started + seconds for _, started, _, _, seconds in answers) - moment
