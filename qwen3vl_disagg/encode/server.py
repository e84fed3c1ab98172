"""The encode side of all transfers on one event loop: carries out what the sessions decide.

The pipeline makes the rows; they are sent on one thread for each link.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import DeviceLost, Failure, HandshakeError
from qwen3vl_disagg.core.faults import fault_point
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.core.spans import span
from qwen3vl_disagg.encode.embedding_cache import HeldItem
from qwen3vl_disagg.encode.link_canary import CheckedRows
from qwen3vl_disagg.encode.links import EncodeLink, EncodeLinks
from qwen3vl_disagg.encode.pipeline import EncodePipeline, Pull
from qwen3vl_disagg.encode.worker import EncodeWorker, encode_error
from qwen3vl_disagg.protocol.encode_sessions import ENCODING, QUEUED, EncodeSessions
from qwen3vl_disagg.protocol.messages import (
    Abort,
    Decoded,
    EncodeLoad,
    Frame,
    ItemFailed,
    LinkHello,
    LinksUp,
    Message,
    Resume,
)
from qwen3vl_disagg.protocol.pump import Pump
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    BreakLink,
    EncodeAction,
    Encoded,
    EncodeEvent,
    FrameIn,
    LinkDown,
    LinkUp,
    PayloadSent,
    Release,
    SendFrame,
    SendHeader,
    SendPayload,
    SessionLimits,
    StartEncode,
    Tell,
)
from qwen3vl_disagg.transport.control import Dial, connect_link
from qwen3vl_disagg.transport.links import LinkFactory
from qwen3vl_disagg.transport.ticks import tick

logger = logging.getLogger(__name__)


class EncodeServer:
    """`tell` gets what the router should know; `pull` fetches an item's bytes. `tower`, `gathers`, `on_lost`: see
    `EncodePipeline`, `canary`: see `EncodeLinks`. `on_sent` is called when rows have been sent."""

    def __init__(
        self,
        worker: EncodeWorker,
        hello: LinkHello,
        *,
        tell: Callable[[Message], None],
        pull: Pull,
        on_refused: Callable[[HandshakeError], None],
        limits: SessionLimits | None = None,
        options: EncodeOptions | None = None,
        tower: Executor | None = None,
        gathers: bool = False,
        canary: CheckedRows | None = None,
        on_sent: Callable[[], None] = lambda: None,
        on_lost: Callable[[DeviceLost], None] = lambda _: None,
    ) -> None:
        self.limits = limits or SessionLimits()
        self.sessions = EncodeSessions(self.limits)
        self.pipeline = EncodePipeline(
            worker, pull, options or EncodeOptions(), tell, tower=tower, gathers=gathers, on_lost=on_lost
        )
        self._tell, self._on_sent = tell, on_sent
        self._links = EncodeLinks(
            hello,
            on_up=self._on_up,
            on_down=self._on_down,
            on_frame=self._on_frame,
            on_refused=on_refused,
            canary=canary,
        )
        self._pump = Pump[EncodeEvent, EncodeAction](self.sessions.handle, self._perform, time.monotonic)
        self._tasks: dict[Attempt, asyncio.Task[None]] = {}
        self._encoded: dict[Attempt, HeldItem] = {}
        self._ticker: asyncio.Task[None] | None = None

    def connect(self, peers: list[tuple[int, str, int]], make_link: LinkFactory, dial: Dial = connect_link) -> None:
        """Link to these language ranks (rank, host, port); those already known are left alone."""
        if self._ticker is None:
            self._ticker = asyncio.create_task(tick(self.handle))
        self._links.connect(peers, make_link, dial)

    def use_number(self, encode_rank: int) -> None:
        """What this rank is called from now on; before the first link."""
        self._links.hello = msgspec.structs.replace(self._links.hello, encode_rank=encode_rank)

    def left_over(self) -> str:
        """What is still held when nobody wants anything any more; "" for nothing."""
        items = [(*item.attempt, item.state) for item in self.sessions.items.values()]
        return f"items {items}, rows of {list(self._encoded)}" if items or self._encoded else ""

    def load(self) -> EncodeLoad:
        pipeline, states = self.pipeline, [item.state for item in self.sessions.items.values()]
        return EncodeLoad(
            running=states.count(ENCODING),
            waiting=states.count(QUEUED),
            cache_bytes=pipeline.cache.num_bytes,
            num_items=pipeline.num_encodings,
            num_batches=pipeline.num_batches,
        )

    def tell_links(self) -> None:
        links = self._links.linked
        self._tell(LinksUp(language_ranks=[rank for rank, _ in links], epochs=[epoch for _, epoch in links]))

    async def close(self) -> None:
        """Stop everything; says goodbye to the language ranks."""
        if self._ticker is not None:
            self._ticker.cancel()
        for task in self._tasks.values():
            task.cancel()
        try:
            await self._links.close()
        finally:
            self.pipeline.close()

    # -- sessions

    def handle(self, event: EncodeEvent) -> None:
        """Let the sessions decide, and do what they say."""
        self._pump.handle(event)

    def _perform(self, action: EncodeAction) -> None:
        match action:
            case SendFrame():
                link = self._links.get(action.peer, action.frame.epoch)
                if link is not None:
                    link.post(action.frame)
            case SendHeader():
                self._send_header(action)
            case SendPayload():
                self._send_payload(action)
            case StartEncode():
                task = self._tasks[action.attempt] = asyncio.create_task(self._produce(action))
                task.add_done_callback(_must_succeed)
            case Release():
                self._release(action.attempt)
            case Tell():
                self._tell(action.message)
            case BreakLink():
                link = self._links.get(action.peer, action.epoch)
                if link is not None:
                    link.control.abort()  # its reader drops the link

    def _release(self, attempt: Attempt) -> None:
        task = self._tasks.pop(attempt, None)
        if task is not None:
            task.cancel()
        held = self._encoded.pop(attempt, None)
        if held is not None:
            self.pipeline.release(held)

    def _send_header(self, action: SendHeader) -> None:
        link = self._links.get(action.peer, action.epoch)
        if link is None:
            return
        grant = action.grant
        attempt = grant.key
        try:
            link.post(Frame(epoch=action.epoch, seq=action.seq, body=self._encoded[attempt].header(grant)))
            fault_point("header-sent")
        except Exception as error:  # a grant that cannot be; the count of frames has a gap now
            logger.error("a header did not go out", exc_info=error)
            link.control.abort()

    def _send_payload(self, action: SendPayload) -> None:
        grant = action.grant
        attempt = grant.key
        link = self._links.get(action.language_rank, action.epoch)
        if link is None:
            return
        payload = self._encoded[attempt].item.payload(grant)

        def send() -> None:
            with span("send", rows=grant.row_stop - grant.row_start, items=[(grant.request_id, grant.item)]):
                link.payload.send(payload, action.payload_s)
            fault_point("payload-sent")

        def sent(done: asyncio.Future) -> None:
            error = asyncio.CancelledError() if done.cancelled() else done.exception()
            reason = None if error is None else str(error) or type(error).__name__
            if error is None:
                self._on_sent()
            self.handle(PayloadSent(action.language_rank, action.epoch, attempt, reason))

        asyncio.get_running_loop().run_in_executor(link.thread, send).add_done_callback(sent)

    # -- encoding

    async def _produce(self, action: StartEncode) -> None:
        """From the bytes to the rows; whatever goes wrong is this item's failure alone."""
        attempt, held = action.attempt, None
        request_id, item, number = attempt
        ids: dict[str, Any] = {"request_id": request_id, "item": item, "attempt": number}
        on_decoded = partial(self._tell, Decoded(**ids))
        try:
            wish: dict[str, Any] = {"is_alone": action.is_alone, "due": action.due, "reader": (request_id, item)}
            held = await self.pipeline.rows(action.visual, on_decoded, **wish)
            held = replace(held, waited_s=held.waited_s + action.waited_s)
            fault_point("encoded")
        except Exception as error:  # one item's failure is not the rank's
            if self._tasks.get(attempt) is asyncio.current_task():
                self.handle(ItemFailed(**ids, failure=Failure.of(encode_error(error))))
        else:
            if self._tasks.get(attempt) is asyncio.current_task():
                self._encoded[attempt], held = held, None
                self.handle(Encoded(attempt))
        if held is not None:
            self.pipeline.release(held)

    # -- links

    def _on_up(self, link: EncodeLink) -> None:
        self.tell_links()
        self.handle(LinkUp(link.language_rank, link.epoch))

    def _on_down(self, link: EncodeLink, reason: str) -> None:
        self.tell_links()
        self.handle(LinkDown(link.language_rank, link.epoch, reason))

    def _on_frame(self, link: EncodeLink, frame: Frame) -> None:
        if isinstance(frame.body, Abort):
            fault_point("in-abort")
        if isinstance(frame.body, Resume):
            fault_point("resume-received")
        self.handle(FrameIn(link.language_rank, frame))


def _must_succeed(task: asyncio.Task[None]) -> None:
    """What it raises goes to the loop's handler now, and not when the task is collected: it is kept."""
    if not task.cancelled():
        task.result()
