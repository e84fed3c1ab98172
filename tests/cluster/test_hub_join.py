"""Encode ranks that join a job from outside: numbers, what is refused, coming back, leaving. Real sockets, scripted."""

from __future__ import annotations

import asyncio
import os

import pytest

from qwen3vl_disagg.cluster.backend import TokenEvent
from qwen3vl_disagg.cluster.job_memory import JobMemory
from qwen3vl_disagg.cluster.rendezvous import host_id
from qwen3vl_disagg.protocol.messages import (
    Assign,
    ItemReceived,
    Leaving,
    LinksUp,
    Message,
    Refused,
    Stop,
    Welcome,
)
from tests.support.fake_ranks import FINGERPRINT, FakeRank, System, collect, in_loop, submitted_to

OTHER_DTYPE = {**FINGERPRINT, "dtype": "bfloat16"}


async def join(system: System, **changes) -> tuple[FakeRank, Welcome]:
    """An encode rank from outside, linked to all language ranks."""
    rank = await system.connect("encode", None, **changes)
    welcome = await rank.expect(Welcome)
    rank.rank = welcome.rank
    await rank.tell(LinksUp(language_ranks=list(system.layout.language_ranks)))
    return rank, welcome


async def answer_of(system: System, **changes) -> Message:
    """What the hub answers to such a hello."""
    rank = await system.connect("encode", changes.pop("rank", None), **changes)
    await system.until(lambda: bool(rank.inbox) or rank.is_lost)
    return rank.inbox[0]


def numbers(system: System) -> list[int]:
    return [entry["rank"] for entry in system.hub.debug_processes() if entry["role"] == "encode"]


@in_loop
async def test_numbers_start_behind_the_world_and_are_never_given_twice():
    async with System(3, 1) as system:
        await system.join_all()
        first, welcome = await join(system)
        assert welcome.rank == 3
        second, welcome = await join(system)
        assert welcome.rank == 4
        await system.until(lambda: numbers(system) == [0, 3, 4])
        assert {entry["address"] for entry in system.hub.debug_processes()[1:]} == {"127.0.0.1"}
        for rank in (first, second):
            rank.die()
        await system.until(lambda: numbers(system) == [0])
        assert not system.hub.readiness().degraded  # one that joined is never missing
        _, welcome = await join(system)
        assert welcome.rank == 5


@in_loop
async def test_a_server_whose_own_encode_ranks_are_dead_serves_with_one_that_joined():
    async with System(3, 1) as system:
        encode, language = await system.join_all()
        encode[0].die()
        await system.until(lambda: numbers(system) == [])
        _, welcome = await join(system)
        await system.until(lambda: system.hub.readiness().reasons == ["encode rank 0 is missing"])
        assert system.hub.readiness().ready
        handle = system.submit(b"a")
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.need_all(submit)
        assert (await rank.expect(Assign)).encode_rank == welcome.rank
        await rank.tell(ItemReceived(request_id=submit.request_id, item=0, attempt=1))
        await rank.answer(submit, 5)
        assert TokenEvent(5) in await collect(handle)


@pytest.mark.parametrize(
    ("changes", "field", "expected", "got"),
    [
        ({"token": "another"}, "token", "the job's token", "another"),
        ({"fingerprint": OTHER_DTYPE}, "dtype", "float32", "bfloat16"),
        ({"fingerprint": {"dtype": "float32"}}, "hidden_size", "128", "absent"),
        ({"rank": 4}, "rank", "encode ranks 0 to 1", "4"),  # nobody gave it that
        ({"rank": 4, "job": "another"}, "job", "a rank of this job", "one of another"),
        ({"rank": 1, "job": "another"}, "job", "a rank of this job", "one of another"),  # also where the number fits
        ({"role": "language"}, "rank", "language ranks 2 to 3", "None"),
    ],
)
@in_loop
async def test_what_does_not_fit_is_refused_by_name(changes, field, expected, got):
    async with System(4, 2) as system:
        await system.join("language", 2)
        changes = dict(changes)
        rank = await system.connect(changes.pop("role", "encode"), changes.pop("rank", None), **changes)
        assert await rank.expect(Refused) == Refused(field=field, expected=expected, got=got)
        await rank.lost()
        assert numbers(system) == []
        _, welcome = await join(system)
        assert welcome.rank == 4  # a refusal costs no number


