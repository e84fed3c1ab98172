"""One server over two hosts, which are network namespaces: answers, the way down, and a link that is cut."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.asking import Asking, ask
from tests.support.hosts import TwoHosts
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Job, Server

TOKEN = {"Q3VL_TOKEN": "what ranks of this job show one another"}
SAMPLING = SamplingParams(max_new_tokens=64, logprobs=1)
HUB_PORT, MASTER_PORT = 7007, 7008


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[Asked]:
    return ask_scenes(tmp_path_factory.mktemp("scenes"), seed=99, count=16)


@pytest.fixture(scope="module")
def expected(asked) -> list[Any]:
    return LLM().chat([entry.messages() for entry in asked], SAMPLING)


@contextmanager
def over_two_hosts() -> Iterator[tuple[TwoHosts, Server, Job]]:
    """Encode rank 0 and language rank 1 on the first host, language rank 2 on the other."""
    with TwoHosts() as hosts:
        meet = ["--nnodes=2", f"--master-addr={hosts.address['a']}", f"--master-port={MASTER_PORT}"]
        args = ["--encode-ranks", "1", "--hub", f"{hosts.address['a']}:{HUB_PORT}"]
        options: dict[str, Any] = {"env": TOKEN, "host": hosts.front}
        far = Job("serve.py", 1, *args, prefix=hosts.prefix("b"), torchrun=[*meet, "--node-rank=1"], env=TOKEN)
        near = Server(2, *args, prefix=hosts.prefix("a"), torchrun=[*meet, "--node-rank=0"], **options)
        with far, near:
            far.remember_pids()
            yield hosts, near, far


def check(answer: tuple[int, Any], mine: Any) -> None:
    status, body = answer
    assert status == 200, body
    assert body["choices"][0]["token_ids"] == mine.token_ids
    for entry, own in zip(body["choices"][0]["logprobs"]["content"], mine.logprobs, strict=True):
        assert abs(entry["logprob"] - own.logprob) < 1e-4


def ask_all(server: Server, asked: list[Asked]) -> list[tuple[int, Any]]:
    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(lambda entry: server.chat(entry.content()), asked))


def end_both(near: Server, far: Job) -> None:
    """As an operator does; nothing may be left of either."""
    for job in (near, far):
        job.remember_pids()
        job.process.send_signal(signal.SIGTERM)
    for job in (near, far):
        job.process.wait(40)
    end = time.monotonic() + 5
    while (near.alive() or far.alive()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not near.alive() | far.alive()


def test_a_server_over_two_hosts_answers_as_one_process(asked, expected):
    with over_two_hosts() as (hosts, near, far):
        answers = ask_all(near, asked)
        for answer, mine in zip(answers, expected, strict=True):
            check(answer, mine)
        assert {body["timings"]["language_rank"] for _, body in answers} == {1, 2}
        where = {entry.get("rank"): entry.get("address") for entry in near.processes()}
        assert where == {None: None, 0: hosts.address["a"], 1: hosts.address["a"], 2: hosts.address["b"]}
        end_both(near, far)
        for output in (near.output(), far.output()):
            for word in ("did not leave", "killed by", ": exit ", TOKEN["Q3VL_TOKEN"]):
                assert word not in output, output


def leave_nothing(*jobs: Job) -> None:
    """All processes of both hosts end by themselves."""
    end = time.monotonic() + 60
    while any(job.alive() or job.process.poll() is None for job in jobs):
        assert time.monotonic() < end, [job.output()[-2000:] for job in jobs]
        time.sleep(0.05)


@pytest.mark.acceptance
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("victim", "number"),
    [("far", signal.SIGTERM), ("near", signal.SIGTERM), ("far", signal.SIGKILL), ("near", signal.SIGKILL)],
)
def test_the_end_of_one_host_is_the_end_of_both(asked, victim, number):
    with over_two_hosts() as (_, near, far), ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(ask, near, entry) for entry in asked * 20]
        while sum(future.done() for future in futures) < 6:
            time.sleep(0.01)
        for job in (near, far):
            job.remember_pids()
        os.kill({"near": near, "far": far}[victim].process.pid, number)
        leave_nothing(near, far)
        statuses = [future.result(10)[0] for future in futures]
        # A connection is refused or broken when the frontend's host itself is killed.
        assert set(statuses) <= {200, 503, "gone"}
        if number == signal.SIGTERM:
            for output in (near.output(), far.output()):
                assert "did not leave" not in output, output


@pytest.mark.acceptance
@pytest.mark.timeout(180)
def test_a_link_cut_for_5_seconds_ends_no_request_without_an_answer(asked, expected):
    with over_two_hosts() as (hosts, near, _):
        with Asking(near, asked) as asking:
            time.sleep(2)
            hosts.cut(5.0)
            healed = time.monotonic()
            time.sleep(12)
        for question, _, status, body, _ in asking.answers:
            if status == 200:
                check((status, body), expected[question])
            else:
                assert status in (503, 504), (status, body)
        # The ranks outlive it: what waits for the other host goes on when the link is back.
        assert len(asking.since(healed)) > 20
        assert {body["timings"]["language_rank"] for body in asking.since(healed)} == {1, 2}


@pytest.mark.acceptance
@pytest.mark.timeout(180)
def test_an_encode_rank_of_another_host_is_cut_off_and_comes_back_under_its_number(asked, expected):
    with TwoHosts() as hosts:
        hub = f"{hosts.address['a']}:{HUB_PORT}"
        # Where no other host is expected, torchrun meets on loopback; the ranks face the hub.
        server = Server(2, "--hub", hub, host=hosts.front, prefix=hosts.prefix("a"), env=TOKEN)
        with server, Job("encode.py", 1, "--join", hub, prefix=hosts.prefix("b"), env=TOKEN) as job:
            job.wait_for("encode rank 2: joined")
            with Asking(server, asked) as asking:
                for seconds in (5.0, 14.0):  # the second is longer than a silence that is a death
                    wait_until(lambda: 2 in used(asking, time.monotonic() - 2))
                    hosts.cut(seconds)
                    healed = time.monotonic()
                    wait_until(lambda: 2 in used(asking, healed))  # noqa: B023 - called in this turn
            for question, _, status, body, _ in asking.answers:
                check((status, body), expected[question])
            assert job.output().count("joined") == 1
            where = {
                entry.get("rank"): entry.get("address") for entry in server.processes() if entry["role"] == "encode"
            }
            assert where == {0: hosts.address["a"], 2: hosts.address["b"]}


def used(asking: Asking, moment: float) -> set[int]:
    return {rank for body in asking.since(moment) for rank in body["timings"]["encode_ranks"]}


def wait_until(holds: Callable[[], bool], limit_s: float = 40.0) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)
