"""The way of images and clips to an engine in the same process: a rank of each role without the engine, and the router,
on an event loop in a thread of their own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from qwen3vl_disagg.cluster.media_store import MediaStore
from qwen3vl_disagg.core.errors import DeviceLost, DisaggError, Failure, HandshakeError, TransferError
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.pipeline import EncodePipeline
from qwen3vl_disagg.encode.server import EncodeServer
from qwen3vl_disagg.encode.worker import EncodeWorker
from qwen3vl_disagg.engine.engine import Engine, EngineEvent
from qwen3vl_disagg.language.engine_thread import BetweenSteps, Command
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.language.requests import LanguageRequests
from qwen3vl_disagg.protocol.messages import Assign, Cancel, LinkHello, Message, RequestFailed, Submit
from qwen3vl_disagg.protocol.pump import Pump
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import (
    Abandon,
    Action,
    Admit,
    End,
    Event,
    FromRank,
    RankUp,
    Role,
    RouterLimits,
    Send,
)
from qwen3vl_disagg.protocol.session_events import SessionLimits
from qwen3vl_disagg.transport.control import Address, Connection, link_pair
from qwen3vl_disagg.transport.links import in_process_links
from qwen3vl_disagg.transport.ticks import TICK_S, tick

_ENCODE_RANK = _LANGUAGE_RANK = 0
_NO_TOKEN = "none"
_LIMITS = RouterLimits(max_waiting=sys.maxsize, max_waiting_tokens=sys.maxsize)
"""Whoever asks decides how much waits."""
_SESSION_LIMITS = SessionLimits(grant_s=1e9, lease_s=1e9)
"""Whoever asks may pause between two steps for as long as they like. Finite: what has waited longest is the first to be
dropped."""


class LocalTransfer:
    """`admit` requests with images or clips, tell it `events` of their engine, `forget` them; from any thread. What the
    engine has to do (take rows, hear of failures, and run the tower, where that is between steps and not on a thread of
    its own) is given to `post`, as commands.

    The thread sleeps while it knows of no request. `close` ends it.
    """

    def __init__(
        self,
        worker: EncodeWorker,
        receiver: Receiver,
        post: Callable[[Command], None],
        options: EncodeOptions | None = None,
        *,
        is_between_steps: bool = True,
    ) -> None:
        self.worker, self.receiver, self._post = worker, receiver, post
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._router = Router(_LIMITS)
        self._pump = Pump[Event, Action](self._router.handle, self._perform, self._loop.time)
        self._make_link = in_process_links()
        self._media = MediaStore(sys.maxsize)
        self._held: dict[str, list[VisualItem]] = {}
        """Request -> the items whose media are held for it."""
        self.links = LinkServer(
            receiver,
            fingerprint={},
            token=_NO_TOKEN,
            language_rank=_LANGUAGE_RANK,
            make_link=self._make_link,
            limits=_SESSION_LIMITS,
        )
        self._requests = LanguageRequests(self.links, post, self._told_by("language", _LANGUAGE_RANK), self._loop)
        self.encode = EncodeServer(
            worker,
            LinkHello(token=_NO_TOKEN, encode_rank=_ENCODE_RANK, pid=os.getpid(), fingerprint={}),
            tell=self._told_by("encode", _ENCODE_RANK),
            pull=self._pull,
            on_refused=self._refused,
            limits=_SESSION_LIMITS,
            options=options,
            tower=BetweenSteps(post) if is_between_steps else None,
            gathers=True,
            on_lost=lambda lost: post(_raising(lost)),
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._awake = threading.Event()
        self._is_closing = False
        self._loop.set_exception_handler(self._uncaught)
        self._pump.handle(RankUp("language", _LANGUAGE_RANK))  # before anything is admitted
        self._pump.handle(RankUp("encode", _ENCODE_RANK))
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._thread.start()

    @property
    def pipeline(self) -> EncodePipeline:
        return self.encode.pipeline

    @property
    def is_dead(self) -> bool:
        """Its thread has ended, and nothing is brought any more."""
        return not self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Nothing is under way, and everything came back."""
        return not self._held and not self._router.num_requests and self.links.is_idle and not self.encode.left_over()

    def admit(self, request_id: str, items: list[VisualItem], media: list[bytes], sampling: SamplingParams) -> None:
        """A request that the engine has, with the bytes of its items."""
        event = Admit(request_id, b"", 0, items, sampling, timeout_s=float("inf"))

        def admit() -> None:
            self._media.hold(items, media)
            self._held[request_id] = items
            self._pump.handle(event)

        self._call(admit)

    def events(self, events: Sequence[EngineEvent]) -> None:
        """What the engine says of requests that were admitted, in this order."""
        self._call(lambda: self._requests.on_events(events))

    def forget(self, request_id: str) -> None:
        """Nobody wants the request any more."""
        self._call(lambda: self._pump.handle(Abandon(request_id)))

    def close(self) -> None:
        """Let the thread end, soon."""
        self._is_closing = True
        self._awake.set()

    # -- on the loop

    def _call(self, do: Callable[[], None]) -> None:
        def call() -> None:
            try:
                do()
            except Exception as error:  # nobody else would hear of it
                self._post(_raising(error))

        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: why has been posted
            return
        self._awake.set()

    def _run(self) -> None:
        try:
            with self._runner:
                self._runner.run(self._open())
                while not self._is_closing:
                    self._awake.wait()
                    self._awake.clear()
                    self._runner.run(self._work())
                self._runner.run(self._end())
                self.pipeline.join()
        except BaseException as error:  # the thread ends here; who waits for rows must know
            self._post(_raising(error))

    def _uncaught(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Of a callback or a task: whoever waits for what it was about would wait forever."""
        error = context.get("exception")
        if error is None:
            loop.default_exception_handler(context)
        else:
            self._post(_raising(error))

    async def _open(self) -> None:
        self.links.start()
        self._start(tick(self._pump.handle))
        self.encode.connect([(_LANGUAGE_RANK, "", 0)], self._make_link, self._dial)
        while not (self._is_closing or self._router.encode_ranks):
            await asyncio.sleep(0.001)

    async def _work(self) -> None:
        """Until nothing is left to do."""
        while not (self._is_closing or self.is_idle):
            await asyncio.sleep(TICK_S)

    async def _end(self) -> None:
        await self.encode.close()
        await self.links.close()

    async def _dial(self, address: Address, *, deadline_s: float) -> Connection:
        near, far = await link_pair()
        self._start(self.links.welcome(far))
        return near

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _perform(self, action: Action) -> None:
        match action:
            case Send(message=Submit() as submit):
                self._requests.begin(submit)
            case Send(message=Assign() as assign):
                self.links.handle(assign)
            case Send(message=Cancel() as cancel):
                self._requests.cancel(cancel)
            case End(request_id, error):
                self._media.release(self._held.pop(request_id, []))
                if error is not None:
                    self._post(_failing(request_id, error))

    def _told_by(self, role: Role, rank: int) -> Callable[[Message], None]:
        return lambda message: self._pump.handle(FromRank(role, rank, message))

    async def _pull(self, digest: str, num_bytes: int) -> bytes:
        data = self._media.get(digest)
        if data is None or len(data) != num_bytes:
            raise TransferError("nobody has the item's bytes any more")
        return data

    def _refused(self, error: HandshakeError) -> None:
        self._post(_raising(error))


def _failing(request_id: str, error: DisaggError) -> Command:
    def fail(engine: Engine) -> list[EngineEvent]:
        engine.cancel(request_id)
        return [RequestFailed(request_id=request_id, failure=Failure.of(error))]

    return fail


def _raising(error: BaseException) -> Command:
    """Ends the step, and with it all that is under way."""

    def fail(_: Engine) -> None:
        if isinstance(error, (Exception, DeviceLost)):
            raise error
        raise DisaggError(f"{type(error).__name__} in the thread that brings images and clips") from error

    return fail
