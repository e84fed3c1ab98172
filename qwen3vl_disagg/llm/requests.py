"""Requests under way in one process: an engine, the in-process transfer, and who waits for the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.core.requests import FinishReason, RequestTimings, SamplingParams, TokenLogprob
from qwen3vl_disagg.engine.engine import Engine, EngineEvent, Preempted
from qwen3vl_disagg.llm.local import ItemError, LocalTransfer, Outcome
from qwen3vl_disagg.processing import AnswerParts, Parts, Prompt
from qwen3vl_disagg.protocol.messages import Finished, NeedItems, PromptLogprobs, RequestFailed, Tokens
from qwen3vl_disagg.protocol.session_events import Consumed
from qwen3vl_disagg.transport.buffers import Delivery

_WAIT_S = 1.0
"""As long is waited for a grammar before all is looked at again."""


@dataclass(frozen=True)
class Ended:
    """All that came of a request."""

    prompt: Prompt
    parts: AnswerParts
    finish_reason: FinishReason
    timings: RequestTimings
    logprobs: list[TokenLogprob]


@dataclass
class _Request:
    """A request under way. `emit` gets its text as it comes, `done` what becomes of it, once."""

    prompt: Prompt
    parts: AnswerParts
    emit: Callable[[Parts], None]
    done: Callable[[Ended | DisaggError], None]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_timings: RequestTimings = field(default_factory=RequestTimings)
    """As they were at the first token."""
    first_token_at: float = 0.0

    def end(self, finish_reason: FinishReason, timings: RequestTimings) -> Ended:
        return Ended(self.prompt, self.parts, finish_reason, timings, self.logprobs)

    @property
    def media_bytes(self) -> int:
        return sum(map(len, self.prompt.media))


class LocalRequests:
    """`begin` requests and `step` until they are done. Whoever has begun one gives it up, if it is not done by then."""

    def __init__(self, engine: Engine, make_transfer: Callable[[], LocalTransfer]) -> None:
        self.engine, self._make_transfer = engine, make_transfer
        self.transfer = make_transfer()
        self._requests: dict[str, _Request] = {}
        self._num_begun = 0

    @property
    def media_bytes(self) -> int:
        """Of images and clips of all that is under way."""
        return sum(request.media_bytes for request in self._requests.values())

    def begin(
        self,
        prompt: Prompt,
        parts: AnswerParts,
        sampling: SamplingParams,
        *,
        emit: Callable[[Parts], None],
        done: Callable[[Ended | DisaggError], None],
    ) -> str:
        """Queue a request; its name. InputError if it can never run."""
        request_id = f"local-{self._num_begun}"
        self._num_begun += 1
        try:
            self.engine.add(request_id, prompt.token_ids, prompt.items, sampling)
            self._requests[request_id] = _Request(prompt, parts, emit, done)
        except BaseException:
            self.engine.cancel(request_id)
            raise
        return request_id

    def give_up(self, request_ids: Sequence[str]) -> None:
        """Forget these, where they are not done."""
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                self.engine.cancel(request_id)
                self.transfer.forget(request_id)
        self._move_rows()

    def step(self) -> None:
        """One step for all that is under way. What is raised on the way ends all of it: a step that was interrupted
        may have left anything behind, so engine and transfer begin anew."""
        try:
            self._step()
        except BaseException as error:
            ended, self._requests = self._requests, {}
            self.engine.reset()
            self.transfer = self._make_transfer()
            for request in ended.values():
                request.done(DisaggError(f"given up: {type(error).__name__} in a step for it and others"))
            raise

    def _step(self) -> None:
        self.engine.set_short_of_room(self.transfer.is_short_of_room)
        events = self.engine.step()
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None:
                continue  # the same step brought the token that completed its stop string
            ended = self._handle(event, request)
            if ended is not None:
                self.transfer.forget(event.request_id)
                self._requests.pop(event.request_id).done(ended)
        outcomes = self._move_rows()
        for outcome in outcomes:
            if isinstance(outcome, ItemError) and outcome.request_id in self._requests:
                self._requests.pop(outcome.request_id).done(outcome.error)
        if not events and not outcomes and not self.engine.has_work and not self.engine.wait(_WAIT_S):
            raise RuntimeError(f"nothing moves, and {len(self._requests)} requests are not answered")

    def _move_rows(self) -> list[Outcome]:
        """Bring over what can be brought, and give it to the engine."""
        moved: list[Outcome] = []
        while outcomes := self.transfer.run():
            moved += outcomes
            for outcome in outcomes:
                match outcome:
                    case Delivery():
                        delivered = outcome.request_id, outcome.item, outcome.rows, outcome.timings
                        for event in self.engine.provide_rows(*delivered):
                            if isinstance(event, Consumed):
                                self.transfer.consumed(event.request_id, event.item, event.attempt, event.rows)
                    case ItemError():
                        self.engine.cancel(outcome.request_id)
                        self.transfer.forget(outcome.request_id)
                    case _:
                        self.engine.restart_item(outcome.request_id, outcome.item)
                        self.transfer.returned(outcome)
        return moved

    def _handle(self, event: EngineEvent, request: _Request) -> Ended | DisaggError | None:
        match event:
            case NeedItems():
                prompt = request.prompt
                self.transfer.need(event.request_id, prompt.items, event.items, prompt.media, event.first_rows)
                return None
            case Preempted():
                self.transfer.need(event.request_id, request.prompt.items, [], request.prompt.media)
                return None
            case Consumed():
                self.transfer.consumed(event.request_id, event.item, event.attempt, event.rows)
                return None
            case PromptLogprobs():
                return None  # nobody asks for them
            case Tokens():
                return self._tokens(event, request)
            case RequestFailed():
                return event.failure.error()
            case Finished():
                request.emit(request.parts.finish())
                return request.end(event.finish_reason, event.timings)

    def _tokens(self, event: Tokens, request: _Request) -> Ended | None:
        """Take tokens in; the end when one of them completes a stop string."""
        if event.timings is not None:
            request.first_timings, request.first_token_at = event.timings, time.monotonic()
        for number, token_id in enumerate(event.token_ids):
            request.emit(request.parts.push(token_id))
            if event.logprobs:
                request.logprobs.append(event.logprobs[number])
            if request.parts.is_stopped:
                self.engine.cancel(event.request_id)
                decode_ms = (time.monotonic() - request.first_token_at) * 1e3
                return request.end("stop", msgspec.structs.replace(request.first_timings, decode=decode_ms))
        return None
