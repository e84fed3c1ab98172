"""What a language rank's loop remembers of its requests, and who hears of them.

When the frontend dies, a request goes on if its answers are kept (`KeptAnswers`) and no rows of its items are awaited,
which only a frontend could have encoded; all others are forgotten. Pure: times are given, and what is to be done is
called at once. The simulator runs it, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import Failure, UnavailableError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.language.kept_answers import KEEP_S, KeptAnswers
from qwen3vl_disagg.protocol.messages import (
    Adopt,
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
from qwen3vl_disagg.protocol.session_events import Consumed, Expect, LanguageEvent, Prolong

Said = NeedItems | Consumed | Tokens | Finished | PromptLogprobs | RequestFailed
"""Of the engine."""


@dataclass(slots=True)
class Running:
    """`deadline` and `due` are on the clock that the times are of."""

    items: list[VisualItem]
    deadline: float
    open: set[int]
    """Answers that have not ended."""
    due: float = FIRST_COME
    missing: set[int] = field(default_factory=set)
    """Items that the engine has asked for since it took the request in last, and of which not all rows are here."""


class RequestBook:
    """`cancel` takes a request, or one of its answers, from the engine, which says `left` when a whole one has gone;
    `to_sessions` is heard by the sessions; `tell` gets what the router should hear."""

    def __init__(
        self,
        cancel: Callable[[str, int | None], None],
        to_sessions: Callable[[LanguageEvent], None],
        tell: Callable[[Message], None],
        *,
        keep_s: float = KEEP_S,
    ) -> None:
        self._cancel, self._to_sessions, self._tell = cancel, to_sessions, tell
        self.running: dict[str, Running] = {}
        self._leaving: Counter[str] = Counter()
        """Requests that the engine has not left yet. Under such a name another may have begun, or the same one anew."""
        self.kept = KeptAnswers(keep_s)

    # -- what the frontend says

    def begin(self, message: Submit, now: float) -> float:
        """Remember a request, which the engine has, or is about to have; when its first token is due."""
        answers, due = set(range(message.sampling.n)), now + message.due_s
        self.running[message.request_id] = Running(message.items, now + message.timeout_s, answers, due)
        if message.keep_as:
            self.kept.begin(message.request_id, message.keep_as, message.sampling.n)
        return due

    def forget(self, request_id: str) -> None:
        """Drop a request everywhere; safe for one that is not known."""
        self.kept.forget(request_id)
        self._drop(request_id)

    def forget_answer(self, request_id: str, sample: int, now: float) -> None:
        """Nobody wants this answer of a request any more; what it said stays with those of the others."""
        request = self.running.get(request_id)
        if request is None:
            return
        request.open.discard(sample)
        self.kept.close(request_id, sample, now)
        if request.open:
            self._cancel(request_id, sample)
        else:
            self._drop(request_id)

    def adopt(self, message: Adopt, now: float) -> None:
        """Say all of it again, and go on, with the time that the new frontend gives."""
        request_id = message.request_id
        said = self.kept.adopt(request_id)
        if said is None:
            failure = Failure.of(UnavailableError("the answer is no longer there; ask again"))
            said = [RequestFailed(request_id=request_id, failure=failure)]
        elif (request := self.running.get(request_id)) is not None:
            request.deadline = now + message.timeout_s
            self._to_sessions(Prolong(request_id, request.deadline))
        for one in said:
            self._tell(one)

    def fail(self, request_id: str, failure: Failure) -> None:
        """Give a request up."""
        is_heard = self.kept.is_heard(request_id)
        self.forget(request_id)
        if is_heard:
            self._tell(RequestFailed(request_id=request_id, failure=failure))

    # -- when the frontend is gone

    def hub_lost(self, now: float) -> None:
        """Go on with what is kept and lacks nothing that only a frontend could get; forget the rest."""
        for request_id, request in list(self.running.items()):
            if not self.kept.unhear(request_id, now) or request.missing:
                self.forget(request_id)

    def offer(self, last_attempt: int) -> list[KeptRequest]:
        """For the next frontend. `last_attempt`: the highest number that the sessions have heard of."""
        return self.kept.requests(last_attempt)

    def look(self, now: float) -> bool:
        """Forget what nobody asked for; whether there will be more of that. Every so often."""
        for request_id in self.kept.expired(now):
            self.forget(request_id)
        return bool(len(self.kept))

    # -- what the engine says

    def hear(self, event: Said, now: float) -> None:
        """Of a request that is not known, or begun anew, nothing is done: it was cancelled while the step ran."""
        request = self._of_engine(event.request_id)
        if request is None:
            return
        match event:
            case Consumed():
                self._to_sessions(event)
            case NeedItems():
                self._need(event, request)
            case _:
                if isinstance(event, Finished):
                    request.open.discard(event.sample)
                if isinstance(event, RequestFailed) or not request.open:
                    del self.running[event.request_id]
                    self._to_sessions(Cancel(request_id=event.request_id))
                self._say(event, now)

    def preempted(self, request_id: str) -> None:
        """The engine gave the request's pages up: until it says NeedItems again, it needs no rows."""
        request = self._of_engine(request_id)
        if request is not None:
            request.missing = set()
            self._to_sessions(Expect(request_id, request.items, [], request.deadline, due=request.due))

    def left(self, request_id: str) -> None:
        """What it says from now on is of one that was begun later."""
        self._leaving[request_id] -= 1
        if self._leaving[request_id] <= 0:
            del self._leaving[request_id]

    def _of_engine(self, request_id: str) -> Running | None:
        return None if request_id in self._leaving else self.running.get(request_id)

    def _leave(self, request_id: str) -> None:
        self._leaving[request_id] += 1
        self._cancel(request_id, None)

    def _need(self, event: NeedItems, request: Running) -> None:
        if not self.kept.is_heard(event.request_id):  # only a frontend can have them encoded again
            self.forget(event.request_id)
            return
        needed = event.items, request.deadline, event.first_rows, request.due
        self._to_sessions(Expect(event.request_id, request.items, *needed))
        request.missing = set(event.items)
        self._tell(event)

    # -- what the sessions say

    def of_sessions(self, message: Message, now: float) -> None:
        """They have forgotten a request that fails."""
        if isinstance(message, RequestFailed):
            self.running.pop(message.request_id, None)
            self._leave(message.request_id)
            self._say(message, now)
            return
        if isinstance(message, ItemReceived) and (request := self.running.get(message.request_id)):
            request.missing.discard(message.item)
        self._tell(message)

    def _say(self, message: Tokens | Finished | RequestFailed | PromptLogprobs, now: float) -> None:
        """To whoever hears of the request."""
        if self.kept.note(message, now):
            self._tell(message)

    def _drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)
        self._leave(request_id)
        self._to_sessions(Cancel(request_id=request_id))
