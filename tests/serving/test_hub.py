"""The hub over real sockets, with scripted ranks: requests flow, ranks die, strangers are turned away."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from qwen3vl_disagg.core.errors import (
    DeadlineError,
    InputError,
    OverloadedError,
    TransferError,
    UnavailableError,
)
from qwen3vl_disagg.core.requests import TokenLogprob
from qwen3vl_disagg.disagg.control import connect_hub
from qwen3vl_disagg.disagg.messages import (
    Assign,
    Blob,
    Cancel,
    Decoded,
    EncodeItem,
    ItemFailed,
    ItemLost,
    ItemReceived,
    LinksUp,
    Peers,
    Pull,
    Refused,
    RequestFailed,
    Stop,
    Submit,
    Tokens,
    Welcome,
)
from qwen3vl_disagg.serving import frontend
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.backend import Decoded as AllDecoded
from qwen3vl_disagg.serving.backend import FinishedEvent, TokenEvent
from qwen3vl_disagg.serving.http_server import HttpServer
from qwen3vl_disagg.serving.media_store import MediaStore
from tests.support.fake_backend import tiny_processor
from tests.support.fake_ranks import FINGERPRINT, TOKEN, WAIT_S, FakeRank, System, collect, in_loop


async def submitted_to(language: dict[int, FakeRank], request_id: str) -> tuple[FakeRank, Submit]:
    """The language rank that got the request."""
    waits = {asyncio.create_task(rank.expect(Submit, request_id=request_id)): rank for rank in language.values()}
    done, pending = await asyncio.wait(waits, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    [task] = done
    return waits[task], task.result()


async def encoder_of(encode: dict[int, FakeRank], assign: Assign) -> tuple[FakeRank, EncodeItem]:
    rank = encode[assign.encode_rank]
    item = await rank.expect(EncodeItem, request_id=assign.request_id, item=assign.item, attempt=assign.attempt)
    return rank, item


async def pull(system: System, digest: str, token: str = TOKEN) -> bytes | None:
    connection = await connect_hub(system.address, deadline_s=WAIT_S)
    try:
        await connection.send(Pull(token=token, digest=digest))
        blob = await connection.receive(timeout=WAIT_S)
        assert isinstance(blob, Blob)
        return None if blob.num_bytes < 0 else await connection.receive_bytes(blob.num_bytes, WAIT_S)
    finally:
        await connection.close()


# ---- requests ----


@in_loop
async def test_text_flows_to_a_language_rank_and_tokens_flow_back():
    async with System() as system:
        _, language = await system.join_all()
        handle = system.submit()
        rank, submit = await submitted_to(language, handle.request_id)
        assert submit.token_ids == b"\1\0\0\0\2\0\0\0\3\0\0\0"
        assert submit.timeout_s == 100.0
        logprobs = [TokenLogprob(7, -0.5, [(7, -0.5)]), TokenLogprob(8, -1.0, [])]
        await rank.tell(Tokens(request_id=submit.request_id, index=0, token_ids=[7, 8], logprobs=logprobs))
        await rank.tell(Tokens(request_id=submit.request_id, index=0, token_ids=[7, 8]))  # a repetition
        await rank.answer(submit, 1, 2, 9)  # the first two are repetitions again
        events = await collect(handle)
        assert events[:4] == [AllDecoded(), TokenEvent(7, logprobs[0]), TokenEvent(8, logprobs[1]), TokenEvent(9)]
        assert isinstance(events[4], FinishedEvent)
        assert events[4].timings.language_rank == rank.rank
        assert len(events) == 5


@in_loop
async def test_images_go_through_encode_ranks_which_pull_the_bytes():
    async with System() as system:
        encode, language = await system.join_all()
        images = [b"first image", b"second image"]
        handle = system.submit(*images)
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.need_all(submit)
        used = set()
        for n in range(2):
            assign = await rank.expect(Assign, item=n)
            encoder, item = await encoder_of(encode, assign)
            used.add(encoder.rank)
            assert item.language_rank == rank.rank
            assert await pull(system, item.visual.digest) == images[n]
            await encoder.tell(Decoded(request_id=submit.request_id, item=n, attempt=1))
            await rank.tell(ItemReceived(request_id=submit.request_id, item=n, attempt=1))
        assert used == {0, 1}
        iterator = aiter(handle)
        async with asyncio.timeout(WAIT_S):
            assert await anext(iterator) == AllDecoded()
        await rank.answer(submit, 4)
        async with asyncio.timeout(WAIT_S):
            assert await anext(iterator) == TokenEvent(4)
            assert isinstance(await anext(iterator), FinishedEvent)
        assert await pull(system, hashlib.sha256(images[0]).hexdigest()) is None  # let go with the request


@in_loop
async def test_an_answer_does_not_begin_before_every_image_is_decoded():
    async with System() as system:
        encode, language = await system.join_all()
        handle = system.submit(b"a", b"b")
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.need_all(submit)
        first = await rank.expect(Assign, item=0)
        encoder, _ = await encoder_of(encode, first)
        await encoder.tell(Decoded(request_id=submit.request_id, item=0, attempt=1))
        second = await rank.expect(Assign, item=1)
        encoder, _ = await encoder_of(encode, second)
        await encoder.tell(
            ItemFailed(request_id=submit.request_id, item=1, attempt=1, kind="input", message="not an image")
        )
        [error] = await collect(handle)
        assert isinstance(error, InputError)
        assert (error.status, error.param) == (400, "messages[0].content[1]")
        await rank.expect(Cancel)


@in_loop
async def test_tokens_that_overtake_the_news_of_decoding_imply_it():
    async with System() as system:
        encode, language = await system.join_all()
        handle = system.submit(b"a")
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.need_all(submit)
        encoder, _ = await encoder_of(encode, await rank.expect(Assign))
        await rank.tell(ItemReceived(request_id=submit.request_id, item=0, attempt=1))
        await rank.answer(submit, 4)
        events = await collect(handle)
        assert events[:2] == [AllDecoded(), TokenEvent(4)]
        await encoder.tell(Decoded(request_id=submit.request_id, item=0, attempt=1))
        assert len(events) == 3


@in_loop
async def test_cancel_reaches_both_ranks_and_frees_the_bytes():
    media = MediaStore()
    async with System(media=media) as system:
        encode, language = await system.join_all()
        handle = system.submit(b"a")
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.need_all(submit)
        encoder, _ = await encoder_of(encode, await rank.expect(Assign))
        assert media.num_bytes == 1
        handle.cancel()
        handle.cancel()
        assert media.num_bytes == 0
        await rank.expect(Cancel, request_id=handle.request_id)
        await encoder.expect(Cancel, request_id=handle.request_id)
        await rank.answer(submit, 1, 2)  # too late: nobody is there to hear it
        following = system.submit()
        rank, submit = await submitted_to(language, following.request_id)
        await rank.answer(submit, 3)
        assert TokenEvent(3) in await collect(following)


@in_loop
async def test_errors_of_ranks_and_of_time_are_typed():
    async with System(2, 1) as system:
        _, language = await system.join_all()
        handle = system.submit()
        rank, submit = await submitted_to(language, handle.request_id)
        failed = RequestFailed(request_id=submit.request_id, code="context_length_exceeded", message="long", status=400)
        await rank.tell(failed)
        [_, error] = await collect(handle)
        assert isinstance(error, InputError)
        assert error.code == "context_length_exceeded"
        late = system.submit(timeout_s=0.1)
        [_, error] = await collect(late)
        assert isinstance(error, DeadlineError)
        await rank.expect(Cancel, request_id=late.request_id)


@in_loop
async def test_overload_is_refused_at_once_and_leaves_nothing_behind():
    media = MediaStore(max_bytes=5)
    async with System(2, 1, media=media) as system:
        with pytest.raises(UnavailableError):  # no rank yet
            system.submit(b"abc")
        assert media.num_bytes == 0
        await system.join_all()
        held = system.submit(b"abc")
        with pytest.raises(OverloadedError):
            system.submit(b"defg")
        handles = [system.submit(b"abc") for _ in range(63)]  # the same bytes are kept once
        assert media.num_bytes == 3
        with pytest.raises(OverloadedError):
            system.submit()
        for handle in (held, *handles):
            handle.cancel()
        assert (media.num_bytes, len(media)) == (0, 0)


# ---- ranks come and go ----


@in_loop
async def test_items_of_a_killed_encode_rank_wait_for_the_next_one():
    async with System(2, 1) as system:
        encode, language = await system.join_all()
        handle = system.submit(b"a")
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.need_all(submit)
        await encoder_of(encode, await rank.expect(Assign))
        encode[0].die()
        await system.until(lambda: system.hub.readiness().degraded)
        assert system.hub.readiness().ready
        assert system.hub.readiness().reasons[0] == "encode rank 0 is missing"
        reborn = await system.join("encode", 0)
        assign = await rank.expect(Assign)
        assert assign.attempt == 2
        await reborn.expect(EncodeItem, attempt=2)
        await encode[0].lost()
        await rank.tell(ItemLost(request_id=submit.request_id, item=0, attempt=1, reason="late news"))
        await rank.tell(ItemReceived(request_id=submit.request_id, item=0, attempt=2))
        await rank.answer(submit, 5)
        assert TokenEvent(5) in await collect(handle)
        assert not [message for message in rank.inbox if isinstance(message, Assign)]


@in_loop
async def test_a_killed_language_rank_fails_its_requests_only():
    async with System(3, 1) as system:
        _, language = await system.join_all()
        handles = [system.submit() for _ in range(2)]
        homes = [await submitted_to(language, handle.request_id) for handle in handles]
        assert homes[0][0] is not homes[1][0]
        homes[0][0].die()
        [_, error] = await collect(handles[0])
        assert isinstance(error, UnavailableError)
        assert not system.hub.readiness().ready
        await homes[1][0].answer(homes[1][1], 6)
        assert TokenEvent(6) in await collect(handles[1])


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
        ({"token": "another"}, "token"),
        ({"token": ""}, "token"),
        ({"fingerprint": {**FINGERPRINT, "dtype": "bfloat16"}}, "dtype"),
        ({"fingerprint": {"dtype": "float32"}}, "hidden_size"),
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
    monkeypatch.setattr("qwen3vl_disagg.serving.hub.HELLO_S", 0.2)
    async with System(2, 1) as system:
        language = await system.join("language", 1)
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0\0\0\3abc", b""):
            reader, writer = await asyncio.open_connection(*system.address)
            writer.write(data)
            async with asyncio.timeout(WAIT_S):
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.readexactly(1)
            writer.close()
        with pytest.raises(TransferError):
            await pull(system, "0" * 64, token="another")
        assert await pull(system, "0" * 64) is None
        assert not language.is_lost


# ---- the way down ----


async def http_get(address: tuple[str, int], path: str) -> tuple[int, dict]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    async with asyncio.timeout(WAIT_S):
        head, body = (await reader.read()).split(b"\r\n\r\n", 1)
    writer.close()
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize("is_finished", [True, False])
@in_loop
async def test_the_frontend_drains_on_sigterm(is_finished, monkeypatch, capsys):
    monkeypatch.setattr(frontend, "DRAIN_S", 20.0 if is_finished else 0.5)
    system = System(2, 1)
    http_socket = socket.create_server(("127.0.0.1", 0))
    http_socket.setblocking(False)
    address = http_socket.getsockname()[:2]
    http = HttpServer(create_app(system.hub, tiny_processor(), model_name="tiny"))
    announced = memoryview(bytearray(1))
    running = asyncio.create_task(frontend.serve(system.hub, http, http_socket, system.socket, announced))
    encode, language = await system.join_all()
    await system.until(lambda: announced[0] == 1)
    assert capsys.readouterr().out == f"ready: http://{address[0]}:{address[1]}\n"
    assert (await http_get(address, "/ready"))[0] == 200

    handle = system.submit()
    rank, submit = await submitted_to(language, handle.request_id)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    await system.until(lambda: not system.hub.readiness().ready)
    status, body = await http_get(address, "/ready")
    assert (status, body["reasons"]) == (503, ["the server is shutting down"])
    with pytest.raises(UnavailableError):
        system.submit()
    assert not [message for message in rank.inbox if isinstance(message, Stop)]
    if is_finished:
        await rank.answer(submit, 8)
        assert TokenEvent(8) in await collect(handle)
    else:
        assert isinstance((await collect(handle))[-1], UnavailableError)
    for left in (encode[0], language[1]):
        await left.expect(Stop)
        left.die()
    async with asyncio.timeout(WAIT_S):
        assert await running == 0
    assert capsys.readouterr().out == ""


@in_loop
async def test_the_ready_line_is_not_said_again_by_the_next_frontend(capsys):
    system = System(2, 1)
    http_socket = socket.create_server(("127.0.0.1", 0))
    http_socket.setblocking(False)
    http = HttpServer(create_app(system.hub, tiny_processor(), model_name="tiny"))
    running = asyncio.create_task(frontend.serve(system.hub, http, http_socket, system.socket, memoryview(b"\1")))
    encode, language = await system.join_all()
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    for left in (encode[0], language[1]):
        await left.expect(Stop)
        left.die()
    async with asyncio.timeout(WAIT_S):
        assert await running == 0
    assert capsys.readouterr().out == ""
