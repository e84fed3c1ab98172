"""The body of a language rank: requests from the hub, rows from encode ranks over links, tokens back to the hub.

Three things run beside one another: the event loop (hub connection, link control connections), the engine on its own
thread, and one receiving thread for each link (inside the link server). The loop never computes, the engine never
waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import Any

import msgspec
import numpy as np

from qwen3vl_disagg.cluster.hub_client import enter_hub, report_load
from qwen3vl_disagg.cluster.shared_cores import SharedCores
from qwen3vl_disagg.cluster.traces import spans_told
from qwen3vl_disagg.core.errors import DeviceLost, DisaggError, Failure, TransferError
from qwen3vl_disagg.core.faults import fault_point
from qwen3vl_disagg.engine.engine import Engine, EngineEvent
from qwen3vl_disagg.language.engine_thread import EngineThread
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.language.requests import LanguageRequests
from qwen3vl_disagg.parallel.lockstep_link import LockstepClient
from qwen3vl_disagg.protocol.messages import (
    Adopt,
    Assign,
    Cancel,
    Message,
    RankHello,
    RequestFailed,
    Stop,
    Submit,
    TellSpans,
)
from qwen3vl_disagg.transport.control import Connection, ConnectionLost
from qwen3vl_disagg.transport.tls import Tls

logger = logging.getLogger(__name__)
LEFT_S, LEAVE_S = 1.0, 2.0
"""How long to wait for what is lent, and then for the others: they may all have waited for the first."""
ENGINE_STOP_S = 5.0
LOST_S = 1.0


class LanguageRank:
    """One language rank on one event loop. `run` returns the exit status.

    `hello` is what the rank says to the hub, each time it connects. `lockstep`: where experts are spread, the way to
    those with whom steps are taken together. `cores`: see `EngineSteps`.
    """

    def __init__(
        self,
        engine: Engine,
        links: LinkServer,
        hello: RankHello,
        hub_address: tuple[str, int],
        *,
        reconnect_s: float = 30.0,
        lockstep: LockstepClient | None = None,
        cores: SharedCores | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._lockstep, self._is_leaving = lockstep, False
        self._links, self._hello = links, hello
        self._enter = partial(enter_hub, hub_address, tls=tls)
        self._reconnect_s = reconnect_s
        self._hub: Connection | None = None
        self._loop = asyncio.get_running_loop()
        self._crash: asyncio.Future[BaseException] = self._loop.create_future()
        report = lockstep.report if lockstep is not None else None
        self.engine = EngineThread(engine, self._on_engine_events, self._on_engine_crash, report, cores)
        self._requests = LanguageRequests(links, self.engine.post, self._tell, self._loop)
        if lockstep is not None:
            lockstep.on_plan = self.engine.take_plan

    async def run(self) -> int:
        """Serve until the hub says Stop (0). Raises if the engine crashes, or the hub stays away or refuses; PeerLost
        if a rank is gone that holds a part of the experts, DeviceLost without a device."""
        stepping = None if self._lockstep is None else asyncio.create_task(self._lockstep.run())
        self.engine.start()
        serving = asyncio.create_task(self._serve())
        reporting = asyncio.create_task(report_load(self.engine.load, self._tell, lambda: self._hub))
        patience_s = 0.0
        try:
            ends: list[asyncio.Future[Any]] = [serving, self._crash]
            if stepping is not None:
                ends.append(stepping)
            while not serving.done():
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if stepping is not None and self._crash.done():
                    # A rank that is gone makes the model fail here, too; the connection says so in a moment.
                    await asyncio.wait([stepping], timeout=LOST_S)
                if stepping in ends and stepping.done():
                    if not self._is_leaving:
                        stepping.result()
                    ends.remove(stepping)
                if self._crash.done() and isinstance(self._crash.result(), DeviceLost):
                    raise self._crash.result()
                if self._crash.done():
                    raise RuntimeError("the engine crashed") from self._crash.result()
            patience_s = ENGINE_STOP_S
            return serving.result()
        finally:
            # Where others take part in a step, it may never end: then the process ends without waiting for it.
            serving.cancel()
            reporting.cancel()
            if stepping is not None:
                stepping.cancel()
            self.engine.stop(timeout=patience_s)
            await self._links.close()
            if self._hub is not None:
                await self._hub.close()

    async def _serve(self) -> int:
        while True:
            hello = msgspec.structs.replace(self._hello, kept=self._requests.kept())
            self._hub, welcome = await self._enter(hello, deadline_s=self._reconnect_s)
            self._hello = msgspec.structs.replace(self._hello, job=welcome.job)
            try:
                while True:
                    message = await self._hub.receive()
                    if isinstance(message, Stop):
                        return await self._leave()
                    self._handle(message)
            except TransferError:
                # The frontend died; with it went everybody who waits for these requests, but for what is kept.
                self._requests.hub_lost()

    async def _leave(self) -> int:
        """Nobody wants anything any more: everything should come back."""
        self._is_leaving = True
        self._requests.forget_all()
        left = await self._links.left_over(LEFT_S)
        if left:
            logger.warning("left over: %s", left)
        # Steps that others still take need this rank.
        if self._lockstep is not None and not await self._lockstep.leave(LEAVE_S):
            logger.warning("not all others wanted to leave")
        return 0

    def _handle(self, message: Message) -> None:
        match message:
            case Submit():
                try:
                    self._submit(message)
                except Exception as error:  # one request's failure is not the rank's
                    self._requests.fail(message.request_id, error)
            case Adopt():
                self._requests.adopt(message)
            case Assign():
                self._links.handle(message)
            case Cancel():
                self._requests.cancel(message)
            case TellSpans():
                self._tell(spans_told("language", message))

    def _submit(self, message: Submit) -> None:
        token_ids = np.frombuffer(message.token_ids, dtype="<i4").tolist()
        due = self._requests.begin(message)
        fault_point("admitted")

        def add(engine: Engine) -> list[EngineEvent]:
            try:
                engine.add(message.request_id, token_ids, message.items, message.sampling, due=due)
            except Exception as error:  # one request's failure is not the rank's
                if not isinstance(error, DisaggError):
                    logger.error("request %s failed", message.request_id, exc_info=error)
                return [RequestFailed(request_id=message.request_id, failure=Failure.of(error))]
            return []

        self.engine.post(add)

    # -- on the engine's thread

    def _on_engine_events(self, events: list[EngineEvent]) -> None:
        self._loop.call_soon_threadsafe(self._requests.on_events, events)

    def _on_engine_crash(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._on_crash, error)

    # -- on the loop

    def _on_crash(self, error: BaseException) -> None:
        if not self._crash.done():
            self._crash.set_result(error)

    def _tell(self, message: Message) -> None:
        """Queue a message to the hub; when it is gone, the loop that reads from it finds out and cleans up."""
        if self._hub is not None:
            with contextlib.suppress(ConnectionLost):
                self._hub.post(message)
