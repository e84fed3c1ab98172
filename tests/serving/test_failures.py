"""What fails behind the hub is told to the client as it is: the app, the hub and the router over real connections, with
scripted ranks at their other ends."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from qwen3vl_disagg.core.errors import (
    DeadlineError,
    DisaggError,
    Failure,
    InputError,
    MediaTimeout,
    OverloadedError,
    ServerError,
    TransferError,
    UnavailableError,
    late,
)
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Decoded,
    ItemFailed,
    ItemLost,
    ItemReceived,
    Message,
    RequestFailed,
    Submit,
    Tokens,
)
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.transport.control import ConnectionLost
from tests.support.asgi import Exchange
from tests.support.fake_backend import PATH, tiny_processor
from tests.support.fake_ranks import FakeRank, System, in_loop
from tests.support.media_images import jpeg

Reply = tuple[int, Any, str | None]
"""status, code, param"""
IMAGE = {"type": "image_url", "image_url": {"url": "data:;base64," + base64.b64encode(jpeg()).decode()}}
PLACE = "messages[0].content[1]"


@dataclass
class Scene:
    """One encode rank, one language rank, and a request on its way."""

    encode: FakeRank
    language: FakeRank
    exchange: Exchange
    request_id: str = ""

    async def submitted(self) -> Submit:
        submit = await self.language.expect(Submit)
        self.request_id = submit.request_id
        return submit

    async def needed(self) -> None:
        await self.language.need_all(await self.submitted())

    async def assigned(self, attempt: int = 1) -> None:
        await self.language.expect(Assign, attempt=attempt)

    async def language_says(self, kind: type[Message], **fields: Any) -> None:
        await self.language.tell(kind(request_id=self.request_id, **fields))

    async def encode_says(self, kind: type[Message], **fields: Any) -> None:
        await self.encode.tell(kind(request_id=self.request_id, item=0, **fields))

    async def received(self) -> None:
        await self.encode_says(Decoded, attempt=1)
        await self.language_says(ItemReceived, item=0, attempt=1)

    async def first_token(self) -> None:
        await self.language_says(Tokens, index=0, token_ids=[100])


class Fleet:
    """A hub with one encode rank and one language rank, and the app over it."""

    def __init__(self, system: System, encode: FakeRank, language: FakeRank) -> None:
        self.encode, self.language = encode, language
        self.app = create_app(system.hub, tiny_processor(), model_name="tiny")

    @asynccontextmanager
    async def request(self, *, with_image: bool, stream: bool, timeout_s: float = 20.0) -> AsyncIterator[Scene]:
        """One request, answered when the block ends."""
        content = [{"type": "text", "text": "what is it?"}, *([IMAGE] if with_image else [])]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "stream": stream}
        headers = {"x-request-timeout-ms": str(round(timeout_s * 1e3))}
        exchange = Exchange(self.app, PATH, [json.dumps(body).encode()], headers)
        running = asyncio.create_task(exchange.run())
        yield Scene(self.encode, self.language, exchange)
        await running


@asynccontextmanager
async def fleet() -> AsyncIterator[Fleet]:
    async with System(2, 1) as system:
        encode, language = await system.join_all()
        yield Fleet(system, encode[0], language[1])


def reply(exchange: Exchange) -> Reply:
    """As the client sees it, in the status or in the stream's last event."""
    if exchange.status != 200:
        error = exchange.json["error"]
        return exchange.status or 0, error["code"], error["param"]
    *_, last = [line for line in exchange.body.decode().splitlines() if line.startswith("data: ")]
    error = json.loads(last.removeprefix("data: "))["error"]
    return 200, error["code"], error["param"]


# ---- what a language rank says ----

