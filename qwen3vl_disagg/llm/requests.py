"""Requests under way in one process: an engine that whoever waits for the answers steps, and the transfer beside it."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.core.requests import FinishReason, RequestTimings, SamplingParams, TokenLogprob
from qwen3vl_disagg.engine.engine import Engine, EngineEvent
from qwen3vl_disagg.language.engine_thread import Command, EngineSteps
from qwen3vl_disagg.llm.transfer import LocalTransfer
from qwen3vl_disagg.processing import AnswerParts, Parts, Prompt
from qwen3vl_disagg.protocol.messages import Finished, RequestFailed, Tokens

_IS_DEAD = "the thread that brings images and clips has ended"


@dataclass(frozen=True)
class Ended:
    """All that came of a request."""

    prompt: Prompt
    parts: AnswerParts
    finish_reason: FinishReason
    timings: RequestTimings
    logprobs: list[TokenLogprob]
    vector: bytes = b""
    """As in `Finished`."""


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

    def end(self, finish_reason: FinishReason, timings: RequestTimings, vector: bytes = b"") -> Ended:
        return Ended(self.prompt, self.parts, finish_reason, timings, self.logprobs, vector)

    @property
    def media_bytes(self) -> int:
        return sum(map(len, self.prompt.media))


class LocalRequests:
    """`begin` requests and `step` until they are done. Whoever has begun one gives it up, if it is not done by then.

    Tokens stay on the thread that steps; the transfer's thread hears of requests with images or clips alone.
    """

    def __init__(self, engine: Engine, make_transfer: Callable[[Callable[[Command], None]], LocalTransfer]) -> None:
        """`make_transfer` is told where commands for the engine go."""
        self.engine, self._make_transfer = engine, make_transfer
        self._requests: dict[str, _Request] = {}
        self._num_begun = 0
        self._pid = os.getpid()
        self._broken_by = ""
        """Why all has to begin anew; "" for no reason."""
        self._renew()

    def _renew(self) -> None:
        steps = EngineSteps(self.engine)
        if not self._is_forked:
            transfer = self._make_transfer(steps.post)
            end_transfer = weakref.finalize(self, transfer.close)
            end_transfer.atexit = False  # its thread ends with the process
            self.transfer, self._end_transfer = transfer, end_transfer
        self._steps = steps

    def _begin_anew(self, why: str) -> None:
        """Engine and transfer without what was under way, which is told. Where that is interrupted itself, the next
        call does it once more."""
        self._broken_by = why
        self.engine.reset()
        if not self._is_forked:
            self.transfer.close()
            self._end_transfer.detach()
        self._renew()
        for request_id, request in list(self._requests.items()):
            request.done(DisaggError(f"given up: {why}"))
            self._requests.pop(request_id, None)
        self._broken_by = ""

    def _mend(self) -> bool:
        """Begin anew if that has to be; whether it had."""
        why = self._broken_by
        if not why and not self._is_forked and self.transfer.is_dead:
            why = _IS_DEAD
        if why:
            self._begin_anew(why)
        return bool(why)

    @property
    def _is_forked(self) -> bool:
        """This is a child of the process that has the transfer's thread."""
        return os.getpid() != self._pid

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
        """Queue a request; its name. InputError if it can never run, DisaggError for images or clips after a fork."""
        if prompt.items and self._is_forked:
            raise DisaggError("a forked process has no use of its parent's LLM for images and clips: make one there")
        self._mend()
        request_id = f"local-{self._num_begun}"
        self._num_begun += 1
        self._requests[request_id] = _Request(prompt, parts, emit, done)
        try:
            self.engine.add(request_id, prompt.token_ids, prompt.items, sampling)
            if prompt.items:
                self.transfer.admit(request_id, prompt.items, prompt.media, sampling)
        except BaseException:
            self.give_up([request_id])
            raise
        return request_id

    def give_up(self, request_ids: Sequence[str]) -> None:
        """Forget these, where they are not done."""
        try:
            for request_id in request_ids:
                request = self._requests.pop(request_id, None)
                if request is None or self._broken_by:
                    continue
                self.engine.cancel(request_id)
                if request.prompt.items:
                    self.transfer.forget(request_id)
        except BaseException as error:
            self._broken_by = f"{type(error).__name__} while others were given up"
            raise

    def step(self) -> None:
        """One step for all that is under way. What is raised on the way ends all of it: a step that was interrupted
        may have left anything behind, so engine and transfer begin anew."""
        if self._mend():
            return  # nothing is under way any more
        try:
            self._steps.turn(self._on_events, self._check_transfer)
        except BaseException as error:
            self._begin_anew(f"{type(error).__name__} in a step for it and others")
            raise

    def _check_transfer(self) -> None:
        """DisaggError if something waits for images or clips that nobody brings."""
        if self.transfer.is_dead and any(request.prompt.items for request in self._requests.values()):
            raise DisaggError(_IS_DEAD)

    def _on_events(self, events: list[EngineEvent]) -> None:
        told = []
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None:
                continue  # the same step brought the token that completed its stop string
            if request.prompt.items and not isinstance(event, Tokens):
                told.append(event)
            ended = self._handle(event, request)
            if ended is not None:
                request.done(ended)  # before it is forgotten: an interrupt in between must not lose it
                del self._requests[event.request_id]
                if request.prompt.items and isinstance(event, Tokens):
                    self.transfer.forget(event.request_id)
        if told:
            self.transfer.events(told)

    def _handle(self, event: EngineEvent, request: _Request) -> Ended | DisaggError | None:
        match event:
            case Tokens():
                return self._tokens(event, request)
            case RequestFailed():
                return event.failure.error()
            case Finished():
                request.emit(request.parts.finish())
                return request.end(event.finish_reason, event.timings, event.vector)
        return None

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
