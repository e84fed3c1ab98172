"""The hub over real sockets, with scripted ranks: how requests flow, and the way down."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import signal
import socket
from itertools import pairwise

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, FinishedEvent, TokenEvent
from qwen3vl_disagg.cluster.job_memory import JobMemory
from qwen3vl_disagg.cluster.media_store import MediaStore
from qwen3vl_disagg.core.due import FIRST_COME, Prices, allowance
from qwen3vl_disagg.core.errors import (
    DeadlineError,
    Failure,
    InputError,
    OverloadedError,
    UnavailableError,
)
from qwen3vl_disagg.core.progress import Progress
from qwen3vl_disagg.core.requests import TokenLogprob
from qwen3vl_disagg.launch import frontend
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Cancel,
    Decoded,
    ItemFailed,
    ItemReceived,
    RequestFailed,
    Stop,
    Tokens,
)
from qwen3vl_disagg.protocol.routing import RouterLimits
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.http_server import HttpServer
from tests.support.fake_backend import timings, tiny_processor
from tests.support.fake_ranks import (
    WAIT_S,
    System,
    collect,
    in_loop,
    pull,
    submitted_to,
)


@in_loop
async def test_a_language_rank_hears_when_the_first_token_is_due():
    async with System() as system:
        _, language = await system.join_all()
        [handle] = system.submit_all(target_s=2.0)
        _, submit = await submitted_to(language, handle.request_id)
        assert submit.due_s == allowance(2.0, Prices().of(0, 3), 100.0)


@in_loop
async def test_text_flows_to_a_language_rank_and_tokens_flow_back():
    async with System() as system:
        _, language = await system.join_all()
        handle = system.submit()
        rank, submit = await submitted_to(language, handle.request_id)
        assert submit.token_ids == b"\1\0\0\0\2\0\0\0\3\0\0\0"
        assert (submit.timeout_s, submit.due_s) == (100.0, FIRST_COME)
        logprobs = [TokenLogprob(7, -0.5, [(7, -0.5)]), TokenLogprob(8, -1.0, [])]
        await rank.tell(
            Tokens(request_id=submit.request_id, index=0, token_ids=[7, 8], logprobs=logprobs, timings=timings())
        )
        await rank.tell(Tokens(request_id=submit.request_id, index=0, token_ids=[7, 8]))  # a repetition
        await rank.answer(submit, 1, 2, 9)  # the first two are repetitions again
        events = await collect(handle)
        assert events[:4] == [
            AllDecoded(),
            TokenEvent(7, logprobs[0], timings()),
            TokenEvent(8, logprobs[1]),
            TokenEvent(9),
        ]
        assert isinstance(events[4], FinishedEvent)
        assert events[4].timings.language_rank == rank.rank
        assert len(events) == 5


@in_loop
async def test_answers_to_one_prompt_are_one_request_of_one_rank():
    media = MediaStore()
    async with System(media=media) as system:
        _, language = await system.join_all()
        first, second, third = system.submit_all(b"a", n=3)
        rank, submit = await submitted_to(language, first.request_id)
        assert submit.sampling.n == 3
        third.cancel()
        assert (await rank.expect(Cancel)).sample == 2
        await rank.answer(submit, 7, 8, sample=1)
        assert (await collect(second))[:3] == [AllDecoded(), TokenEvent(7), TokenEvent(8)]
        assert media.num_bytes == 1
        await rank.answer(submit, 9)
        assert (await collect(first))[:2] == [AllDecoded(), TokenEvent(9)]
        assert media.num_bytes == 0
        handles = system.submit_all(n=2)
        rank, submit = await submitted_to(language, handles[0].request_id)
        rank.die()
        for handle in handles:
            *_, error = await collect(handle)
            assert isinstance(error, UnavailableError)


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
            encoder = encode[assign.encode_rank]
            used.add(encoder.rank)
            assert await pull(system, submit.items[n].digest) == images[n]
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
        encoder = encode[first.encode_rank]
        await encoder.tell(Decoded(request_id=submit.request_id, item=0, attempt=1))
        second = await rank.expect(Assign, item=1)
        encoder = encode[second.encode_rank]
        await encoder.tell(
            ItemFailed(request_id=submit.request_id, item=1, attempt=1, failure=Failure.of(InputError("not an image")))
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
        encoder = encode[(await rank.expect(Assign)).encode_rank]
        await rank.tell(ItemReceived(request_id=submit.request_id, item=0, attempt=1))
        await rank.answer(submit, 4)
        events = await collect(handle)
        assert events[:2] == [AllDecoded(), TokenEvent(4)]
        await encoder.tell(Decoded(request_id=submit.request_id, item=0, attempt=1))
        assert len(events) == 3


@in_loop
async def test_cancel_reaches_the_language_rank_and_frees_the_bytes():
    media = MediaStore()
    async with System(media=media) as system:
        _, language = await system.join_all()
        handle = system.submit(b"a")
        rank, submit = await submitted_to(language, handle.request_id)
        await rank.need_all(submit)
        assert media.num_bytes == 1
        handle.cancel()
        handle.cancel()
        assert media.num_bytes == 0
        await rank.expect(Cancel, request_id=handle.request_id)
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
        failure = Failure.of(InputError("long", code="context_length_exceeded"))
        failed = RequestFailed(request_id=submit.request_id, failure=failure)
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
    async with System(2, 1, media=media, limits=RouterLimits(max_waiting=64)) as system:
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
    monkeypatch.setattr(frontend, "DRAINED_S", 20.0 if is_finished else 0.5)
    system = System(2, 1)
    http_socket = socket.create_server(("127.0.0.1", 0))
    http_socket.setblocking(False)
    address = http_socket.getsockname()[:2]
    http = HttpServer(create_app(system.hub, tiny_processor(), model_name="tiny"))
    memory = JobMemory()
    running = asyncio.create_task(frontend.serve(system.hub, http, http_socket, system.socket, memory))
    encode, language = await system.join_all()
    await system.until(lambda: memory.is_announced)
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
        assert "shutting down" in str((await collect(handle))[-1])
    for left in (encode[0], language[1]):
        await left.expect(Stop)
        left.die()
    async with asyncio.timeout(WAIT_S):
        assert await running == 0
    assert capsys.readouterr().out == ""


@in_loop
async def test_what_is_waited_for_is_said_ever_less_often(monkeypatch, caplog):
    monkeypatch.setattr(frontend, "WAITING_S", 0.1)
    monkeypatch.setattr(frontend, "LEFT_S", 1.0)  # nobody is there to be waited for
    caplog.set_level("INFO", "qwen3vl_disagg")
    system = System(8, 1)
    http_socket = socket.create_server(("127.0.0.1", 0))
    http_socket.setblocking(False)
    http = HttpServer(create_app(system.hub, tiny_processor(), model_name="tiny"))
    arguments = (system.hub, http, http_socket, system.socket, JobMemory())
    running = asyncio.create_task(frontend.serve(*arguments, Progress()))

    def said() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "waiting" in record.getMessage()]

    await system.until(lambda: len(said()) == 4)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(WAIT_S):
        assert await running == 0
    seconds = [record.q3vl_fields["seconds"] for record in said()]
    for number, (early, late) in enumerate(pairwise(seconds)):
        assert late - early >= 0.1 * 2**number - 0.002  # and later where the loop stood still
    lines = [record.getMessage() for record in said()]
    missing = [f"language rank {rank} is missing" for rank in range(1, 8)]
    assert lines[0].split("waiting: ")[1] == "; ".join([*missing[:4], "and 3 more"])


@in_loop
async def test_the_ready_line_is_not_said_again_by_the_next_frontend(capsys):
    system = System(2, 1)
    http_socket = socket.create_server(("127.0.0.1", 0))
    http_socket.setblocking(False)
    http = HttpServer(create_app(system.hub, tiny_processor(), model_name="tiny"))
    memory = JobMemory()
    memory.announce()
    running = asyncio.create_task(frontend.serve(system.hub, http, http_socket, system.socket, memory))
    encode, language = await system.join_all()
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    for left in (encode[0], language[1]):
        await left.expect(Stop)
        left.die()
    async with asyncio.timeout(WAIT_S):
        assert await running == 0
    assert capsys.readouterr().out == ""
