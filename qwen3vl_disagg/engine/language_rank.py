"""The body of a language rank: requests from the hub, rows from encode ranks over links, tokens back to the hub.

Three things run beside one another: the event loop (hub connection, link control connections), the engine on its own
thread, and one receiving thread for each link (inside the link server). The loop never computes, the engine never
waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen3vl_disagg.core.errors import InputError, TransferError
from qwen3vl_disagg.core.requests import ItemTimings, VisualItem
from qwen3vl_disagg.disagg.control import Connection, ConnectionLost
from qwen3vl_disagg.disagg.hub_client import join_hub
from qwen3vl_disagg.disagg.link_server import LinkServer
from qwen3vl_disagg.disagg.messages import (
    Assign,
    Cancel,
    Finished,
    Header,
    ItemLost,
    ItemReceived,
    Message,
    Peers,
    RankHello,
    RequestFailed,
    Stop,
    Submit,
)
from qwen3vl_disagg.disagg.receiver import ReceivedItem
from qwen3vl_disagg.disagg.store import join_store
from qwen3vl_disagg.engine.engine import Engine, EngineEvent
from qwen3vl_disagg.engine.engine_thread import EngineThread
from qwen3vl_disagg.engine.sequence import ItemRows


@dataclass
class _Request:
    """What the loop remembers of a running request."""

    items: list[VisualItem]
    encode_ranks: dict[int, int] = field(default_factory=dict)


class LanguageRank:
    """One language rank on one event loop. `run` returns the exit status.

    `hello` is what the rank says to the hub, each time it connects.
    """

    def __init__(
        self,
        engine: Engine,
        links: LinkServer,
        hello: RankHello,
        hub_address: tuple[str, int],
        *,
        reconnect_s: float = 30.0,
    ) -> None:
        self._links, self._hello, self._hub_address = links, hello, hub_address
        self._reconnect_s = reconnect_s
        self._hub: Connection | None = None
        self._requests: dict[str, _Request] = {}
        self._loop = asyncio.get_running_loop()
        self._crash: asyncio.Future[BaseException] = self._loop.create_future()
        self._engine = EngineThread(engine, self._from_engine(self._on_events), self._from_engine(self._on_crash))
        links.on_item, links.on_lost = self._on_item, self._on_lost

    async def run(self) -> int:
        """Serve until the hub says Stop (0). Raises if the engine crashes, or the hub stays away or refuses."""
        self._engine.start()
        serving = asyncio.create_task(self._serve())
        try:
            ends: list[asyncio.Future[Any]] = [serving, self._crash]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._crash.done():
                raise RuntimeError("the engine crashed") from self._crash.result()
            return await serving
        finally:
            serving.cancel()
            self._engine.stop(timeout=5.0)
            await self._links.close()
            if self._hub is not None:
                await self._hub.close()

    async def _serve(self) -> int:
        while True:
            self._hub = await join_hub(self._hub_address, self._hello, deadline_s=self._reconnect_s)
            try:
                while True:
                    message = await self._hub.receive()
                    if isinstance(message, Stop):
                        return 0
                    await self._handle(message)
            except TransferError:
                # The frontend died; with it went everybody who waits for these requests.
                for request_id in list(self._requests):
                    self._forget(request_id)

    async def _handle(self, message: Message) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Assign():
                request = self._requests.get(message.request_id)
                if request is not None:
                    request.encode_ranks[message.item] = message.encode_rank
                    self._links.request(
                        message.request_id,
                        message.item,
                        message.attempt,
                        request.items[message.item],
                        message.encode_rank,
                    )
            case Peers():
                if not self._links.has_store:
                    self._links.use_store(await asyncio.to_thread(join_store, message.store_address))
            case Cancel():
                self._forget(message.request_id)

    def _submit(self, message: Submit) -> None:
        token_ids = np.frombuffer(message.token_ids, dtype="<i4").tolist()
        self._requests[message.request_id] = _Request(message.items)

        def add(engine: Engine) -> list[EngineEvent]:
            try:
                engine.add(message.request_id, token_ids, message.items, message.sampling)
            except InputError as error:
                failed = RequestFailed(
                    request_id=message.request_id, code=error.code, message=error.message, status=error.status
                )
                return [failed]
            return []

        self._engine.post(add)

    def _forget(self, request_id: str) -> None:
        """Drop a request everywhere; safe for one that is not known."""
        self._requests.pop(request_id, None)
        self._links.cancel(request_id)
        self._engine.post(lambda engine: engine.cancel(request_id))

    def _from_engine(self, handler: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(value: Any) -> None:
            self._loop.call_soon_threadsafe(handler, value)

        return call

    def _on_crash(self, error: BaseException) -> None:
        if not self._crash.done():
            self._crash.set_result(error)

    def _on_events(self, events: list[EngineEvent]) -> None:
        for event in events:
            if event.request_id not in self._requests:
                continue  # cancelled while the step ran
            if isinstance(event, (Finished, RequestFailed)):
                del self._requests[event.request_id]
                self._links.cancel(event.request_id)
            self._tell(event)

    def _on_item(
        self,
        request_id: str,
        item: int,
        header: Header,
        received: ReceivedItem,
        transfer_ms: float,
        num_bytes: int,
    ) -> None:
        """All rows of an item are here: give them to the engine."""
        request = self._requests.get(request_id)
        if request is None:
            return
        timings = ItemTimings(
            preprocess=header.preprocess_ms,
            encode=header.encode_ms,
            transfer=transfer_ms,
            transfer_bytes=num_bytes,
            encode_rank=request.encode_ranks[item],
            rows=header.total_rows,
            attempts=header.attempt,
        )
        rows = ItemRows(received.main, received.deepstack)
        self._engine.post(lambda engine: engine.provide_item(request_id, item, rows, timings))
        self._tell(ItemReceived(request_id=request_id, item=item, attempt=header.attempt))

    def _on_lost(self, request_id: str, item: int, attempt: int, reason: str, dead_epoch: int) -> None:
        if request_id in self._requests:
            lost = ItemLost(request_id=request_id, item=item, attempt=attempt, reason=reason, dead_epoch=dead_epoch)
            self._tell(lost)

    def _tell(self, message: Message) -> None:
        """Queue a message to the hub; when it is gone, the loop that reads from it finds out and cleans up."""
        if self._hub is not None:
            with contextlib.suppress(ConnectionLost):
                self._hub.post(message)
