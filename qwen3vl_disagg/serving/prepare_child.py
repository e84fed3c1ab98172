"""Large bodies -> prompts, in children: both ends of their pipes.

A child gets bodies from standard input and writes prompts to standard output. It may take all its time: no other
request, no heartbeat and no client waits for the lock that it holds while a library works through megabytes of text.
It is killed when its request has ended, and with its parent.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.cluster.slots import die_with_parent
from qwen3vl_disagg.core.errors import DisaggError, Failure, PreparationFailed, UnavailableError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.logs import start_logging
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.core.settings import Task
from qwen3vl_disagg.engine.grammars import has_grammars
from qwen3vl_disagg.media import sandbox
from qwen3vl_disagg.media.child import (
    LENGTH_BYTES,
    ChildFailed,
    ChildProcess,
    Ready,
    body_length,
    is_wanted,
    pack,
    read_exactly,
    write_all,
)
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.media.video import VideoInfo
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.processing.messages import MediaUrl, put_fetched, urls_in
from qwen3vl_disagg.serving.known_grammars import takes_too_long
from qwen3vl_disagg.serving.limits import MAX_BODY_BYTES
from qwen3vl_disagg.serving.preparation import Fetch
from qwen3vl_disagg.serving.prepared import BodyRoute, Prepared, Request, Rules, finish_request, read_request

logger = logging.getLogger(__name__)
NICENESS = 10
"""Ranks that decode on the same cores go first."""
MAX_MEMORY = 3 * 2**29
"""On top of what it has when it is ready: 64 MiB of base64 beside an emoji, or 8 Mi characters of one word."""
_START_S = 120.0
"""It imports much, and the cores may be busy."""
_FOREVER_S = 1e9
_MAX_IDLE = 2
URLS_AT_ONCE = 64
"""Of MAX_URL_CHARS each they fit into one header."""
GRAMMAR_S = 20.0
"""How long a grammar may take to be checked, by the clock."""
_TOO_MUCH = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
"""What ends a check that took all its memory."""
_IDLE_S = 0.2
"""Without a job for so long, a child makes its vocabulary for grammars."""
_SLICE_S = 0.1
"""As long is waited before a StopSignal is looked at again."""


# -- what they say


class ChildSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is started with."""

    folder: str
    video_outer_wrapper: bool
    max_model_len: int
    task: Task
    fetches: bool
    """Whether URLs are asked for."""
    rules: Rules


class BodyJob(msgspec.Struct, frozen=True, tag="body"):
    """Followed by a body of `num_bytes`."""

    num_bytes: int
    route: BodyRoute


class GrammarJob(msgspec.Struct, frozen=True, tag="grammar"):
    """Is it a good one? Answered by `Ready` when the check begins, then by `Checked`."""

    grammar: Grammar
    in_reasoning: bool
    cpu_s: float


class Checked(msgspec.Struct, frozen=True, tag="checked"):
    failure: Failure | None = None
    is_whole: bool = True
    """It did not need more CPU time than it might take."""


class ProbeWanted(msgspec.Struct, frozen=True, tag="probe"):
    """Followed by a clip of `num_bytes`: only the parent has decoders. It answers with `Probed`."""

    num_bytes: int


class Probed(msgspec.Struct, frozen=True):
    info: VideoInfo | None = None
    failure: Failure | None = None


class FetchWanted(msgspec.Struct, frozen=True, tag="fetch"):
    """Only the parent may reach out. It answers with `Fetched`."""

    urls: list[MediaUrl]


class Fetched(msgspec.Struct, frozen=True):
    """Of one URL, in their order; followed by its bytes. A failure ends all."""

    size: int
    failure: Failure | None = None


class Made(msgspec.Struct, frozen=True, tag="made"):
    """Followed by as many bytes: a `MadeHead`, the prompts' token ids as int32, and the bytes of each item, of equal
    ones once."""

    sizes: list[int]


MadeHead = tuple[Request, list[tuple[int, SamplingParams, list[VisualItem]]]]
"""Of each prompt, how many token ids it has, how it is answered, and its items."""


class NotMade(msgspec.Struct, frozen=True, tag="not made"):
    failure: Failure


ChildJob = BodyJob | GrammarJob
ChildReply = Ready | ProbeWanted | FetchWanted | Made | NotMade | Checked
_REPLIES = msgspec.msgpack.Decoder(ChildReply)


# -- the parent's end


