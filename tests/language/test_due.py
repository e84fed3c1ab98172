"""When a first token is due, on its way through a language rank, to an encode rank and into its pipeline."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from unittest.mock import Mock

import msgspec
import pytest

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.engine import Preempted
from qwen3vl_disagg.language.rank import LanguageRank
from qwen3vl_disagg.protocol.messages import Header, HubMessage, NeedItems, RankHello, Submit
from tests.support.engine import make_engine
from tests.support.link_peers import encode_side, make_grant
from tests.support.link_scenarios import CONFIG, run, until
from tests.support.random_model import random_language_model, small_config
from tests.support.transfer import make_encoded, make_visual


@pytest.mark.parametrize("due_s", [2.0, -3.0, FIRST_COME])
def test_a_language_rank_counts_from_its_own_clock_and_for_good(due_s):
    async def scenario():
        events = []
        hello = RankHello(token="t", role="language", rank=0, pid=1, fingerprint={})
        rank = LanguageRank(Mock(), SimpleNamespace(handle=events.append), hello, ("", 0))  # type: ignore[arg-type]
        submit = Submit(
            request_id="r",
            token_ids=b"\1\0\0\0",
            items=[make_visual(small_config())],
            sampling=SamplingParams(),
            timeout_s=60.0,
            due_s=due_s,
        )
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(submit), type=HubMessage) == submit
        before = time.monotonic()
        rank._submit(submit)
        [command] = rank.engine._commands
        engine = Mock()
        command(engine)
        due = engine.add.call_args.kwargs["due"]
        assert before + due_s <= due <= time.monotonic() + due_s
        await asyncio.sleep(0.01)
        rank._requests.on_events([NeedItems(request_id="r", items=[0]), Preempted("r")])
        assert [event.due for event in events] == [due, due]

    asyncio.run(scenario())


def test_all_answers_of_a_request_are_due_at_once():
    engine = make_engine(random_language_model(small_config(), seed=0))
    engine.add("late", [5, 6], [], SamplingParams(n=2), due=9.0)
    engine.add("early", [5, 6], [], SamplingParams(), due=1.0)
    engine.add("first", [5, 6], [], SamplingParams())
    assert [s.name for s in engine.scheduler.waiting] == ["first", "early", "late", "late/1"]


def test_an_encode_rank_counts_from_its_own_clock():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            side.worker.decode_gate.clear()
            before = time.monotonic()
            grant = msgspec.structs.replace(make_grant("a"), due_s=2.0)
            await peer.say(grant)
            encodings = side.server.pipeline._encodings
            await until(lambda: encodings)
            [encoding] = encodings.values()
            side.worker.open()
            assert before + 2.0 <= encoding.due <= time.monotonic() + 2.0
            await peer.hear(Header)
            await peer.take(grant, make_encoded(CONFIG))

    run(scenario)
