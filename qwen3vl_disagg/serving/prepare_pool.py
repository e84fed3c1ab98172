"""The parent's end of preparing children: large bodies go in, prompts come out."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import msgspec
import numpy as np

from qwen3vl_disagg.core.errors import DisaggError, PreparationFailed, UnavailableError
from qwen3vl_disagg.core.failure import Failure
from qwen3vl_disagg.media.child_process import ChildFailed, ChildProcess
from qwen3vl_disagg.media.decoder import MediaDecoder
from qwen3vl_disagg.media.stop import Stop
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.serving.prepared import (
    BodyJob,
    ChildReply,
    ChildSetup,
    Made,
    MadeRequest,
    NotMade,
    Prepared,
    Probed,
    ProbeWanted,
    Rules,
)

_START_S = 120.0
"""It imports much, and the cores may be busy."""
_FOREVER_S = 1e9
_MAX_IDLE = 2
_SLICE_S = 0.1
"""As long is waited before a Stop is looked at again."""
_REPLIES = msgspec.msgpack.Decoder(ChildReply)


class PreparePool:
    """Children that make prompts, as many at a time as there are callers. Thread-safe.

    One that was killed is replaced in the background: the next request finds a child that is ready.
    """

    def __init__(self, processor: Processor, rules: Rules) -> None:
        setup = ChildSetup(folder=str(processor.folder), video_outer_wrapper=processor.video_outer_wrapper, rules=rules)
        module = ("-P", "-B", "-m", "qwen3vl_disagg.serving.prepare_child")
        self._command = (sys.executable, *module, msgspec.json.encode(setup).decode())
        self._decoder: MediaDecoder = processor.decoder
        self._lock = threading.Lock()
        self._idle: list[ChildProcess] = []
        # A child dies with the thread that started it: this one lives as long as the process.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="prepare-start")

    def warm_up(self) -> None:
        """Start a child in the background."""
        self._starter.submit(self._start_idle)

    def prepare(self, body: bytearray, stop: Stop) -> Prepared:
        """Empties `body` once it is not needed any more. What a child says is wrong; Stopped once `stop` is set, whose
        child is killed; PreparationFailed when it ends by itself, UnavailableError when none can be started."""
        started = time.monotonic()
        for is_last in (False, True):
            child = self._take(stop, must_be_new=is_last)
            is_sent = False
            try:
                child.send(BodyJob(len(body)), body, _FOREVER_S, stop)
                is_sent = True
                first = self._next(child, stop)
                body.clear()
                made = self._receive(child, first)
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
            request, prompt = made
            return Prepared(request.request, prompt, request.sampling, time.monotonic() - started)
        raise PreparationFailed

    def _next(self, child: ChildProcess, stop: Stop) -> Made | NotMade:
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
    def _receive(child: ChildProcess, reply: Made | NotMade) -> tuple[MadeRequest, Prompt] | Failure:
        if isinstance(reply, NotMade):
            return reply.failure
        head, token_ids, *media = [child.receive_bytes(size) for size in reply.sizes]
        request = msgspec.msgpack.decode(head, type=MadeRequest)
        return request, Prompt(np.frombuffer(token_ids, "<i4").tolist(), request.items, media)

    def _take(self, stop: Stop, *, must_be_new: bool) -> ChildProcess:
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
                Stop(), command=self._command, replies=_REPLIES, start_s=_START_S, errors_are_shown=True
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
