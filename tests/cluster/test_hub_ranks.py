"""Ranks come and go at the hub, and strangers are turned away: real sockets, scripted ranks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest
from msgspec import structs

from qwen3vl_disagg.cluster.backend import TokenEvent
from qwen3vl_disagg.core.errors import (
    HandshakeError,
    UnavailableError,
)
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Cancel,
    EncodeLoad,
    ItemLost,
    ItemReceived,
    LanguageLoad,
    LinksUp,
    Peers,
    Refused,
    Stop,
    Tokens,
    Welcome,
)
from tests.support.fake_ranks import (
    FINGERPRINT,
    TOKEN,
    WAIT_S,
    System,
    collect,
    in_loop,
    pull,
    submitted_to,
)


@in_loop
async def test_items_of_a_killed_encode_rank_wait_for_the_next_one():
    async with System(2, 1) as system:
        encode, language = await system.join_all()
        handle = system.submit(b"a")
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.need_all(submit)
        await rank.expect(Assign)
        encode[0].die()
        await system.until(lambda: system.hub.readiness().degraded)
        assert system.hub.readiness().ready
        assert system.hub.readiness().reasons[0] == "encode rank 0 is missing"
        await system.join("encode", 0)
        assign = await rank.expect(Assign)
        assert (assign.attempt, assign.encode_rank) == (2, 0)
        await encode[0].lost()
        await rank.tell(ItemLost(request_id=submit.request_id, item=0, attempt=1, reason="late news"))
        await rank.tell(ItemReceived(request_id=submit.request_id, item=0, attempt=2))
        await rank.answer(submit, 5)
        assert TokenEvent(5) in await collect(handle)
        assert not [message for message in rank.inbox if isinstance(message, Assign)]


@in_loop
async def test_a_killed_language_rank_ends_every_request_because_its_experts_are_gone():
    async with System(3, 1) as system:
        _, language = await system.join_all()
        handles = [system.submit() for _ in range(2)]
        homes = [await submitted_to(language, handle.request_id) for handle in handles]
        assert homes[0][0] is not homes[1][0]
        homes[0][0].die()
        for handle in handles:
            [_, error] = await collect(handle)
            assert isinstance(error, UnavailableError)
        await homes[1][0].expect(Cancel, request_id=handles[1].request_id)
        lost = homes[0][0].rank
        assert system.hub.readiness().reasons == [f"language rank {lost} is missing"]
        with pytest.raises(UnavailableError, match=f"language rank {lost} is missing"):
            system.submit()
        language[lost] = await system.join("language", lost)
        again = system.submit()
        rank, submit = await submitted_to(language, again.request_id)
        await rank.answer(submit, 6)
        assert TokenEvent(6) in await collect(again)


@in_loop
async def test_a_request_from_before_this_hub_is_cancelled_on_its_rank():
    async with System(2, 1) as system:
        _, language = await system.join_all()
        await language[1].tell(Tokens(request_id="from an earlier life", index=5, token_ids=[1]))
        await language[1].expect(Cancel, request_id="from an earlier life")


@in_loop
async def test_all_ranks_learn_where_to_meet():
    async with System(4, 2) as system:
        encode = await system.join("encode", 0)
        second = await system.join("language", 3, link_address=("127.0.0.1", 33))
        assert not encode.inbox
        await system.join("language", 2, link_address=("127.0.0.1", 22), store_address=("127.0.0.1", 99))
        both = [(2, "127.0.0.1", 22), (3, "127.0.0.1", 33)]
        for rank in (encode, second, await system.join("encode", 1)):
            peers = await rank.expect(Peers, language_ranks=both)
            assert peers.store_address == ("127.0.0.1", 99)


@in_loop
async def test_a_rank_that_comes_while_the_others_leave_is_sent_home_too():
    async with System(2, 1) as system:
        language = await system.join("language", 1)
        closing = asyncio.create_task(system.hub.close(WAIT_S))
        await language.expect(Stop)
        language.die()
        await language.lost()
        assert not closing.done()
        late = await system.join("encode", 0)
        await late.expect(Stop)
        late.die()
        await closing


@in_loop
async def test_the_end_does_not_wait_long_for_a_language_rank_that_died(monkeypatch):
    """Its slot does not fork it again. One that only lost its connection may still come back to be told."""
    monkeypatch.setattr("qwen3vl_disagg.cluster.hub.LOST_S", 0.4)
    for comes_back in (False, True):
        async with System(2, 1) as system:
            encode, language = await system.join_all()
            language[1].die()
            await system.until(lambda: not system.hub.readiness().ready)
            started = time.monotonic()
            closing = asyncio.create_task(system.hub.close(WAIT_S))
            await encode[0].expect(Stop)
            encode[0].die()
            if comes_back:
                late = await system.join("language", 1)
                await late.expect(Stop)
                late.die()
            await closing
            assert (0 if comes_back else 0.4) <= time.monotonic() - started < WAIT_S / 2


@in_loop
async def test_readiness_names_what_is_missing():
    async with System(4, 2) as system:

        def state():
            return system.hub.readiness()

        assert state().reasons == ["language rank 2 is missing", "language rank 3 is missing"]
        await system.join("language", 2)
        await system.join("language", 3)
        await system.until(lambda: state().reasons[0] == "encode rank 0 is missing")
        assert not state().ready
        encode = await system.connect("encode", 0)
        await encode.tell(LinksUp(language_ranks=[2]))
        await system.until(lambda: len(state().reasons) == 2)
        assert not state().ready  # language rank 3 has no link
        await encode.tell(LinksUp(language_ranks=[2, 3]))
        await system.until(lambda: state().ready)
        assert (state().degraded, state().reasons) == (True, ["encode rank 1 is missing"])
        await system.join("encode", 1)
        await system.until(lambda: not state().degraded)
        processes = {(entry["role"], entry.get("rank")): entry["pid"] for entry in system.hub.debug_processes()}
        assert processes == dict.fromkeys(
            [("frontend", None), ("encode", 0), ("encode", 1), ("language", 2), ("language", 3)], os.getpid()
        )


# ---- strangers ----


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"token": TOKEN[:-1] + "m"}, "token"),
        ({"token": ""}, "token"),
        ({"fingerprint": {**FINGERPRINT, "dtype": "bfloat16"}}, "dtype"),
        ({"fingerprint": {"dtype": "float32"}}, "hidden_size"),
        ({"fingerprint": {**FINGERPRINT, "sampling": "temperature"}}, "sampling"),
        ({"rank": 3}, "rank"),
    ],
)
@in_loop
async def test_a_rank_that_does_not_fit_is_told_why(changes, field):
    async with System(4, 2) as system:
        language = await system.join("language", 2)
        changes = dict(changes)
        stranger = await system.connect("encode", changes.pop("rank", 1), **changes)
        refused = await stranger.expect(Refused)
        assert refused.field == field
        assert TOKEN not in (refused.expected, refused.got)
        await stranger.lost()
        assert [entry["role"] for entry in system.hub.debug_processes()] == ["frontend", "language"]
        assert not language.is_lost


@in_loop
async def test_a_second_rank_of_one_number_is_refused_while_the_first_lives():
    async with System(2, 1) as system:
        first = await system.join("language", 1, pid=os.getppid())
        second = await system.connect("language", 1)
        assert (await second.expect(Refused)).field == "rank"
        assert not first.is_lost


@in_loop
async def test_a_dead_rank_s_successor_is_taken_before_its_end_was_noticed():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(WAIT_S)
    async with System(2, 1) as system:
        first = await system.join("language", 1, pid=ended.pid)
        second = await system.connect("language", 1)
        await second.expect(Welcome)
        await first.lost()
        await system.until(lambda: system.hub.debug_processes()[1]["pid"] == os.getpid())


@in_loop
async def test_garbage_and_silence_touch_nobody_else(monkeypatch):
    monkeypatch.setattr("qwen3vl_disagg.transport.doorkeeper.HELLO_S", 0.2)
    async with System(2, 1) as system:
        language = await system.join("language", 1)
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0\0\0\3abc", b""):
            reader, writer = await asyncio.open_connection(*system.address)
            writer.write(data)
            async with asyncio.timeout(WAIT_S):
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.readexactly(1)
            writer.close()
        with pytest.raises(HandshakeError, match="token"):
            await pull(system, "0" * 64, token="another")
        assert await pull(system, "0" * 64) is None
        assert not language.is_lost


@in_loop
async def test_what_ranks_have_to_do_is_heard_and_one_that_stands_still_is_named(monkeypatch):
    monkeypatch.setattr("qwen3vl_disagg.cluster.loads.STUCK_S", 0.1)
    async with System(2, 1) as system:
        encode, language = await system.join_all()
        assert system.hub.rank_loads() == {("encode", 0): EncodeLoad(), ("language", 1): LanguageLoad()}
        assert system.hub.business() == {}
        load = LanguageLoad(running=2, num_steps=7, can_step=True)
        await language[1].tell(load)
        await encode[0].tell(EncodeLoad(waiting=3))
        heard = {("encode", 0): EncodeLoad(waiting=3), ("language", 1): load}
        await system.until(lambda: system.hub.rank_loads() == heard)
        await system.until(lambda: not system.hub.readiness().ready)
        assert system.hub.readiness().reasons[0].startswith("language rank 1 has not stepped for")
        handle = system.submit()  # whoever asks is heard all the same
        assert system.hub.business().items() >= {"requests": 1, "running": 2, "to_encode": 3}.items()
        await language[1].tell(structs.replace(load, num_steps=8, can_step=False))
        await system.until(lambda: system.hub.readiness().ready)
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.answer(submit, 5)
        assert TokenEvent(5) in await collect(handle)
        language[1].die()
        await system.until(lambda: system.hub.rank_loads()["language", 1] is None)
