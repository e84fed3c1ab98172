"""Requests between an engine and the links: what the engine lacks is expected, rows go to it, what it has used or
given back is said to the sessions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import Failure, UnavailableError
from qwen3vl_disagg.core.faults import fault_point
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.engine.engine import Engine, EngineEvent, Preempted
from qwen3vl_disagg.language.engine_thread import Command
from qwen3vl_disagg.language.kept_answers import KeptAnswers
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.protocol.messages import (
    Cancel,
    Finished,
    ItemReceived,
    KeptRequest,
    Message,
    NeedItems,
    PromptLogprobs,
    RequestFailed,
    Submit,
    Tokens,
)
from qwen3vl_disagg.protocol.session_events import Attempt, Consumed, Expect, Recall, Returned

logger = logging.getLogger(__name__)
LOOK_S = 5.0


@dataclass
class _Request:
    """What the loop remembers of a running request. `deadline` and `due` are on the monotonic clock."""

    items: list[VisualItem]
    deadline: float
    open: set[int]
    """Answers that have not ended."""
    missing: set[int]
    """Items of which not all rows are here."""
    due: float = FIRST_COME


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
        self._links, self._post, self._tell, self._loop = links, post, tell, loop
        self._requests: dict[str, _Request] = {}
        self._kept, self._looking = KeptAnswers(), False
        links.on_rows, links.on_recall = self._on_rows, self._on_recall
        links.on_tell, links.on_short_of_room = self._on_tell, self._on_short_of_room

    def begin(self, message: Submit) -> float:
        """Remember a request, which the engine has, or is about to have; when its first token is due."""
        now, answers = time.monotonic(), set(range(message.sampling.n))
        missing = set(range(len(message.items)))
        request = _Request(message.items, now + message.timeout_s, answers, missing, now + message.due_s)
        self._requests[message.request_id] = request
        if message.keep_as:
            self._kept.begin(message.request_id, message.keep_as, message.sampling.n)
        return request.due

    def forget(self, request_id: str, sample: int | None = None) -> None:
        """Drop a request, or one of its answers, everywhere; safe for one that is not known."""
        request = self._requests.get(request_id)
        if sample is not None and request is not None and request.open - {sample}:
            request.open.discard(sample)
            self._post(lambda engine: engine.cancel(request_id, sample))
            return
        self._kept.forget(request_id)
        self._requests.pop(request_id, None)
        self._post(lambda engine: engine.cancel(request_id))
        self._links.handle(Cancel(request_id=request_id))

    def forget_all(self) -> None:
        for request_id in list(self._requests):
            self.forget(request_id)

    # -- when the frontend is gone

    def hub_lost(self) -> None:
        """Go on with what is kept and lacks nothing that only a frontend could get; forget the rest."""
        now = time.monotonic()
        for request_id, request in list(self._requests.items()):
            if not self._kept.unhear(request_id, now) or request.missing:
                self.forget(request_id)
        self._look()

    def kept(self) -> list[KeptRequest]:
        """For the next frontend."""
        return self._kept.requests(self._links.attempts)

    def adopt(self, request_id: str) -> None:
        """Say all of it again, and go on."""
        said = self._kept.adopt(request_id)
        if said is None:
            failure = Failure.of(UnavailableError("the answer is no longer there; ask again"))
            said = [RequestFailed(request_id=request_id, failure=failure)]
        for message in said:
            self._tell(message)

    def _look(self) -> None:
        """Every so often, while there is something, forget what nobody asked for."""
        for request_id in self._kept.expired(time.monotonic()):
            self.forget(request_id)
        if len(self._kept) and not self._looking:
            self._looking = True
            self._loop.call_later(LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._looking = False
        self._look()

    def _say(self, message: Tokens | Finished | RequestFailed | PromptLogprobs) -> None:
        """To whoever hears of the request."""
        if self._kept.note(message, time.monotonic()):
            self._tell(message)
        if isinstance(message, Finished):
            self._look()

    def fail(self, request_id: str, error: Exception) -> None:
        """Give a request up. The cause goes to the log; clients get no internals."""
        logger.error("request %s failed", request_id, exc_info=error)
        is_heard = self._kept.is_heard(request_id)
        self.forget(request_id)
        if is_heard:
            self._tell(RequestFailed(request_id=request_id, failure=Failure.of(error)))

    def on_events(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None:
                continue  # cancelled while the step ran
            try:
                self._on_event(event, request)
            except Exception as error:  # one request's failure is not the rank's
                self.fail(event.request_id, error)

    def _on_event(self, event: EngineEvent, request: _Request) -> None:
        if isinstance(event, Consumed):
            fault_point("before-free")
            self._links.handle(event)
            return
        if isinstance(event, Preempted):
            self._links.handle(Expect(event.request_id, request.items, [], request.deadline, due=request.due))
            return
        if isinstance(event, NeedItems):
            request.missing |= set(event.items)
            if not self._kept.is_heard(event.request_id):  # only a frontend can have them encoded again
                self.forget(event.request_id)
                return
            needed = event.items, request.deadline, event.first_rows, request.due
            self._links.handle(Expect(event.request_id, request.items, *needed))
        if isinstance(event, Finished):
            request.open.discard(event.sample)
        if isinstance(event, RequestFailed) or not request.open:
            del self._requests[event.request_id]
            self._links.handle(Cancel(request_id=event.request_id))
        if isinstance(event, NeedItems):
            self._tell(event)
        else:
            self._say(event)

    # -- what the sessions say

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

    def _on_tell(self, message: Message) -> None:
        """Of the sessions; they have forgotten a request that fails."""
        if isinstance(message, RequestFailed):
            self._requests.pop(message.request_id, None)
            self._post(lambda engine: engine.cancel(message.request_id))
            self._say(message)
            return
        if isinstance(message, ItemReceived) and (request := self._requests.get(message.request_id)):
            request.missing.discard(message.item)
        self._tell(message)