class PreparePool:
    """Children that make prompts, as many at a time as there are callers. Thread-safe.

    One that was killed is replaced in the background: the next request finds a child that is ready.
    """

    def __init__(self, processor: Processor, rules: Rules, *, fetches: bool = False) -> None:
        setup = ChildSetup(
            folder=str(processor.folder),
            video_outer_wrapper=processor.video_outer_wrapper,
            max_model_len=processor.max_model_len,
            task=processor.task,
            fetches=fetches,
            rules=rules,
        )
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

    def prepare(self, body: bytearray, stop: StopSignal, fetch: Fetch | None, route: BodyRoute) -> Prepared:
        """Empties `body` once it is not needed any more. What a child says is wrong; Stopped once `stop` is set, whose
        child is killed; PreparationFailed when it ends by itself, UnavailableError when none can be started."""
        started = time.monotonic()
        for is_last in (False, True):
            child = self._take(stop, must_be_new=is_last)
            is_sent = False
            try:
                child.send(BodyJob(len(body), route), body, _FOREVER_S, stop)
                is_sent = True
                reply = self._next(child, stop, fetch)
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

    def check_grammar(self, grammar: Grammar, *, cpu_s: float, in_reasoning: bool, stop: StopSignal) -> bool:
        """False where more CPU time is needed than `cpu_s`. InputError for a grammar that is wrong, or takes more than
        it may, of memory or by the clock; PreparationFailed when it could not be checked, or a new child does not begin
        either. Stopped once `stop` is set, whose child is killed unless the check has begun: that goes on to its end,
        and the child with its vocabulary stays."""
        for is_last in (False, True):
            child = self._take(stop, must_be_new=is_last)
            is_begun = False
            try:
                child.send(GrammarJob(grammar, in_reasoning, cpu_s), b"", _FOREVER_S, stop)
                if not isinstance(child.receive(), Ready):
                    raise ChildFailed("nonsense")
                is_begun = True
                child.patience_s, child.stop = GRAMMAR_S, StopSignal()
                checked = child.receive()
                if not isinstance(checked, Checked):
                    raise ChildFailed("nonsense")
            except BaseException as error:
                child.close()
                self.warm_up()
                if not isinstance(error, ChildFailed):
                    raise
                if is_begun and error.why == "slow":
                    raise takes_too_long() from None
                if is_begun or is_last:
                    raise PreparationFailed from error
                continue  # it had ended before this request
            self._give_back(child)
            if checked.failure is not None:
                raise checked.failure.error()
            return checked.is_whole
        raise PreparationFailed

    def _next(self, child: ChildProcess, stop: StopSignal, fetch: Fetch | None) -> Made | NotMade:
        """The answer; questions before it are answered."""
        while True:
            reply = child.receive()
            if isinstance(reply, (Made, NotMade)):
                return reply
            if isinstance(reply, FetchWanted) and fetch is not None:
                self._fetch(child, reply.urls, stop, fetch)
                continue
            if not isinstance(reply, ProbeWanted):
                raise ChildFailed("nonsense")
            data = child.receive_bytes(reply.num_bytes)
            try:
                probed = Probed(info=self._decoder.probe_video(data, stop=stop))
            except DisaggError as error:
                probed = Probed(failure=Failure.of(error))
            child.send(probed, b"", _FOREVER_S, stop)

    @staticmethod
    def _fetch(child: ChildProcess, urls: list[MediaUrl], stop: StopSignal, fetch: Fetch) -> None:
        try:
            found = fetch(urls)
        except DisaggError as error:
            child.send(Fetched(0, Failure.of(error)), b"", _FOREVER_S, stop)
            return
        for one in urls:
            child.send(Fetched(len(found[one.url])), found[one.url], _FOREVER_S, stop)

    @staticmethod
    def _receive(child: ChildProcess, sizes: list[int], started: float) -> Prepared:
        head, token_ids, *distinct = [child.receive_bytes(size) for size in sizes]
        request, prompts = msgspec.msgpack.decode(head, type=MadeHead)
        digests = dict.fromkeys(item.digest for _, _, items in prompts for item in items)
        by_digest = dict(zip(digests, distinct, strict=True))
        ids, made, start = np.frombuffer(token_ids, "<i4").tolist(), list[tuple[Prompt, SamplingParams]](), 0
        for length, sampling, items in prompts:
            media = [by_digest[item.digest] for item in items]
            made.append((Prompt(ids[start : start + length], items, media), sampling))
            start += length
        return Prepared(request, made, time.monotonic() - started)

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


# -- the child's end


class ParentsDecoder(MediaDecoder):
    """Asks the parent what a clip's file holds."""

    def __init__(self, out: int, parent: int) -> None:
        super().__init__()
        self._out, self._parent = out, parent

    def probe_video(self, data: bytes, *, stop: StopSignal | None = None) -> VideoInfo:
        write_all(self._out, pack(ProbeWanted(len(data))), self._parent)
        write_all(self._out, data, self._parent)
        probed = msgspec.msgpack.decode(_read_message(self._parent), type=Probed)
        if probed.failure is not None:
            raise probed.failure.error()
        if probed.info is None:
            raise EOFError
        return probed.info


def _read_message(parent: int) -> bytearray:
    """EOFError when the parent has closed or is gone."""
    if not is_wanted(parent, read=[0]):
        raise EOFError
    return read_exactly(0, body_length(read_exactly(0, LENGTH_BYTES)))


def fetched(urls: list[MediaUrl], out: int, parent: int) -> dict[str, bytes]:
    """What the parent fetches. What it says is wrong."""
    found = {}
    for start in range(0, len(urls), URLS_AT_ONCE):
        some = urls[start : start + URLS_AT_ONCE]
        write_all(out, pack(FetchWanted(some)), parent)
        for one in some:
            answer = msgspec.msgpack.decode(_read_message(parent), type=Fetched)
            if answer.failure is not None:
                raise answer.failure.error()
            found[one.url] = bytes(read_exactly(0, answer.size))
    return found


