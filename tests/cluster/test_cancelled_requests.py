"""Requests whose clients leave, as the hub sees them: in every stage, whole or answer by answer, nothing stays."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from qwen3vl_disagg.cluster.media_store import MediaStore
from qwen3vl_disagg.core.requests import RequestTimings
from qwen3vl_disagg.protocol.messages import Assign, Cancel, Decoded, Finished, ItemReceived, Tokens
from qwen3vl_disagg.protocol.routing import RouterLimits
from qwen3vl_disagg.protocol.session_events import Tick
from tests.support.fake_ranks import System, submitted_to
from tests.support.held import grown, look

STAGES = ("queued", "submitted", "encoding", "received", "streaming", "last answer")
QUICK, MANY = 120, 10_000
SUSPECTS = RouterLimits().max_suspects


async def give_up(system: System, language: dict, rng: random.Random, stage: str) -> None:
    """One request with two images and two answers, brought as far as `stage`, then left by its client."""
    images = [rng.randbytes(6), rng.randbytes(6)]
    handles = system.submit_all(*images, n=2)
    if stage != "queued":
        rank, submit = await submitted_to(language, handles[0].request_id)
        name = submit.request_id
    if stage not in ("queued", "submitted"):
        await rank.need_all(submit)
        for item in range(2):
            assign = await rank.expect(Assign, request_id=name, item=item)
            if stage != "encoding":
                encoder = next(one for one in system.ranks if (one.role, one.rank) == ("encode", assign.encode_rank))
                await encoder.tell(Decoded(request_id=name, item=item, attempt=assign.attempt))
                await rank.tell(ItemReceived(request_id=name, item=item, attempt=assign.attempt))
    if stage in ("streaming", "last answer"):
        await rank.tell(Tokens(request_id=name, index=0, token_ids=[5], sample=1))
    if stage == "last answer":
        timings = RequestTimings(language_rank=rank.rank)
        await rank.tell(Finished(request_id=name, finish_reason="stop", timings=timings, sample=1))
        handles = handles[:1]
    if stage not in ("queued", "submitted"):
        await rank.tell(Tokens(request_id=name, index=0, token_ids=[6], sample=0))
        event = None
        async with asyncio.timeout(10):
            while not (stage == "encoding" or getattr(event, "token_id", None) == 6):
                event = await handles[0].events.get()
    for handle in rng.sample(handles, len(handles)):
        handle.cancel()
    if stage != "queued":
        await rank.expect(Cancel, request_id=name, sample=None)
    for one in system.ranks:
        one.inbox.clear()


async def check(count: int) -> Counter[str]:
    media, rng, seen = MediaStore(), random.Random(count), Counter[str]()
    async with asyncio.timeout(60 + count / 20), System(media=media) as system:
        _, language = await system.join_all()

        async def go(number: int) -> None:
            for _ in range(number):
                stage = rng.choice(STAGES)
                seen[stage] += 1
                await give_up(system, language, rng, stage)
            await system.until(lambda: not system.hub._router.num_requests)
            system.hub.take(Tick())

        await go(2 * len(STAGES))
        before = look(hub=system.hub)
        await go(count)
        after = look(hub=system.hub)
        assert grown(before, after, {"hub._router._attempts._suspects": SUSPECTS}) == []
        assert system.hub._handles == {}
        assert (len(media), media.num_bytes) == (0, 0)
    return seen


def test_clients_that_leave_leave_nothing_behind():
    assert set(asyncio.run(check(QUICK))) == set(STAGES)


@pytest.mark.acceptance
def test_ten_thousand_clients_that_leave_leave_nothing_behind():
    print(dict(asyncio.run(check(MANY))))
