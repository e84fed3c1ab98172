"""Children that make prompts of large bodies and check grammars: the parent's end of their pipes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import msgspec
import numpy as np

from qwen3vl_disagg.core.errors import DisaggError, Failure, PreparationFailed, UnavailableError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.logs import log_format
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.media.child import ChildFailed, ChildProcess, Ready
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.processing.messages import MediaUrl
from qwen3vl_disagg.serving import prepare_child as said
from qwen3vl_disagg.serving.known_grammars import takes_too_long
from qwen3vl_disagg.serving.preparation import Fetch
from qwen3vl_disagg.serving.prepared import BodyRoute, Prepared, Rules

START_S = 120.0
"""It imports much, or takes over a large body, and the cores may be busy."""
GRAMMAR_START_S = 30.0
"""How long a child that is ready may take to begin with a grammar: it makes its vocabulary first."""
GRAMMAR_S = 20.0
"""How long a check may take by the clock."""
_FOREVER_S = 1e9
_MAX_IDLE = 2
_REPLIES = msgspec.msgpack.Decoder(said.ChildReply)


class PreparePool:
    """Children that make prompts, as many at a time as there are callers. Thread-safe.

    One that was killed is replaced in the background: the next request finds a child that is ready.
    """

    def __init__(self, processor: Processor, rules: Rules, *, fetches: bool = False) -> None:
        setup = said.ChildSetup(
            folder=str(processor.folder),
            video_outer_wrapper=processor.video_outer_wrapper,
            max_model_len=processor.max_model_len,
            task=processor.task,
            fetches=fetches,
            rules=rules,
            log_format=log_format(),
        )
        module = ("-P", "-B", "-m", "qwen3vl_disagg.serving.prepare_child")
        self._command = (sys.executable, *module, msgspec.json.encode(setup).decode())
        self._decoder = processor.decoder
        self._lock = threading.Lock()
        self._idle: list[ChildProcess] = []
        # A child dies with the thread that started it: this one lives as long as the process.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="prepare-start")

    def warm_up(self) -> None:
        """Start a child in the background."""
        self._starter.submit(self._start_idle)

    def prepare(self, body: bytearray, stop: StopSignal, fetch: Fetch | None, route: BodyRoute) -> Prepared:
        """Empties `body` once a child has it. What a child says is wrong; Stopped once `stop` is set, whose child is
        killed; PreparationFailed when it ends by itself, UnavailableError when none can be started."""
        started = time.monotonic()
        with self._begun(said.BodyJob(len(body), route), body, stop) as child:
            body.clear()
            reply = self._next(child, stop, fetch)
            made = reply.failure if isinstance(reply, said.NotMade) else self._receive(child, reply.sizes, started)
        if isinstance(made, Failure):
            raise made.error()
        return made

    def check_grammar(self, grammar: Grammar, *, cpu_s: float, in_reasoning: bool, stop: StopSignal) -> bool:
        """False where more CPU time is needed than `cpu_s`. InputError for a grammar that is wrong, or takes more than
        it may, of memory or by the clock; PreparationFailed when it could not be checked. Stopped if `stop` is set
        before a child has it: then the check goes on to its end, and the child with its vocabulary stays."""
        with self._begun(said.GrammarJob(grammar, in_reasoning, cpu_s), b"", stop) as child:
            child.patience_s = GRAMMAR_S
            try:
                checked = child.receive()
            except ChildFailed as error:
                if error.why == "slow":
                    raise takes_too_long() from error
                raise
            if not isinstance(checked, said.Checked):
                raise ChildFailed("nonsense")
        if checked.failure is not None:
            raise checked.failure.error()
        return checked.is_whole

    @contextmanager
    def _begun(self, job: said.ChildJob, body: bytes | bytearray, stop: StopSignal) -> Iterator[ChildProcess]:
        """A child that has begun with the job, for as long as the block runs. One that had ended before is replaced. Of
        a body `stop` ends the child; of a grammar only the wait for one. What goes wrong ends the child, and another is
        started; PreparationFailed where that is its fault."""
        child, until = self._take(stop), stop if isinstance(job, said.BodyJob) else StopSignal()
        try:
            try:
                self._begin(child, job, body, until)
            except ChildFailed:
                child.close()
                child = self._take(stop, must_be_new=True)
                self._begin(child, job, body, until)
            child.patience_s = _FOREVER_S
            yield child
        except BaseException as error:
            child.close()
            self.warm_up()
            if isinstance(error, ChildFailed):
                raise PreparationFailed from error
            raise
        self._give_back(child)

    @staticmethod
    def _begin(child: ChildProcess, job: said.ChildJob, body: bytes | bytearray, stop: StopSignal) -> None:
        child.send(job, body, START_S if isinstance(job, said.BodyJob) else GRAMMAR_START_S, stop)
        if not isinstance(child.receive(), Ready):
            raise ChildFailed("nonsense")

    def _next(self, child: ChildProcess, stop: StopSignal, fetch: Fetch | None) -> said.Made | said.NotMade:
        """The answer; questions before it are answered."""
        while True:
            reply = child.receive()
            if isinstance(reply, (said.Made, said.NotMade)):
                return reply
            if isinstance(reply, said.FetchWanted) and fetch is not None:
                self._fetch(child, reply.urls, stop, fetch)
                continue
            if not isinstance(reply, said.ProbeWanted):
                raise ChildFailed("nonsense")
            data = child.receive_bytes(reply.num_bytes)
            try:
                probed = said.Probed(info=self._decoder.probe_video(data, stop=stop))
            except DisaggError as error:
                probed = said.Probed(failure=Failure.of(error))
            child.send(probed, b"", _FOREVER_S, stop)

    @staticmethod
    def _fetch(child: ChildProcess, urls: list[MediaUrl], stop: StopSignal, fetch: Fetch) -> None:
        try:
            found = fetch(urls)
        except DisaggError as error:
            child.send(said.Fetched(0, Failure.of(error)), b"", _FOREVER_S, stop)
            return
        for one in urls:
            child.send(said.Fetched(len(found[one.url])), found[one.url], _FOREVER_S, stop)

    @staticmethod
    def _receive(child: ChildProcess, sizes: list[int], started: float) -> Prepared:
        head, token_ids, *distinct = [child.receive_bytes(size) for size in sizes]
        request, prompts = msgspec.msgpack.decode(head, type=said.MadeHead)
        digests = dict.fromkeys(item.digest for _, _, items in prompts for item in items)
        by_digest = dict(zip(digests, distinct, strict=True))
        ids, made, start = np.frombuffer(token_ids, "<i4").tolist(), list[tuple[Prompt, SamplingParams]](), 0
        for length, sampling, items in prompts:
            media = [by_digest[item.digest] for item in items]
            made.append((Prompt(ids[start : start + length], items, media), sampling))
            start += length
        return Prepared(request, made, time.monotonic() - started)

    def _take(self, stop: StopSignal, *, must_be_new: bool = False) -> ChildProcess:
        with self._lock:
            if self._idle and not must_be_new:
                return self._idle.pop()
        starting = self._starter.submit(self._start)
        try:
            return stop.result_of(starting)
        except BaseException:
            starting.add_done_callback(self._keep)
            raise

    def _start(self) -> ChildProcess:
        try:
            return ChildProcess(
                StopSignal(), command=self._command, replies=_REPLIES, start_s=START_S, errors_are_shown=True
            )
        except (OSError, ChildFailed) as error:
            raise UnavailableError("no process for large requests can be started") from error

    def _start_idle(self) -> None:
        with self._lock:
            is_wanted = len(self._idle) < _MAX_IDLE
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
