"""Body -> prompt: small ones on threads, large ones in children. What nobody waits for any more is given up, and its
memory freed."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np

from qwen3vl_disagg.core.errors import DeadlineError, DisaggError, Failure, PreparationFailed, UnavailableError
from qwen3vl_disagg.media.child import ChildFailed, ChildProcess
from qwen3vl_disagg.media.decoder import MediaDecoder
from qwen3vl_disagg.media.stop import Stopped, StopSignal
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.processing.messages import has_clips, is_data_uri
from qwen3vl_disagg.processing.processor import SMALL_CHARS
from qwen3vl_disagg.processing.template import strings_of
from qwen3vl_disagg.serving.body import BodyAccount, num_values
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.prepare import (
    BodyJob,
    ChildReply,
    ChildSetup,
    Made,
    MadeHead,
    NotMade,
    Parsed,
    Prepared,
    Probed,
    ProbeWanted,
    Rules,
    finish_request,
    read_request,
)

T = TypeVar("T")

_STRETCH = 2**20
SMALL_BODY = 2**20
SMALL_VALUES = 2**13
"""Parsed in this process: to look at so much, images in it included, takes the interpreter's lock for milliseconds. So
does tokenizing SMALL_CHARS of text."""
_START_S = 120.0
"""It imports much, and the cores may be busy."""
_FOREVER_S = 1e9
_MAX_IDLE = 2
_SLICE_S = 0.1
"""As long is waited before a StopSignal is looked at again."""
_REPLIES = msgspec.msgpack.Decoder(ChildReply)


class Preparation:
    """Clips may take long to look at, so they have threads of their own: nobody else waits for them.

    A processor that is not of a folder has no children.
    """

    def __init__(self, processor: Processor, rules: Rules, limits: Limits) -> None:
        self._processor, self._rules = processor, rules
        self._threads = ThreadPoolExecutor(limits.prepare_threads, thread_name_prefix="prepare")
        self._clip_threads = ThreadPoolExecutor(limits.clip_threads, thread_name_prefix="prepare-clips")
        self._large_threads = ThreadPoolExecutor(limits.large_threads, thread_name_prefix="prepare-large")
        self._pool = None if processor.folder is None else PreparePool(processor, rules)

    def warm_up(self) -> None:
        """Start a child in the background, so that the first large request does not wait for it."""
        if self._pool is not None:
            self._pool.warm_up()

    async def prepare(self, body: bytearray, account: BodyAccount, deadline: float) -> Prepared:
        """Empties `body`. InputError, MediaTimeout, PreparationFailed; DeadlineError when `time.monotonic()` reaches
        `deadline`.

        `account` is not given back while a thread has the body or what was read from it. When this ends, a thread that
        is looking at media is free within 0.3 s, and so is one that waits for a child, which is killed; parsing and
        tokenizing of small bodies go on to their end.
        """
        stop = StopSignal(deadline)
        try:
            async with asyncio.timeout(stop.seconds_left()):
                if self._pool is None or _is_small(body):
                    read = partial(self._read, body, stop)
                    made = await _on_thread(self._threads, read, body.clear, account, drop=_drop)
                    if isinstance(made, Prepared):
                        return made
                    if isinstance(made, Parsed):
                        finish = partial(self._finish, made, stop)
                        return await _on_thread(self._clip_threads, finish, made.raw.clear, account)
                    body = made
                # Escapes may hide the word. Then it is one of the large ones that waits for a clip.
                threads = self._clip_threads if await _speaks_of_clips(body) else self._large_threads
                return await _on_thread(threads, partial(self._in_child, body, stop), body.clear, account)
        except DisaggError:
            raise
        except (TimeoutError, Stopped):
            raise DeadlineError("making the prompt took longer than the request may") from None
        finally:
            stop.set()

    def _read(self, body: bytearray, stop: StopSignal) -> Prepared | Parsed | bytearray:
        """To the end, if there are no clips in it; the body again if it has much text."""
        stop.check()
        parsed = read_request(body, self._rules)
        if self._pool is not None and _num_chars(parsed.raw) > SMALL_CHARS:
            return bytearray(body)
        return parsed if has_clips(parsed.raw["messages"]) else self._finish(parsed, stop)

    def _finish(self, parsed: Parsed, stop: StopSignal) -> Prepared:
        stop.check()
        return finish_request(parsed, self._processor, self._rules, stop)

    def _in_child(self, body: bytearray, stop: StopSignal) -> Prepared:
        stop.check()
        if self._pool is None:
            raise RuntimeError("there are no children")
        return self._pool.prepare(body, stop)


def _drop(made: Prepared | Parsed | bytearray) -> None:
    if isinstance(made, Parsed):
        made.raw.clear()


def _is_small(body: bytearray) -> bool:
    return len(body) <= SMALL_BODY and num_values(body) <= SMALL_VALUES


async def _speaks_of_clips(body: bytearray) -> bool:
    """Looks at a stretch at a time: to search all of a large body takes up to 0.2 s, in which no heartbeat would go."""
    word = b"video"
    for start in range(0, len(body), _STRETCH):
        if body.find(word, start, start + _STRETCH + len(word) - 1) >= 0:
            return True
        await asyncio.sleep(0)
    return False


def _num_chars(raw: Any) -> int:
    """Of all that may become text."""
    return sum(len(text) for text in strings_of(raw) if not is_data_uri(text))


async def _on_thread(
    threads: ThreadPoolExecutor,
    work: Callable[[], T],
    free: Callable[[], None],
    account: BodyAccount,
    drop: Callable[[T], None] = lambda _: None,
) -> T:
    """`work()` on one of the threads. `free` is called, and `account` let go, as soon as no thread will need them: when
    the work has ended, or when it is given up before a thread took it. (The executor keeps what was given up until a
    thread comes by.) `drop`: frees a result that came too late."""
    job = threads.submit(work)
    account.hold()

    def let_go(_: Future[T]) -> None:
        free()
        account.let_go()

    job.add_done_callback(let_go)
    try:
        return await asyncio.wrap_future(job)  # whose cancellation is the job's
    except asyncio.CancelledError:
        job.add_done_callback(lambda late: None if late.cancelled() or late.exception() else drop(late.result()))
        raise


class PreparePool:
    """Children that make prompts, as many at a time as there are callers. Thread-safe.

    One that was killed is replaced in the background: the next request finds a child that is ready.
    """

    def __init__(self, processor: Processor, rules: Rules) -> None:
        setup = ChildSetup(
            folder=str(processor.folder),
            video_outer_wrapper=processor.video_outer_wrapper,
            max_model_len=processor.max_model_len,
            rules=rules,
        )
        module = ("-P", "-B", "-m", "qwen3vl_disagg.serving.prepare")
        self._command = (sys.executable, *module, msgspec.json.encode(setup).decode())
        self._decoder: MediaDecoder = processor.decoder
        self._lock = threading.Lock()
        self._idle: list[ChildProcess] = []
        # A child dies with the thread that started it: this one lives as long as the process.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="prepare-start")

    def warm_up(self) -> None:
        """Start a child in the background."""
        self._starter.submit(self._start_idle)

    def prepare(self, body: bytearray, stop: StopSignal) -> Prepared:
        """Empties `body` once it is not needed any more. What a child says is wrong; Stopped once `stop` is set, whose
        child is killed; PreparationFailed when it ends by itself, UnavailableError when none can be started."""
        started = time.monotonic()
        for is_last in (False, True):
            child = self._take(stop, must_be_new=is_last)
            is_sent = False
            try:
                child.send(BodyJob(len(body)), body, _FOREVER_S, stop)
                is_sent = True
                reply = self._next(child, stop)
                body.clear()
                made = reply.failure if isinstance(reply, NotMade) else self._receive(child, reply.sizes, started)
            except BaseException as error:
                child.close()
                self.warm_up()
                if not isinstance(error, ChildFailed):
                    raise
                if is_sent or is_last:
                    raise PreparationFailed from error
                # It had ended before this request.
                continue
            self._give_back(child)
            if isinstance(made, Failure):
                raise made.error()
            return made
        raise PreparationFailed

    def _next(self, child: ChildProcess, stop: StopSignal) -> Made | NotMade:
        """The answer; questions before it are answered."""
        while True:
            reply = child.receive()
            if isinstance(reply, (Made, NotMade)):
                return reply
            if not isinstance(reply, ProbeWanted):
                raise ChildFailed("nonsense")
            data = child.receive_bytes(reply.num_bytes)
            try:
                probed = Probed(info=self._decoder.probe_video(data, stop=stop))
            except DisaggError as error:
                probed = Probed(failure=Failure.of(error))
            child.send(probed, b"", _FOREVER_S, stop)

    @staticmethod
    def _receive(child: ChildProcess, sizes: list[int], started: float) -> Prepared:
        head, token_ids, *media = [child.receive_bytes(size) for size in sizes]
        request, sampling, items = msgspec.msgpack.decode(head, type=MadeHead)
        prompt = Prompt(np.frombuffer(token_ids, "<i4").tolist(), items, media)
        return Prepared(request, prompt, sampling, time.monotonic() - started)

    def _take(self, stop: StopSignal, *, must_be_new: bool) -> ChildProcess:
        with self._lock:
            if self._idle and not must_be_new:
                return self._idle.pop()
        starting = self._starter.submit(self._start)
        try:
            while not wait([starting], timeout=_SLICE_S).done:
                stop.check()
        except BaseException:
            starting.add_done_callback(self._keep)
            raise
        return starting.result()

    def _start(self) -> ChildProcess:
        try:
            return ChildProcess(
                StopSignal(), command=self._command, replies=_REPLIES, start_s=_START_S, errors_are_shown=True
            )
        except (OSError, ChildFailed) as error:
            raise UnavailableError("no process for large requests can be started") from error

    def _start_idle(self) -> None:
        with self._lock:
            is_wanted = not self._idle
        if is_wanted:
            with suppress(UnavailableError):  # then the first request says it
                self._give_back(self._start())

    def _keep(self, starting: Future[ChildProcess]) -> None:
        """What nobody waits for any more."""
        if not starting.exception():
            self._give_back(starting.result())

    def _give_back(self, child: ChildProcess) -> None:
        with self._lock:
            if len(self._idle) < _MAX_IDLE:
                self._idle.append(child)
                return
        child.close()
