"""Requests between an engine and the links: what the engine lacks is expected, rows go to it, what it has used or
given back is said to the sessions. What there is to decide the `RequestBook` does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from qwen3vl_disagg.core.errors import Failure
from qwen3vl_disagg.core.faults import fault_point
from qwen3vl_disagg.engine.engine import Engine, EngineEvent, Preempted
from qwen3vl_disagg.language.engine_thread import Command
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.language.request_book import RequestBook
from qwen3vl_disagg.protocol.messages import Adopt, Cancel, Finished, KeptRequest, Message, Submit
from qwen3vl_disagg.protocol.session_events import Attempt, Consumed, Recall, Returned

logger = logging.getLogger(__name__)
LOOK_S = 5.0


class LanguageRequests:
    """On one event loop, `loop`. `post` takes commands for the engine; its events come to `on_events`. `tell` gets what
    the router should hear."""

    def __init__(
        self,
        links: LinkServer,
        post: Callable[[Command], None],
        tell: Callable[[Message], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._links, self._post, self._loop = links, post, loop
        self.book = RequestBook(self._cancel, links.handle, tell)
        self._is_looking = False
        links.on_rows, links.on_recall = self._on_rows, self._on_recall
        links.on_tell, links.on_short_of_room = self._on_tell, self._on_short_of_room

    # -- what the frontend says

    def begin(self, message: Submit) -> float:
        """Remember a request, which the engine has, or is about to have; when its first token is due."""
        return self.book.begin(message, time.monotonic())

    def adopt(self, message: Adopt) -> None:
        self.book.adopt(message, time.monotonic())

    def cancel(self, message: Cancel) -> None:
        """Drop a request, or one of its answers, everywhere; safe for one that is not known."""
        if message.sample is None:
            self.book.forget(message.request_id)
        else:
            self.book.forget_answer(message.request_id, message.sample, time.monotonic())
            self._look()

    def forget_all(self) -> None:
        for request_id in list(self.book.running):
            self.book.forget(request_id)

    def hub_lost(self) -> None:
        self.book.hub_lost(time.monotonic())
        self._look()

    def kept(self) -> list[KeptRequest]:
        """For the next frontend."""
        return self.book.offer(self._links.sessions.last_attempt)

    def _look(self) -> None:
        """Every so often, while there is something that may not be asked for in time."""
        if not self._is_looking and self.book.look(time.monotonic()):
            self._is_looking = True
            self._loop.call_later(LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._is_looking = False
        self._look()

    def fail(self, request_id: str, error: Exception) -> None:
        """Give a request up. The cause goes to the log; clients get no internals."""
        logger.error("request %s failed", request_id, exc_info=error)
        self.book.fail(request_id, Failure.of(error))

    # -- what the engine says

    def on_events(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            try:
                self._on_event(event)
            except Exception as error:  # one request's failure is not the rank's
                self.fail(event.request_id, error)

    def _on_event(self, event: EngineEvent) -> None:
        if isinstance(event, Preempted):
            self.book.preempted(event.request_id)
            return
        if isinstance(event, Consumed) and event.request_id in self.book.running:
            fault_point("before-free")
        self.book.hear(event, time.monotonic())
        if isinstance(event, Finished):
            self._look()

    def _cancel(self, request_id: str, sample: int | None) -> None:
        def cancel(engine: Engine) -> None:
            engine.cancel(request_id, sample)
            if sample is None:  # behind all that the engine has said of it
                with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody hears of anything
                    self._loop.call_soon_threadsafe(self.book.left, request_id)

        self._post(cancel)

    # -- what the sessions say

    def _on_tell(self, message: Message) -> None:
        self.book.of_sessions(message, time.monotonic())

    def _on_short_of_room(self, is_short: bool) -> None:
        """Rows wait for the blocks of those that are here: the engine should use these up."""
        self._post(lambda engine: engine.set_short_of_room(is_short))

    def _on_rows(self, attempt: Attempt) -> None:
        self._post(partial(self._links.receiver.hand_over, attempt))

    def _on_recall(self, recall: Recall) -> None:
        """The rows may be read at this moment: only the engine's thread can say when that is over."""

        def restart(engine: Engine) -> None:
            engine.restart_item(recall.request_id, recall.item)
            self._loop.call_soon_threadsafe(self._links.handle, Returned(*recall.key))

        self._post(restart)
