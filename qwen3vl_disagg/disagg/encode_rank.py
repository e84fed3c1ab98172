"""The body of an encode rank: items from the hub, bytes from the media store, rows to language ranks.

An item waits for its grant first and takes a place in memory only then: pull, decode, tower, send. So what a full
language rank holds up costs nothing here, and no item can block one that has room.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qwen3vl_disagg.core.errors import DisaggError, HandshakeError, InputError, TransferError
from qwen3vl_disagg.disagg.control import Address, Connection, ConnectionLost, connect_hub
from qwen3vl_disagg.disagg.encode_links import Attempt, EncodeLink, EncodeLinks, attempt_of
from qwen3vl_disagg.disagg.encode_worker import EncodedItem, EncodeWorker, Pixels
from qwen3vl_disagg.disagg.hub_client import join_hub
from qwen3vl_disagg.disagg.links import LinkFactory, process_group_links
from qwen3vl_disagg.disagg.messages import (
    Blob,
    Cancel,
    Decoded,
    EncodeItem,
    ItemFailed,
    LinkHello,
    LinksUp,
    Message,
    Peers,
    Pull,
    RankHello,
    Stop,
)
from qwen3vl_disagg.disagg.rank_setup import RankSetup
from qwen3vl_disagg.disagg.rendezvous import RankContext
from qwen3vl_disagg.disagg.slots import EXIT_REFUSED
from qwen3vl_disagg.disagg.store import join_store
from qwen3vl_disagg.processing.images import MAX_BYTES

PULL_S = 30.0


class EncodeRank:
    """One encode rank on one event loop. `run` returns the exit status.

    `make_link` is given where payloads do not cross processes; otherwise links are process groups over the job's store.
    """

    def __init__(
        self,
        worker: EncodeWorker,
        hello: RankHello,
        hub_address: Address,
        *,
        make_link: LinkFactory | None = None,
        host: str = "127.0.0.1",
        max_items: int = 8,
        reconnect_s: float = 30.0,
    ) -> None:
        self._worker, self._hello, self._hub_address = worker, hello, hub_address
        self._make_link, self._host, self._reconnect_s = make_link, host, reconnect_s
        self._hub: Connection | None = None
        self._items: dict[Attempt, asyncio.Task[None]] = {}
        self._memory = asyncio.Semaphore(max_items)
        self._refused: asyncio.Future[HandshakeError] = asyncio.get_running_loop().create_future()
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._tower = ThreadPoolExecutor(1, thread_name_prefix="tower")
        link_hello = LinkHello(token=hello.token, encode_rank=hello.rank, pid=hello.pid, fingerprint=hello.fingerprint)
        self._links = EncodeLinks(link_hello, on_change=self._tell_links, on_refused=self._on_refused)

    async def run(self) -> int:
        """Serve until the hub says Stop (0) or a peer refuses this rank (EXIT_REFUSED). Raises without a hub."""
        serving = asyncio.create_task(self._serve())
        ends: list[asyncio.Future[Any]] = [serving, self._refused]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._refused.done():
                print(f"encode rank {self._hello.rank}: {self._refused.result()}", flush=True)
                return EXIT_REFUSED
            return await serving
        finally:
            serving.cancel()
            for task in self._items.values():
                task.cancel()
            await self._links.close()
            if self._hub is not None:
                await self._hub.close()
            for executor in (self._decoder, self._tower):
                executor.shutdown(wait=False, cancel_futures=True)

    def _on_refused(self, error: HandshakeError) -> None:
        if not self._refused.done():
            self._refused.set_result(error)

    async def _serve(self) -> int:
        while True:
            self._hub = await join_hub(self._hub_address, self._hello, deadline_s=self._reconnect_s)
            self._tell_links(self._links.linked)
            try:
                while True:
                    message = await self._hub.receive()
                    if isinstance(message, Stop):
                        return 0
                    await self._handle(message)
            except TransferError:
                # The frontend died, and with it every request; links stay.
                for attempt in list(self._items):
                    self._cancel(attempt)

    async def _handle(self, message: Message) -> None:
        match message:
            case Peers():
                if self._make_link is None:
                    store = await asyncio.to_thread(join_store, message.store_address)
                    self._make_link = process_group_links(store, host=self._host)
                self._links.connect(message.language_ranks, self._make_link)
            case EncodeItem():
                attempt = attempt_of(message)
                if attempt not in self._items:
                    task = asyncio.create_task(self._process(message))
                    self._items[attempt] = task
                    task.add_done_callback(lambda _: self._items.pop(attempt, None))
            case Cancel():
                for attempt in [attempt for attempt in self._items if attempt[0] == message.request_id]:
                    self._cancel(attempt)

    def _cancel(self, attempt: Attempt) -> None:
        task = self._items.get(attempt)
        if task is not None:
            task.cancel()

    async def _process(self, message: EncodeItem) -> None:
        """One item from grant to acknowledgement; whatever goes wrong is told to the hub."""
        attempt = attempt_of(message)
        link = self._links.get(message.language_rank)
        try:
            if link is None:
                raise TransferError(f"no link to language rank {message.language_rank}")
            async with asyncio.timeout(message.timeout_s):
                await self._encode_and_deliver(message, link, attempt)
        except InputError as error:
            self._tell_failed(attempt, "input", error.message)
        except (DisaggError, TimeoutError) as error:
            self._tell_failed(attempt, "failed", str(error) or "out of time")
        except Exception as error:  # one item's failure is not the rank's
            traceback.print_exception(error)
            self._tell_failed(attempt, "failed", type(error).__name__)
        finally:
            if link is not None:
                link.forget(attempt)

    async def _encode_and_deliver(self, message: EncodeItem, link: EncodeLink, attempt: Attempt) -> None:
        loop = asyncio.get_running_loop()
        grant = await link.wait_grant(attempt, message.timeout_s)
        async with self._memory:
            data = await self._pull(message.visual.digest, message.visual.num_bytes)
            pixels = await loop.run_in_executor(self._decoder, self._worker.preprocess, data, message.visual)
            self._tell(Decoded(request_id=attempt[0], item=attempt[1], attempt=attempt[2]))
            encoded = await loop.run_in_executor(self._tower, self._encode, pixels, message.visual_token_id)
            # A cancelled request leaves its delivery running to the end.
            await asyncio.shield(asyncio.ensure_future(link.deliver(encoded, grant)))

    def _encode(self, pixels: Pixels, visual_token_id: int) -> EncodedItem:
        [encoded] = self._worker.encode([pixels], visual_token_id)
        return encoded

    async def _pull(self, digest: str, num_bytes: int) -> bytes:
        """The bytes under `digest` from the media store, checked."""
        source = await connect_hub(self._hub_address, deadline_s=PULL_S)
        try:
            await source.send(Pull(token=self._hello.token, digest=digest))
            answer = await source.receive(timeout=PULL_S)
            if not isinstance(answer, Blob) or answer.num_bytes != num_bytes or num_bytes > MAX_BYTES:
                raise TransferError("the media store does not have the item")
            data = await source.receive_bytes(num_bytes, PULL_S)
        finally:
            await source.close()
        if hashlib.sha256(data).hexdigest() != digest:
            raise TransferError("the item's bytes do not have its digest")
        return data

    def _tell_links(self, links: list[tuple[int, int]]) -> None:
        self._tell(LinksUp(language_ranks=[rank for rank, _ in links], epochs=[epoch for _, epoch in links]))

    def _tell_failed(self, attempt: Attempt, kind: str, reason: str) -> None:
        request_id, item, number = attempt
        failed = ItemFailed(request_id=request_id, item=item, attempt=number, kind=kind, message=reason)  # type: ignore[arg-type]
        self._tell(failed)

    def _tell(self, message: Message) -> None:
        """Queue a message to the hub; when it is gone, the loop that reads from it finds out."""
        if self._hub is not None:
            with contextlib.suppress(ConnectionLost):
                self._hub.post(message)


def run_encode_rank(context: RankContext) -> int:
    """The body of an encode rank's process; returns its exit status."""
    setup = RankSetup.of(context)
    worker = setup.encode_worker()

    async def serve() -> int:
        return await EncodeRank(worker, setup.hello("encode"), context.hub_address, host=context.host).run()

    return asyncio.run(serve())
