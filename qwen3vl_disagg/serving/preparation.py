"""Where bodies become prompts: on threads, large ones in children. What nobody waits for any more is given up, and its
memory freed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

from qwen3vl_disagg.core.errors import DeadlineError, DisaggError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.engine.grammars import has_grammars, no_grammars
from qwen3vl_disagg.media.stop import Stopped, StopSignal
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.processing.answer_grammar import begins_in_reasoning
from qwen3vl_disagg.processing.messages import MediaUrl, has_clips, is_data_uri, put_fetched, urls_in
from qwen3vl_disagg.processing.processor import SMALL_CHARS
from qwen3vl_disagg.processing.template import strings_of
from qwen3vl_disagg.serving.body import BodyAccount
from qwen3vl_disagg.serving.json_body import num_values
from qwen3vl_disagg.serving.known_grammars import CheckLine, KnownGrammars, digest_of
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.prepared import BodyRoute, Parsed, Prepared, Rules, finish_request, read_request

T = TypeVar("T")

_STRETCH = 2**20
SMALL_BODY = 2**20
SMALL_PROMPTS = 16
SMALL_VALUES = 2**13
"""Parsed in this process: to look at so much, images in it included, takes the interpreter's lock for milliseconds. So
does tokenizing SMALL_CHARS of text."""
SHORT_CHECK_S, MAX_SHORT_CHECKS = 0.2, 64
LONG_CHECK_S, MAX_LONG_CHECKS = 0.7, 3
"""How much CPU time a grammar's check may take in its first turn, which is enough for nearly all, and in its second;
and how many grammars wait for each, or have it."""


class Fetcher(Protocol):
    """Who gets what URLs name."""

    async def fetch(self, urls: Sequence[MediaUrl], account: BodyAccount, max_bytes: int) -> Mapping[str, bytes]:
        """URL -> its bytes, which `account` takes, `max_bytes` together at most.

        InputError naming the place of the first that cannot be had; OverloadedError.
        """


Fetch = Callable[[Sequence[MediaUrl]], Mapping[str, bytes]]
"""Blocks until it has what these name; Stopped, if that is over before."""


class Children(Protocol):
    """Where large bodies are prepared. Thread-safe."""

    def warm_up(self) -> None:
        """Start in the background, so that the first one does not wait for it."""

    def prepare(self, body: bytearray, stop: StopSignal, fetch: Fetch | None, route: BodyRoute) -> Prepared:
        """Empties `body`. InputError, PreparationFailed, UnavailableError; Stopped once `stop` is set."""

    def check_grammar(self, grammar: Grammar, *, cpu_s: float, in_reasoning: bool, stop: StopSignal) -> bool:
        """False where it needs more CPU time than `cpu_s`. InputError for one that ranks would refuse, or that takes
        too much; the others as above."""


class Preparation:
    """Clips may take long to look at, so they have threads of their own: nobody else waits for them.

    Without `children` bodies of any size are worked through here.
    """

    def __init__(
        self,
        processor: Processor,
        rules: Rules,
        limits: Limits,
        children: Children | None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self._processor, self._rules, self._fetcher = processor, rules, fetcher
        self._max_fetched = limits.max_body_bytes
        self._threads = ThreadPoolExecutor(limits.prepare_threads, thread_name_prefix="prepare")
        self._clip_threads = ThreadPoolExecutor(limits.clip_threads, thread_name_prefix="prepare-clips")
        self._large_threads = ThreadPoolExecutor(limits.large_threads, thread_name_prefix="prepare-large")
        self._known_grammars = KnownGrammars()
        self._check_lines = (
            CheckLine(SHORT_CHECK_S, limits.grammar_threads, MAX_SHORT_CHECKS),
            CheckLine(LONG_CHECK_S, 1, MAX_LONG_CHECKS),
        )
        self._children = children

    def warm_up(self) -> None:
        """Start a child in the background, so that the first large request does not wait for it."""
        if self._children is not None:
            self._children.warm_up()

    async def prepare(
        self, body: bytearray, account: BodyAccount, deadline: float, route: BodyRoute = "chat"
    ) -> Prepared:
        """Makes the prompt, and checks the grammar if there is one. Empties `body`. InputError, MediaTimeout,
        PreparationFailed; DeadlineError when `time.monotonic()` reaches `deadline`.

        `account` is not given back while a thread has the body or what was read from it. When this ends, a thread that
        is looking at media is free within 0.3 s, and so is one that waits for a child, which is killed; parsing and
        tokenizing of small bodies, and the check of a grammar that a child has, go on to their end.
        """
        stop = StopSignal(deadline)
        try:
            async with asyncio.timeout(stop.seconds_left()):
                prepared = await self._make(body, account, stop, route)
                if prepared.sampling.grammar is not None:
                    await self._check_grammar(prepared.sampling.grammar, prepared.prompt, account, stop)
                return prepared
        except DisaggError:
            raise
        except (TimeoutError, Stopped):
            raise DeadlineError("making the prompt took longer than the request may") from None
        finally:
            stop.set()

    async def _make(self, body: bytearray, account: BodyAccount, stop: StopSignal, route: BodyRoute) -> Prepared:
        if self._children is None or _is_small(body):
            read = partial(self._read, body, stop, route)
            made = await _on_thread(self._threads, read, body.clear, account, drop=_drop)
            if isinstance(made, Prepared):
                return made
            if isinstance(made, Parsed):
                messages = made.messages
                if self._fetcher is not None and (urls := urls_in(messages)):
                    put_fetched(messages, await self._fetcher.fetch(urls, account, self._max_fetched))
                threads = self._clip_threads if has_clips(messages) else self._threads
                finish = partial(self._finish, made, stop)
                return await _on_thread(threads, finish, made.clear, account)
            body = made
        # Escapes may hide the word. Then it is one of the large ones that waits for a clip.
        threads = self._clip_threads if await _speaks_of_clips(body) else self._large_threads
        work = partial(self._in_child, body, stop, self._blocking_fetch(account, stop), route)
        return await _on_thread(threads, work, body.clear, account)

    async def _check_grammar(self, grammar: Grammar, prompt: Prompt, account: BodyAccount, stop: StopSignal) -> None:
        """In a child, which can be killed: it may take long. Then it has another turn, in which only such wait for it,
        and has that alone from then on. Not again for one that is known."""
        if not has_grammars():
            raise no_grammars(grammar.param)
        in_reasoning = begins_in_reasoning(grammar, self._processor.tokenizer, prompt.token_ids)
        known = self._known_grammars
        if self._children is None or known.is_good(grammar, in_reasoning=in_reasoning):
            return
        digest = digest_of(grammar, in_reasoning)
        for line in self._check_lines[known.takes_long(digest) :]:
            line.enter(digest)
            in_child = partial(self._children.check_grammar, cpu_s=line.cpu_s, in_reasoning=in_reasoning, stop=stop)
            is_last = line is self._check_lines[-1]
            check = partial(known.check, grammar, in_child, in_reasoning=in_reasoning, is_last=is_last)
            if await _on_thread(line.threads, check, partial(line.leave, digest), account):
                return

    def _read(self, body: bytearray, stop: StopSignal, route: BodyRoute) -> Prepared | Parsed | bytearray:
        """To the end, if there are no clips and URLs in it; the body again if it has much text."""
        stop.check()
        parsed = read_request(body, self._rules, route)
        if self._children is not None and _is_much(parsed):
            return bytearray(body)
        messages = parsed.messages
        takes_long = has_clips(messages) or (self._fetcher is not None and urls_in(messages))
        return parsed if takes_long else self._finish(parsed, stop)

    def _finish(self, parsed: Parsed, stop: StopSignal) -> Prepared:
        stop.check()
        return finish_request(parsed, self._processor, self._rules, stop)

    def _in_child(self, body: bytearray, stop: StopSignal, fetch: Fetch | None, route: BodyRoute) -> Prepared:
        stop.check()
        if self._children is None:
            raise RuntimeError("there are no children")
        return self._children.prepare(body, stop, fetch, route)

    def _blocking_fetch(self, account: BodyAccount, stop: StopSignal) -> Fetch | None:
        """For a thread."""
        fetcher, loop = self._fetcher, asyncio.get_running_loop()
        if fetcher is None:
            return None

        left = self._max_fetched

        def fetch(urls: Sequence[MediaUrl]) -> Mapping[str, bytes]:
            nonlocal left
            work = asyncio.run_coroutine_threadsafe(fetcher.fetch(urls, account, left), loop)
            try:
                found = stop.result_of(work)
            finally:
                work.cancel()
            left -= sum(map(len, found.values()))
            return found

        return fetch


def _drop(made: Prepared | Parsed | bytearray) -> None:
    if isinstance(made, Parsed):
        made.clear()


def _is_much(parsed: Parsed) -> bool:
    """More than is made into prompts in a few milliseconds."""
    if parsed.pooled is None:
        return _num_chars(parsed.raw) > SMALL_CHARS
    return len(parsed.pooled.sizes) > SMALL_PROMPTS or _num_chars(parsed.pooled.messages) > SMALL_CHARS


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
