"""How a rank gets into the hub."""

from __future__ import annotations

import asyncio
import time

import pytest

from qwen3vl_disagg.cluster.hub_client import enter_hub
from qwen3vl_disagg.core.errors import Dismissed, HandshakeError, TransferError
from qwen3vl_disagg.protocol.messages import Cancel, HubMessage, LinksUp, RankHello, Refused, Stop, Welcome
from qwen3vl_disagg.transport.control import MAX_HUB_FRAME, Connection

HELLO = RankHello(token="t", role="encode", rank=0, pid=1, fingerprint={})


def join(*answers, deadline_s: float = 5.0) -> int:
    """Join a hub that gives one answer to each connection (None: it dies); the number of connections it saw."""

    async def scenario() -> int:
        seen = 0

        async def accept(reader, writer):
            nonlocal seen
            seen += 1
            hub = Connection(reader, writer, messages=HubMessage, max_frame=MAX_HUB_FRAME)
            assert await hub.receive(timeout=5) == HELLO
            answer = answers[min(seen, len(answers)) - 1]
            if answer is not None:
                await hub.send(answer)
            if isinstance(answer, Welcome):
                assert isinstance(await hub.receive(timeout=5), LinksUp)
            await hub.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            hub, _ = await enter_hub(server.sockets[0].getsockname()[:2], HELLO, deadline_s=deadline_s)
            await hub.send(LinksUp(language_ranks=[]))
            await hub.close()
            return seen
        finally:
            server.close()

    return asyncio.run(scenario())


def test_a_welcome_lets_in():
    assert join(Welcome()) == 1


def test_a_frontend_that_dies_meanwhile_is_tried_again():
    assert join(None, None, Welcome()) == 3


def test_a_refusal_names_the_field():
    with pytest.raises(HandshakeError, match="dtype: expected 'a', got 'b'"):
        join(Refused(field="dtype", expected="a", got="b"))


def test_another_answer_is_an_error():
    with pytest.raises(TransferError, match="Cancel"):
        join(Cancel(request_id="r"))


def test_a_rank_that_comes_when_the_job_goes_down_is_sent_home():
    with pytest.raises(Dismissed):
        join(Stop())


def test_a_hub_that_never_answers_costs_the_deadline_and_no_more():
    started = time.monotonic()
    with pytest.raises(TransferError, match="did not answer"):
        join(None, deadline_s=0.5)
    assert time.monotonic() - started < 4
