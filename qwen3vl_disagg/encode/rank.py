"""The body of an encode rank: items and rows over links with language ranks, bytes from the media store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any

import msgspec

from qwen3vl_disagg.checkpoint import load_vision_model
from qwen3vl_disagg.cluster.hub_client import enter_hub, report_load
from qwen3vl_disagg.cluster.media_store import pull_media
from qwen3vl_disagg.cluster.rank_setup import RankSetup
from qwen3vl_disagg.cluster.rendezvous import RankContext
from qwen3vl_disagg.cluster.slots import EXIT_REFUSED, run_loop
from qwen3vl_disagg.cluster.traces import spans_told
from qwen3vl_disagg.core.devices import resolve_compile
from qwen3vl_disagg.core.errors import DeviceLost, HandshakeError, TransferError
from qwen3vl_disagg.core.logs import start_logging
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.canary import check_tower
from qwen3vl_disagg.encode.link_canary import CheckedRows
from qwen3vl_disagg.encode.server import EncodeServer
from qwen3vl_disagg.encode.worker import EncodeWorker
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.processing import VideoProcessor
from qwen3vl_disagg.protocol.messages import (
    Leaving,
    LinkHello,
    Message,
    Peers,
    RankHello,
    Stop,
    TellSpans,
    Welcome,
)
from qwen3vl_disagg.protocol.session_events import SessionLimits
from qwen3vl_disagg.transport.control import Connection, ConnectionLost, Dial, connect_link
from qwen3vl_disagg.transport.links import LinkFactory, process_group_links
from qwen3vl_disagg.transport.sockets import Address
from qwen3vl_disagg.transport.tls import Tls

logger = logging.getLogger(__name__)
JOIN_S = 120.0
"""How long one that joins waits for the hub to be there, and to know what it must fit."""
DRAIN_S = 20.0
"""How long one that leaves waits for what it has under way."""
SETTLE_S = 2.0


class EncodeRank:
    """One encode rank on one event loop. `run` returns the exit status.

    `make_link` is given where payloads do not cross processes; otherwise links are process groups.
    `tower`: see `EncodePipeline`, `canary`: see `EncodeLinks`, `on_sent`: see `EncodeServer`.
    """

    def __init__(
        self,
        worker: EncodeWorker,
        hello: RankHello,
        hub_address: Address,
        *,
        make_link: LinkFactory | None = None,
        tower: Executor | None = None,
        host: str = "127.0.0.1",
        limits: SessionLimits | None = None,
        options: EncodeOptions | None = None,
        join_s: float | None = None,
        reconnect_s: float = 30.0,
        canary: CheckedRows | None = None,
        on_sent: Callable[[], None] = lambda: None,
        tls: Tls | None = None,
    ) -> None:
        self._hello = hello
        self._enter = partial(enter_hub, hub_address, tls=tls)
        self._dial: Dial = partial(connect_link, tls=tls)
        self._make_link = make_link or process_group_links(host)
        self._join_s, self._reconnect_s = join_s or reconnect_s, reconnect_s
        self._hub: Connection | None = None
        self._loop = asyncio.get_running_loop()
        self._refused: asyncio.Future[HandshakeError] = self._loop.create_future()
        self._lost: asyncio.Future[DeviceLost] = self._loop.create_future()
        self._left: asyncio.Future[None] = self._loop.create_future()
        self._is_leaving = False
        number = -1 if hello.rank is None else hello.rank
        link_hello = LinkHello(token=hello.token, encode_rank=number, pid=hello.pid, fingerprint=hello.fingerprint)
        self.server = EncodeServer(
            worker,
            link_hello,
            tell=self._tell,
            pull=partial(pull_media, hub_address, hello.token, tls=tls),
            on_refused=self._on_refused,
            limits=limits,
            options=options,
            tower=tower,
            canary=canary,
            on_sent=on_sent,
            on_lost=self._on_lost,
        )

    async def run(self) -> int:
        """Serve until the hub says Stop (0), this rank has left (0) or a peer refuses it (EXIT_REFUSED).

        HubGone without a hub, HandshakeError if that refuses, DeviceLost without a device.
        """
        serving = asyncio.create_task(self._serve())
        reporting = asyncio.create_task(report_load(self.server.load, self._tell, lambda: self._hub))
        ends: list[asyncio.Future[Any]] = [serving, self._refused, self._lost, self._left]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._refused.done():
                logger.error("%s", self._refused.result())
                return EXIT_REFUSED
            if self._lost.done():
                raise self._lost.result()
            return await serving if serving.done() else 0
        finally:
            serving.cancel()
            reporting.cancel()
            try:
                await self.server.close()
            finally:
                if self._hub is not None:
                    await self._hub.close()

    def leave(self) -> None:
        """Take nothing new and go when what is under way has ended, at the latest after DRAIN_S. Safe to call twice."""
        if self._is_leaving:
            return
        self._is_leaving = True
        # Without a hub nothing is under way.
        self._loop.call_later(0.0 if self._hub is None else DRAIN_S, self._go)
        self._tell(Leaving())

    def _go(self) -> None:
        if not self._left.done():
            self._left.set_result(None)

    def _on_refused(self, error: HandshakeError) -> None:
        if not self._refused.done():
            self._refused.set_result(error)

    def _on_lost(self, error: DeviceLost) -> None:
        if not self._lost.done():
            self._lost.set_result(error)

    async def _serve(self) -> int:
        patience_s = self._join_s
        while True:
            hub, welcome = await self._enter(self._hello, deadline_s=patience_s)
            self._hub, patience_s = hub, self._reconnect_s
            self._take_number(welcome)
            self.server.tell_links()
            if self._is_leaving:
                self._tell(Leaving())
            try:
                while True:
                    message = await hub.receive()
                    if isinstance(message, Stop):
                        await self._settle()
                        return 0
                    self._handle(message)
            except TransferError:
                self._hub = None  # the frontend died, and with it every request: language ranks say so over the links

    def _take_number(self, welcome: Welcome) -> None:
        """It says from now on who it is and of which job: the next frontend knows it again, another job's turns it
        away."""
        has_joined = self._hello.rank is None and welcome.rank is not None
        rank = welcome.rank if has_joined else self._hello.rank
        self._hello = msgspec.structs.replace(self._hello, rank=rank, job=welcome.job)
        if has_joined and rank is not None:
            self.server.use_number(rank)
            start_logging(f"encode rank {rank}")
            logger.info("joined")

    async def _settle(self) -> None:
        """Nobody wants anything any more; the last acknowledgements may still be on their way."""
        end = self._loop.time() + SETTLE_S
        while (left := self.server.left_over()) and self._loop.time() < end:
            await asyncio.sleep(0.02)
        if left:
            logger.warning("left over: %s", left)

    def _handle(self, message: Message) -> None:
        if isinstance(message, TellSpans):
            self._tell(spans_told("encode", message))
        if isinstance(message, Peers):
            self.server.connect(message.language_ranks, self._make_link, self._dial)

    def _tell(self, message: Message) -> None:
        """Queue a message to the hub; when it is gone, the loop that reads from it finds out."""
        if self._hub is not None:
            with contextlib.suppress(ConnectionLost):
                self._hub.post(message)


def load_worker(setup: RankSetup) -> EncodeWorker:
    """Load the vision tower, and nothing else of the weights."""
    decoder = MediaDecoder()
    decoder.warm_up()
    progress, compile = setup.context.progress, resolve_compile(setup.context.options.model.compile, setup.device)
    on_size = partial(progress.weights, "vision tower")
    model = load_vision_model(setup.folder, dtype=setup.dtype, device=setup.device, on_size=on_size)
    return EncodeWorker(
        model,
        setup.processor,
        setup.config,
        video=VideoProcessor.from_folder(setup.folder, setup.config.vision, resize=setup.processor.resize),
        decoder=decoder,
        compile=compile,
        cores=setup.shared_cores(),
    )


def checked_rows(setup: RankSetup, worker: EncodeWorker) -> CheckedRows | None:
    """Rows that are right, for the links. CanaryFailed if the rank does not make them."""
    if setup.context.options.canary == "off":
        return None
    setup.context.progress.stage("canary", "a picture through the vision tower")
    return check_tower(worker, setup.folder)


def run_encode_rank(context: RankContext) -> int:
    """The body of an encode rank's process; returns its exit status. One that joins leaves on SIGTERM and SIGINT."""
    setup = RankSetup.of(context)
    worker = load_worker(setup)
    canary = checked_rows(setup, worker)

    async def serve() -> int:
        hello = setup.hello("encode", worker.model)
        join_s = JOIN_S if context.is_joining else None
        rank = EncodeRank(
            worker,
            hello,
            context.hub_address,
            host=context.host,
            options=context.options.encode,
            join_s=join_s,
            canary=canary,
            on_sent=context.use.mark,
            tls=context.tls,
        )
        if context.is_joining:  # the others leave when the hub says so
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, rank.leave)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        return await rank.run()

    return run_loop(serve())
