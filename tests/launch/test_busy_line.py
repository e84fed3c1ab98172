"""The line that says how much there is to do, while there is."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from qwen3vl_disagg.launch import frontend
from qwen3vl_disagg.protocol.messages import EncodeLoad, LanguageLoad
from tests.support.fake_ranks import System, in_loop


@in_loop
async def test_a_busy_job_says_how_much_there_is_to_do_and_an_idle_one_nothing(monkeypatch, caplog):
    monkeypatch.setattr(frontend, "BUSY_S", 0.02)
    caplog.set_level(logging.INFO, "qwen3vl_disagg.events")
    async with System(2, 1) as system:
        encode, language = await system.join_all()
        saying = asyncio.create_task(frontend._say_busy(system.hub))
        await asyncio.sleep(0.1)
        assert caplog.records == []
        system.submit()
        await language[1].tell(LanguageLoad(running=2, waiting=1, kv_pages_used=3, kv_pages=4))
        await encode[0].tell(EncodeLoad(running=5, waiting=6))
        await system.until(lambda: any(getattr(r, "q3vl_fields", {}).get("to_encode") for r in caplog.records))
        saying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await saying
    last = [record for record in caplog.records if record.getMessage() == "busy"][-1]
    assert last.q3vl_fields == {
        "requests": 1,
        "running": 2,
        "waiting": 1,
        "kv_cache": 0.75,
        "encoding": 5,
        "to_encode": 6,
    }