@in_loop
async def test_one_that_comes_first_waits_and_is_never_the_measure():
    async with System(3, 1) as system:
        good, bad = await system.connect("encode", None), await system.connect("encode", None, fingerprint=OTHER_DTYPE)
        await asyncio.sleep(0.1)
        assert not good.inbox
        assert not bad.inbox
        await system.join("language", 1)
        assert (await good.expect(Welcome)).rank == 3
        assert (await bad.expect(Refused)).field == "dtype"
        await system.join("language", 2)


@in_loop
async def test_one_that_waits_is_sent_home_when_the_job_goes_down():
    async with System(3, 1) as system:
        early = await system.connect("encode", None)
        await asyncio.sleep(0.1)
        await system.hub.close(0.05)
        await early.expect(Stop)
        await early.lost()


@in_loop
async def test_the_next_frontend_knows_the_numbers_and_takes_them_back():
    memory = JobMemory()
    async with System(3, 1, memory=memory) as first:
        await first.join("language", 1)
        _, welcome = await join(first)
        assert welcome.rank == 3
        _, other = await join(first)
        assert other.rank == 4
    async with System(3, 1, memory=memory) as second:
        coming_back = await second.connect("encode", 3, job=welcome.job)
        await asyncio.sleep(0.1)
        assert not coming_back.inbox  # what it must fit is not known yet
        await second.join("language", 1)
        assert await coming_back.expect(Welcome) == welcome
        assert (await join(second))[1].rank == 5
        refused = await answer_of(second, rank=6, job=welcome.job)
        assert isinstance(refused, Refused)
        assert refused.field == "rank"
    async with System(3, 1) as another_job:
        await another_job.join("language", 1)
        await join(another_job)  # has number 3 here
        refused = await answer_of(another_job, rank=3, job=welcome.job)
        assert isinstance(refused, Refused)
        assert refused.field == "job"
        assert numbers(another_job) == [3]


@in_loop
async def test_leaving_is_answered_when_the_last_item_has_arrived():
    async with System(2, 1) as system:
        encode, language = await system.join_all()
        joined, _ = await join(system)
        encode[0].die()
        await system.until(lambda: numbers(system) == [2])
        handle = system.submit(b"a")
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.need_all(submit)
        assert (await rank.expect(Assign)).encode_rank == 2
        await joined.tell(Leaving())
        await system.join("encode", 0)
        later = system.submit(b"b")
        _, second = await submitted_to(language, later.request_id)
        await rank.need_all(second)
        assert (await rank.expect(Assign, request_id=later.request_id)).encode_rank == 0
        assert not [message for message in joined.inbox if isinstance(message, Stop)]
        await rank.tell(ItemReceived(request_id=submit.request_id, item=0, attempt=1))
        await joined.expect(Stop)
        joined.die()
        for each, request in ((handle, submit), (later, second)):
            await rank.answer(request, 5)
            assert TokenEvent(5) in await collect(each)


@in_loop
async def test_of_a_process_on_another_host_nothing_is_looked_up_here():
    async with System(2, 1) as system:
        alive = os.getppid()
        here = await system.join("language", 1, pid=alive, host=host_id())
        assert (await (await system.connect("language", 1)).expect(Refused)).field == "rank"
        here.die()
        await system.until(lambda: len(system.hub.debug_processes()) == 1)
        far = await system.join("language", 1, pid=alive, host="another boot pid:[1]")
        successor = await system.connect("language", 1, host="another boot pid:[1]")
        await successor.expect(Welcome)
        await far.lost()
        await system.until(lambda: system.hub.debug_processes()[1]["pid"] == os.getpid())
