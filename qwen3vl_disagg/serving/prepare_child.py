"""Large bodies -> prompts, and grammars -> verdicts, in a child: its end of the pipes, and what is said on them.

A child gets jobs from standard input and writes answers to standard output. It may take all its time: no other
request, no heartbeat and no client waits for the lock that it holds while a library works through megabytes of text.
It is killed when the request for its prompt has ended, and with its parent, whose end is `prepare_pool.py`.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.cluster.slots import die_with_parent
from qwen3vl_disagg.core.errors import DisaggError, Failure, PreparationFailed
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.logs import LogFormat, start_logging, use_log_format
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.core.settings import Task
from qwen3vl_disagg.engine.grammars import has_grammars
from qwen3vl_disagg.media import sandbox
from qwen3vl_disagg.media.child import LENGTH_BYTES, Ready, body_length, is_wanted, pack, read_exactly, write_all
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.media.video import VideoInfo
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.processing.messages import MediaUrl, put_fetched, urls_in
from qwen3vl_disagg.serving.known_grammars import takes_too_long
from qwen3vl_disagg.serving.limits import MAX_BODY_BYTES
from qwen3vl_disagg.serving.prepared import BodyRoute, Prepared, Request, Rules, finish_request, read_request

logger = logging.getLogger(__name__)
NICENESS = 10
"""Ranks that decode on the same cores go first."""
MAX_MEMORY = 3 * 2**29
"""On top of what it has when it is ready: 64 MiB of base64 beside an emoji, or 8 Mi characters of one word."""
URLS_AT_ONCE = 64
"""Of MAX_URL_CHARS each they fit into one header."""
_TOO_MUCH = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
"""What ends a check that took all its memory."""
_IDLE_S = 0.2
"""Without a job for so long, a child makes its vocabulary for grammars."""


class ChildSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is started with."""

    folder: str
    video_outer_wrapper: bool
    max_model_len: int
    task: Task
    fetches: bool
    """Whether URLs are asked for."""
    rules: Rules
    log_format: LogFormat = "text"


class BodyJob(msgspec.Struct, frozen=True, tag="body"):
    """Followed by a body of `num_bytes`. Answered by `Ready` when all of it is there, then by `Made` or `NotMade`."""

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
    """What `reply` makes of a good request, or why there is none. Empties `body`."""
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
    finally:
        body.clear()


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
    setup = msgspec.json.decode(sys.argv[1], type=ChildSetup)
    use_log_format(setup.log_format)
    start_logging("prompts")
    parent = os.getppid()
    die_with_parent(parent)
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    os.set_blocking(out, False)
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
            body = read_exactly(0, job.num_bytes)
            write_all(out, pack(Ready()), parent)
            for part in answer(body, job.route, processor, setup, out, parent):
                write_all(out, part, parent)
    except (EOFError, BrokenPipeError):
        return  # the parent closed


if __name__ == "__main__":
    main()