def reply(prepared: Prepared) -> list[bytes]:
    """A header and what follows it: of media that are equal one."""
    distinct: dict[str, bytes] = {}
    for prompt, _ in prepared.prompts:
        for item, data in zip(prompt.items, prompt.media, strict=True):
            distinct.setdefault(item.digest, data)
    prompts = [(len(prompt.token_ids), sampling, prompt.items) for prompt, sampling in prepared.prompts]
    parts = [
        msgspec.msgpack.encode((prepared.request, prompts)),
        np.concatenate([np.asarray(prompt.token_ids, dtype="<i4") for prompt, _ in prepared.prompts]).tobytes(),
        *distinct.values(),
    ]
    return [pack(Made([len(part) for part in parts])), *parts]


def answer(
    body: bytearray, route: BodyRoute, processor: Processor, setup: ChildSetup, out: int, parent: int
) -> list[bytes]:
    """What `reply` makes of a good request, or why there is none."""
    try:
        parsed = read_request(body, setup.rules, route)
        body.clear()
        messages = parsed.messages
        if setup.fetches and (urls := urls_in(messages)):
            put_fetched(messages, fetched(urls, out, parent))
        return reply(finish_request(parsed, processor, setup.rules, StopSignal()))
    except DisaggError as error:
        return [pack(NotMade(Failure.of(error)))]
    except (EOFError, BrokenPipeError):
        raise
    except Exception:
        logger.exception("a request could not be prepared")
        return [pack(NotMade(Failure.of(PreparationFailed())))]


def make_check(processor: Processor) -> Callable[[Grammar, bool], None]:
    from qwen3vl_disagg.serving.grammar_check import GrammarCheck

    return GrammarCheck(processor)


def check_grammar(job: GrammarJob, check: Callable[[Grammar, bool], None]) -> Checked:
    """In a fork, which more CPU time or memory than it may have ends: this process, and its vocabulary, stay."""
    reader, writer = os.pipe()
    this = os.getpid()
    try:
        pid = os.fork()
    except OSError:  # no process more, or no memory
        logger.exception("no grammar can be checked")
        os.close(reader)
        os.close(writer)
        return Checked(Failure.of(PreparationFailed()))
    if pid == 0:
        try:
            die_with_parent(this)
            sandbox.start_nothing()
            sandbox.allow_cpu(job.cpu_s)
            os.write(writer, msgspec.msgpack.encode(_checked(job, check)))  # less than a pipe takes at once
        except BaseException:
            logger.exception("a grammar could not be checked")
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        verdict = pipe.read()
    _, status = os.waitpid(pid, 0)
    if verdict:
        return msgspec.msgpack.decode(verdict, type=Checked)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if ended_by == signal.SIGPROF:
        return Checked(is_whole=False)
    return Checked(Failure.of(takes_too_long() if ended_by in _TOO_MUCH else PreparationFailed()))


def _checked(job: GrammarJob, check: Callable[[Grammar, bool], None]) -> Checked:
    try:
        check(job.grammar, job.in_reasoning)
    except MemoryError:
        return Checked(Failure.of(takes_too_long()))
    except DisaggError as error:
        return Checked(Failure.of(error))
    return Checked()


def main() -> None:
    start_logging("prompts")
    parent = os.getppid()
    die_with_parent(parent)
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    os.set_blocking(out, False)
    setup = msgspec.json.decode(sys.argv[1], type=ChildSetup)
    folder = Path(setup.folder)
    processor = Processor.from_folder(
        folder,
        read_config(folder),
        decoder=ParentsDecoder(out, parent),
        video_outer_wrapper=setup.video_outer_wrapper,
        max_model_len=setup.max_model_len,
        task=setup.task,
    )
    processor.tokenizer.num_tokens_at_least("ready")  # tables that are made on first use
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    sandbox.enter(pages * os.sysconf("SC_PAGE_SIZE") + MAX_MEMORY, may_fork=True)
    os.nice(NICENESS)
    check: Callable[[Grammar, bool], None] | None = None
    try:
        write_all(out, pack(Ready()), parent)
        while True:
            if check is None and has_grammars() and not select.select([0], [], [], _IDLE_S)[0]:
                check = make_check(processor)  # while nobody wants anything
            job = msgspec.msgpack.decode(_read_message(parent), type=ChildJob)
            if isinstance(job, GrammarJob):
                check = check or make_check(processor)
                write_all(out, pack(Ready()), parent)
                write_all(out, pack(check_grammar(job, check)), parent)
                continue
            if not 0 <= job.num_bytes <= MAX_BODY_BYTES:
                return
            for part in answer(read_exactly(0, job.num_bytes), job.route, processor, setup, out, parent):
                write_all(out, part, parent)
    except (EOFError, BrokenPipeError):
        return  # the parent closed


if __name__ == "__main__":
    main()