OF_A_REQUEST: list[tuple[DisaggError, Reply]] = [
    (InputError("too long", param="messages", code="too_long"), (400, "too_long", "messages")),
    (ServerError("the language model failed on this request", code="engine_error"), (500, "engine_error", None)),
    (ServerError("?"), (500, "internal_error", None)),
    (late(), (504, "deadline_exceeded", None)),
    (OverloadedError("no room"), (429, "overloaded", None)),
    (UnavailableError("it goes down"), (503, "unavailable", None)),
    (TransferError("10.0.0.1:3"), (503, "transfer_failed", None)),
]
STAGES = ["text, queued", "text, answered", "image, queued", "image, encoding", "image, received", "image, answered"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", STAGES)
@in_loop
async def test_a_failed_request_is_told_as_what_it_is(stage, stream):
    """Whatever its items are doing at that moment."""
    async with fleet() as ranks:
        for error, expected in OF_A_REQUEST:
            await check_failed_request(ranks, stage, stream, error, expected)


async def check_failed_request(ranks: Fleet, stage: str, stream: bool, error: DisaggError, expected: Reply) -> None:
    status, code, param = expected
    async with ranks.request(with_image=stage.startswith("image"), stream=stream) as it:
        if stage in ("image, encoding", "image, received", "image, answered"):
            await it.needed()
            await it.assigned()
        else:
            await it.submitted()
        if stage in ("image, received", "image, answered"):
            await it.received()
        if stage.endswith("answered"):
            await it.first_token()
            if stream:
                await it.exchange.until(b"content")
        await it.language_says(RequestFailed, failure=Failure.of(error))
    started = stream and stage not in ("image, queued", "image, encoding")
    assert reply(it.exchange) == (200 if started else status, code, param)
    assert b"10.0.0.1" not in it.exchange.body


# ---- what an encode rank says ----

OF_AN_ITEM: list[tuple[DisaggError, Reply]] = [
    (InputError("too large", status=413), (413, "invalid_request", PLACE)),
    (MediaTimeout("decoding the image takes too long"), (504, "media_timeout", PLACE)),
    (late(), (504, "deadline_exceeded", PLACE)),
    (ServerError("the process was killed", code="decoder_killed"), (500, "decoder_killed", PLACE)),
    (ServerError("not finite", code="encode_error"), (500, "encode_error", PLACE)),
    (UnavailableError("no library"), (503, "unavailable", PLACE)),
    (ConnectionLost("10.0.0.1:3"), (503, "transfer_failed", PLACE)),
]


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_failed_item_is_told_as_what_it_is(stream):
    """At once, or when no attempt went better."""
    async with fleet() as ranks:
        for error, expected in OF_AN_ITEM:
            failure = Failure.of(error)
            async with ranks.request(with_image=True, stream=stream) as it:
                await it.needed()
                for attempt in range(1, 2 if failure.is_final else 4):
                    await it.assigned(attempt)
                    await it.encode_says(ItemFailed, attempt=attempt, failure=failure)
            assert reply(it.exchange) == expected
            assert b"10.0.0.1" not in it.exchange.body


@in_loop
async def test_an_item_that_is_lost_on_its_way_is_a_failed_transfer():
    async with fleet() as ranks, ranks.request(with_image=True, stream=False) as it:
        await it.needed()
        for attempt in (1, 2, 3):
            await it.assigned(attempt)
            await it.language_says(ItemLost, item=0, attempt=attempt, reason="digest")
    assert reply(it.exchange) == (503, "transfer_failed", PLACE)


# ---- time ----

TIMEOUT_S = 0.8


async def _nothing(it: Scene) -> None:
    await it.submitted()


async def _waiting_for_an_encode_rank(it: Scene) -> None:
    it.encode.die()
    await it.needed()


async def _encoding(it: Scene) -> None:
    await it.needed()
    await it.assigned()


async def _out_of_time_over_and_over(it: Scene) -> None:
    """The encode rank gives up when the request's time is over, and so would each other one."""
    await _encoding(it)
    await asyncio.sleep(TIMEOUT_S)
    await it.encode_says(ItemFailed, attempt=1, failure=Failure.of(TransferError("out of time")))


async def _prefill(it: Scene) -> None:
    await _encoding(it)
    await it.received()


async def _decode(it: Scene) -> None:
    await _prefill(it)
    await it.first_token()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "reach",
    [_nothing, _waiting_for_an_encode_rank, _encoding, _out_of_time_over_and_over, _prefill, _decode],
    ids=lambda reach: reach.__name__,
)
@in_loop
async def test_a_deadline_is_a_504_in_every_stage(reach: Callable[[Scene], Awaitable[None]], stream: bool):
    async with fleet() as ranks, ranks.request(with_image=True, stream=stream, timeout_s=TIMEOUT_S) as it:
        await reach(it)
    started = stream and reach in (_prefill, _decode)
    assert reply(it.exchange)[:2] == (200 if started else 504, "deadline_exceeded")


# ---- the table ----


@pytest.mark.parametrize(
    "error",
    [*(error for error, _ in OF_A_REQUEST + OF_AN_ITEM), DeadlineError("x"), ZeroDivisionError("secret")],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_survives_the_wire(error):
    failure = Failure.of(error)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(failure), type=Failure) == failure
    again = failure.error()
    assert Failure.of(again) == failure
    assert "secret" not in failure.message
