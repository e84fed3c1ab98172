"""Body -> prompt, on threads. What nobody waits for any more is given up, and its memory freed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from qwen3vl_disagg.core.errors import DeadlineError, DisaggError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.media.stop import Stop, Stopped
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.processing.messages import has_clips
from qwen3vl_disagg.serving.body import BodyAccount, parse_json
from qwen3vl_disagg.serving.chat_request import ChatRequest, parse_chat_request
from qwen3vl_disagg.serving.limits import Limits

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A checked request. `seconds` of work went into it."""

    request: ChatRequest
    prompt: Prompt
    sampling: SamplingParams
    seconds: float


@dataclass(frozen=True)
class _Parsed:
    """A request whose messages, in `raw`, have not been looked at."""

    raw: dict[str, Any]
    tools: list[dict[str, Any]]
    request: ChatRequest
    seconds: float


class Preparation:
    """Clips may take long to look at, so they have threads of their own: nobody else waits for them."""

    def __init__(self, processor: Processor, *, model_name: str, limits: Limits) -> None:
        self._processor, self._model_name = processor, model_name
        self._threads = ThreadPoolExecutor(limits.prepare_threads, thread_name_prefix="prepare")
        self._clip_threads = ThreadPoolExecutor(limits.clip_threads, thread_name_prefix="prepare-clips")

    async def prepare(self, body: bytearray, account: BodyAccount, deadline: float) -> Prepared:
        """Empties `body`. InputError, MediaTimeout; DeadlineError when `time.monotonic()` reaches `deadline`.

        `account` is not given back while a thread has the body or what was read from it. A thread that is looking at
        media when this ends is free within 0.3 s; parsing and tokenizing go on to their end.
        """
        stop = Stop(deadline)
        try:
            async with asyncio.timeout(stop.seconds_left()):
                made = await _on_thread(self._threads, partial(self._read, body, stop), body.clear, account)
                if isinstance(made, Prepared):
                    return made
                finish = partial(self._finish, made, stop)
                return await _on_thread(self._clip_threads, finish, made.raw.clear, account)
        except DisaggError:
            raise
        except (TimeoutError, Stopped):
            raise DeadlineError("making the prompt took longer than the request may") from None
        finally:
            stop.set()

    def _read(self, body: bytearray, stop: Stop) -> Prepared | _Parsed:
        """To the end, if there are no clips in it."""
        stop.check()
        started = time.monotonic()
        raw = parse_json(body)
        request, tools = parse_chat_request(raw, model_name=self._model_name)
        parsed = _Parsed(raw, tools, request, time.monotonic() - started)
        return parsed if has_clips(raw["messages"]) else self._finish(parsed, stop)

    def _finish(self, parsed: _Parsed, stop: Stop) -> Prepared:
        stop.check()
        started, request = time.monotonic(), parsed.request
        prompt = self._processor.prepare(parsed.raw["messages"], tools=parsed.tools, options=request.prompt, stop=stop)
        text = self._processor.config.text
        sampling = request.sampling(
            self._processor.generation,
            num_prompt=len(prompt.token_ids),
            context=text.max_position_embeddings,
            vocab_size=text.vocab_size,
        )
        return Prepared(request, prompt, sampling, parsed.seconds + time.monotonic() - started)


async def _on_thread(
    threads: ThreadPoolExecutor, work: Callable[[], T], free: Callable[[], None], account: BodyAccount
) -> T:
    """`work()` on one of the threads. `free` is called, and `account` let go, as soon as no thread will need them: when
    the work has ended, or when it is given up before a thread took it. (The executor keeps what was given up until a
    thread comes by.)"""
    job = threads.submit(work)
    account.hold()

    def let_go(_: Future[T]) -> None:
        free()
        account.let_go()

    job.add_done_callback(let_go)
    return await asyncio.wrap_future(job)  # whose cancellation is the job's
