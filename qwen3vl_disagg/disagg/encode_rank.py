"""The body of an encode rank: items from the hub, bytes from the media store, rows to language ranks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import Any

from qwen3vl_disagg.core.errors import HandshakeError, TransferError
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.disagg.control import Address, Connection, ConnectionLost, connect_hub
from qwen3vl_disagg.disagg.encode_server import EncodeServer
from qwen3vl_disagg.disagg.encode_worker import EncodeWorker
from qwen3vl_disagg.disagg.hub_client import join_hub
from qwen3vl_disagg.disagg.links import LinkFactory, process_group_links
from qwen3vl_disagg.disagg.messages import (
    Blob,
    Cancel,
    EncodeItem,
    LinkHello,
    Message,
    Peers,
    Pull,
    RankHello,
    Stop,
)
from qwen3vl_disagg.disagg.rank_setup import RankSetup
from qwen3vl_disagg.disagg.rendezvous import RankContext
from qwen3vl_disagg.disagg.session_events import SessionLimits
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
        limits: SessionLimits | None = None,
        options: EncodeOptions | None = None,
        reconnect_s: float = 30.0,
    ) -> None:
        self._hello, self._hub_address = hello, hub_address
        self._make_link, self._host, self._reconnect_s = make_link, host, reconnect_s
        self._hub: Connection | None = None
        self._refused: asyncio.Future[HandshakeError] = asyncio.get_running_loop().create_future()
        link_hello = LinkHello(token=hello.token, encode_rank=hello.rank, pid=hello.pid, fingerprint=hello.fingerprint)
        self.server = EncodeServer(
            worker,
            link_hello,
            tell=self._tell,
            pull=self._pull,
            on_refused=self._on_refused,
            limits=limits,
            options=options,
        )

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
            try:
                await self.server.close()
            finally:
                if self._hub is not None:
                    await self._hub.close()

    def _on_refused(self, error: HandshakeError) -> None:
        if not self._refused.done():
            self._refused.set_result(error)

    async def _serve(self) -> int:
        while True:
            self._hub = await join_hub(self._hub_address, self._hello, deadline_s=self._reconnect_s)
            self.server.tell_links()
            try:
                while True:
                    message = await self._hub.receive()
                    if isinstance(message, Stop):
                        left = self.server.left_over()
                        if left:
                            print(f"encode rank {self._hello.rank}: left over: {left}", flush=True)
                        return 0
                    await self._handle(message)
            except TransferError:
                self.server.cancel(None)  # the frontend died, and with it every request; links stay

    async def _handle(self, message: Message) -> None:
        match message:
            case Peers():
                if self._make_link is None:
                    store = await asyncio.to_thread(join_store, message.store_address)
                    self._make_link = process_group_links(store, host=self._host)
                self.server.connect(message.language_ranks, self._make_link)
            case EncodeItem():
                self.server.encode(message)
            case Cancel():
                self.server.cancel(message.request_id)

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
        hello = setup.hello("encode")
        return await EncodeRank(worker, hello, context.hub_address, host=context.host, options=context.encode).run()

    return asyncio.run(serve())
