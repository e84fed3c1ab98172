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
from qwen3vl_disagg.encode.shared_gpu import SharedGpu
from qwen3vl_disagg.engine.engine import Engine, EngineEvent
from qwen3vl_disagg.language.engine_thread import Command, EngineSteps
from qwen3vl_disagg.llm.transfer import LocalTransfer
from qwen3vl_disagg.processing import AnswerParts, Parts, Prompt
from qwen3vl_disagg.protocol.messages import Finished, RequestFailed, Tokens

_IS_DEAD = "the thread that brings images and clips has ended"


@dataclass
class LocalAnswer:
    """One answer as it grows; `finish_reason` and `timings` are its own once it has ended."""

    parts: AnswerParts
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    timings: RequestTimings = field(default_factory=RequestTimings)
    """Up to its end as they were at the first token."""
    first_token_at: float = 0.0
    vector: bytes = b""
    """As in `Finished`."""


@dataclass(frozen=True)
class Ended:
    """All that came of a request."""

    prompt: Prompt
    answers: list[LocalAnswer]


@dataclass
class _Request:
    """A request under way. `emit` gets the first answer's text as it comes, `done` what becomes of it, once."""

    prompt: Prompt
    answers: list[LocalAnswer]
    emit: Callable[[Parts], None]
    done: Callable[[Ended | DisaggError], None]
    is_cut: bool = False
    """The engine was told to leave an answer at its stop string."""

    @property
    def media_bytes(self) -> int:
        return sum(map(len, self.prompt.media))


class LocalRequests:
    """`begin` requests and `step` until they are done. Whoever has begun one gives it up, if it is not done by then.

    Tokens stay on the thread that steps; the transfer's thread hears of requests with images or clips alone.
    """

    def __init__(
        self,
        engine: Engine,
        make_transfer: Callable[[Callable[[Command], None]], LocalTransfer],
        gpu: SharedGpu | None = None,
    ) -> None:
        """`make_transfer` is told where commands for the engine go. `gpu`: see `EngineSteps`."""
        self.engine, self._make_transfer, self._gpu = engine, make_transfer, gpu
        self._requests: dict[str, _Request] = {}
        self._num_begun = 0
        self._pid = os.getpid()
        self._broken_by = ""
        """Why all has to begin anew; "" for no reason."""
        self._renew()

    def _renew(self) -> None:
        steps = EngineSteps(self.engine)
        steps.gpu = self._gpu
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
        parts: Sequence[AnswerParts],
        sampling: SamplingParams,
        *,
        emit: Callable[[Parts], None],
        done: Callable[[Ended | DisaggError], None],
    ) -> str:
        """Queue a request; its name. `parts`: for each of its answers. InputError if it can never run, DisaggError for
        images or clips after a fork."""
        if prompt.items and self._is_forked:
            raise DisaggError("a forked process has no use of its parent's LLM for images and clips: make one there")
        self._mend()
        request_id = f"local-{self._num_begun}"
        self._num_begun += 1
        self._requests[request_id] = _Request(prompt, [LocalAnswer(one) for one in parts], emit, done)
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
            if isinstance(event, (Tokens, Finished)) and request.answers[event.sample].finish_reason:
                continue  # or that of this answer
            if request.prompt.items and not isinstance(event, Tokens):
                told.append(event)
            ended = self._handle(event, request)
            if ended is not None:
                request.done(ended)  # before it is forgotten: an interrupt in between must not lose it
                del self._requests[event.request_id]
                if request.prompt.items and request.is_cut:
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
                answer = request.answers[event.sample]
                self._emit(request, answer, answer.parts.finish())
                answer.finish_reason, answer.timings, answer.vector = event.finish_reason, event.timings, event.vector
                return self._ended(request)
        return None

    @staticmethod
    def _emit(request: _Request, answer: LocalAnswer, new: Parts) -> None:
        if answer is request.answers[0]:
            request.emit(new)

    @staticmethod
    def _ended(request: _Request) -> Ended | None:
        is_over = all(answer.finish_reason for answer in request.answers)
        return Ended(request.prompt, request.answers) if is_over else None

    def _tokens(self, event: Tokens, request: _Request) -> Ended | None:
        """Take tokens in; the end when one of them completes a stop string."""
        answer = request.answers[event.sample]
        if event.timings is not None:
            answer.timings, answer.first_token_at = event.timings, time.monotonic()
        for number, token_id in enumerate(event.token_ids):
            self._emit(request, answer, answer.parts.push(token_id))
            if event.logprobs:
                answer.logprobs.append(event.logprobs[number])
            if answer.parts.is_stopped:
                self.engine.cancel(event.request_id, event.sample)
                decode_ms = (time.monotonic() - answer.first_token_at) * 1e3
                answer.finish_reason = "stop"
                answer.timings = msgspec.structs.replace(answer.timings, decode=decode_ms)
                request.is_cut = True
                return self._ended(request)
        return None
