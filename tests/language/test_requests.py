"""Requests between an engine and the links: what the engine says late of a run that is over."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.language.engine_thread import Command
from qwen3vl_disagg.language.requests import LanguageRequests
from qwen3vl_disagg.protocol.messages import Cancel, Message, Submit, Tokens


def tokens(index: int) -> Tokens:
    return Tokens(request_id="r", index=index, token_ids=[index])


def test_news_of_a_run_is_heard_until_it_is_given_up_and_that_of_the_next_when_the_engine_has_left_it():
    async def run() -> None:
        commands: list[Command] = []
        told: list[Message] = []
        links: Any = SimpleNamespace(handle=lambda event: None)
        requests = LanguageRequests(links, commands.append, told.append, asyncio.get_running_loop())
        submit = Submit(request_id="r", token_ids=b"", items=[], sampling=SamplingParams(), timeout_s=9.0)
        requests.begin(submit)
        requests.on_events([tokens(0)])
        requests.cancel(Cancel(request_id="r"))
        requests.begin(submit)
        requests.on_events([tokens(1)])  # of a step that was under way
        assert told == [tokens(0)]
        engine: Any = SimpleNamespace(cancel=lambda request_id, sample: None)
        [cancel] = commands
        await asyncio.to_thread(cancel, engine)
        await asyncio.sleep(0)
        requests.on_events([tokens(0)])
        assert told == [tokens(0), tokens(0)]

    asyncio.run(run())
