"""Body -> prompt: read under limits, parsed more strictly than JSON asks for, and made into a prompt, on threads; large
ones in children. What nobody waits for any more is given up, and its memory freed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import msgspec
from msgspec import structs
from starlette.types import Receive

from qwen3vl_disagg.core.errors import DeadlineError, DisaggError, InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.json_text import GivenTwice, unique
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.grammars import has_grammars, no_grammars
from qwen3vl_disagg.media.stop import Stopped, StopSignal
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.processing.answer_grammar import begins_in_reasoning
from qwen3vl_disagg.processing.json_values import check_json, too_deep
from qwen3vl_disagg.processing.messages import MediaUrl, has_clips, is_data_uri, put_fetched, urls_in
from qwen3vl_disagg.processing.processor import SMALL_CHARS
from qwen3vl_disagg.processing.template import strings_of
from qwen3vl_disagg.serving.body import BodyAccount, ClientGone, too_large
from qwen3vl_disagg.serving.chat_request import ChatRequest, check_model, parse_chat_request
from qwen3vl_disagg.serving.completion_request import (
    CompletionRequest,
    DetokenizeBody,
    DetokenizeRequest,
    TokenizeRequest,
    chat_part,
    convert,
    parse_completion,
    parse_tokenize,
    read_prompts,
)
from qwen3vl_disagg.serving.known_grammars import KnownGrammars
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.messages_request import MessagesRequest, parse_messages_request
from qwen3vl_disagg.serving.prompt_scores import check_num_scores
from qwen3vl_disagg.serving.response_request import ResponseRequest, parse_response

T = TypeVar("T")

# Objects, lists and their entries: each costs tens of bytes once parsed, whatever it took on the wire.
MAX_VALUES = 2**18
MAX_INT_CHARS = 21
"""Of a whole number below MAX_INT, with its sign."""
MAX_FLOAT_CHARS = 1024

_STRETCH = 2**20
_SLICE_S = 0.1
"""As long is waited before a StopSignal is looked at again."""
SMALL_BODY = 2**20
SMALL_VALUES = 2**13
"""Parsed in this process: to look at so much, images in it included, takes the interpreter's lock for milliseconds. So
does tokenizing SMALL_CHARS of text."""


async def read_body(receive: Receive, limits: Limits, account: BodyAccount) -> bytearray:
    """The whole body. The limit holds while it comes, whether or not its length was declared.

    InputError 408 (too slow), 413 (too large); OverloadedError; ClientGone.
    """
    body, is_whole = bytearray(), False
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while not is_whole:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk, is_whole = message.get("body", b""), not message.get("more_body", False)
                if len(body) + len(chunk) > limits.max_body_bytes:
                    raise too_large(limits)
                account.take(len(chunk))
                body += chunk
    except TimeoutError:
        raise InputError("the body came too slowly", status=408, code="body_timeout") from None
    return body


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object as Python values.

    InputError for anything that is not one, for NaN, infinite and very large numbers, keys that occur twice, depth
    over MAX_DEPTH, too many values, bytes that are not UTF-8, NUL and lone surrogates; `param` names the place. A byte
    order mark is skipped.
    """
    if num_values(body) > MAX_VALUES:
        raise InputError(f"the body has more than {MAX_VALUES} values", code="invalid_json")
    try:
        value = json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=unique,
            parse_constant=_constant,
            parse_int=_whole,
            parse_float=_number,
        )
    except GivenTwice as error:
        raise InputError("a key occurs twice in one object", param=error.name, code="invalid_json") from None
    except UnicodeDecodeError:
        raise InputError("the body is not valid UTF-8", code="invalid_json") from None
    except RecursionError:
        raise too_deep() from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"the body is not valid JSON ({place})", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InputError("the body must be a JSON object", code="invalid_json")
    check_json(value)
    return value


def _whole(digits: str) -> int | float:
    """Converting takes quadratic time in the digits: what has too many is infinite, and refused where it stands."""
    return int(digits) if len(digits) <= MAX_INT_CHARS else math.inf


def _number(digits: str) -> float:
    return float(digits) if len(digits) <= MAX_FLOAT_CHARS else math.inf


def num_values(body: bytes | bytearray) -> int:
    """At most so many objects, lists and entries are in it."""
    return sum(body.count(sign) for sign in (b"[", b"{", b","))


def _constant(name: str) -> None:
    raise InputError(f"{name} is not JSON", code="invalid_json")


BodyRoute = Literal["chat", "completion", "response", "messages", "count", "tokenize", "detokenize"]
Request = ChatRequest | CompletionRequest | ResponseRequest | MessagesRequest | TokenizeRequest | DetokenizeRequest


@dataclass(frozen=True)
class Prepared:
    """A checked request. `seconds` of work went into it. `more`: prompts beside the first, which have no media."""

    request: Request
    prompt: Prompt
    sampling: SamplingParams
    seconds: float
    more: list[tuple[Prompt, SamplingParams]] = field(default_factory=list)

    def salted(self, salt: str) -> Prepared:
        """The same request, which shares what is cached with those of the same `salt`, and the same of its own, alone;
        as it is where there is none."""
        if not salt:
            return self
        both = hashlib.sha256(f"{salt} {self.sampling.cache_salt}".encode()).hexdigest()
        items = [structs.replace(item, salt=both) for item in self.prompt.items]
        sampling = structs.replace(self.sampling, cache_salt=both)
        more = [(prompt, structs.replace(other, cache_salt=both)) for prompt, other in self.more]
        return replace(self, prompt=replace(self.prompt, items=items), sampling=sampling, more=more)


@dataclass(frozen=True)
class Parsed:
    """A request whose messages or prompts, in `raw`, have not been looked at. `chat`: how messages become a prompt."""

    raw: dict[str, Any]
    tools: list[dict[str, Any]]
    request: Request
    chat: ChatRequest | None
    seconds: float


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the server, not the request, says about prompts and answers."""

    model_names: list[str]
    """The first one stands in answers."""
    max_answer_tokens: int | None = None
    """Bound of an answer whose request names none. None: what is left of the context."""


def read_request(body: bytes | bytearray, rules: Rules, route: BodyRoute = "chat") -> Parsed:
    """InputError for what is no request of the route."""
    started, tools = time.monotonic(), list[dict[str, Any]]()
    raw, names = parse_json(body), rules.model_names
    request: Request
    chat = None
    match route:
        case "chat":
            chat, tools = parse_chat_request(raw, model_names=names)
            request = chat
        case "completion":
            request = parse_completion(raw, model_names=names)
        case "response":
            request, chat, tools, raw = parse_response(raw, model_names=names)
        case "messages" | "count":
            is_count = route == "count"
            request, chat, tools, raw = parse_messages_request(raw, model_names=names, is_count=is_count)
        case "tokenize":
            request = parse_tokenize(raw, model_names=names)
            if raw.get("messages") is not None:
                chat, tools = parse_chat_request(chat_part(raw), model_names=names)
        case "detokenize":
            check_model(convert(raw, DetokenizeBody).model, names)
            request = DetokenizeRequest()
    return Parsed(raw, tools, request, chat, time.monotonic() - started)


def finish_request(parsed: Parsed, processor: Processor, rules: Rules, stop: StopSignal) -> Prepared:
    """InputError for bad messages or prompts; Stopped once `stop` is set."""
    started, request = time.monotonic(), parsed.chat
    if request is None:
        made = _of_prompts(parsed, processor)
        return replace(made, seconds=parsed.seconds + time.monotonic() - started)
    prompt = processor.prepare(parsed.raw["messages"], tools=parsed.tools, options=request.prompt, stop=stop)
    sampling = request.sampling.params(
        processor,
        num_prompt=len(prompt.token_ids),
        cache_salt=request.prompt.cache_salt,
        grammar=request.grammar,
        max_answer_tokens=rules.max_answer_tokens,
    )
    check_num_scores([prompt.token_ids], sampling.prompt_logprobs, "prompt_logprobs")
    return Prepared(parsed.request, prompt, sampling, parsed.seconds + time.monotonic() - started)


def _of_prompts(parsed: Parsed, processor: Processor) -> Prepared:
    """Of texts and token ids."""
    request, size = parsed.request, processor.config.text.vocab_size
    if isinstance(request, CompletionRequest):
        prompts = read_prompts(parsed.raw["prompt"], processor)
        check_num_scores([prompt.token_ids for prompt in prompts], request.num_scores, "logprobs")
        sampled = [
            request.sampling.params(
                processor,
                num_prompt=len(prompt.token_ids),
                cache_salt=request.cache_salt,
                grammar=request.grammar,
            )
            for prompt in prompts
        ]
        (prompt, sampling), *more = zip(prompts, sampled, strict=True)
        return Prepared(request, prompt, sampling, 0.0, more)
    if isinstance(request, DetokenizeRequest):
        tokens = convert(parsed.raw, DetokenizeBody).tokens
        if max(tokens, default=0) >= size:
            raise InputError(f"tokens must be from 0 to {size - 1}", param="tokens")
        return Prepared(request, Prompt(tokens, [], []), SamplingParams(), 0.0)
    token_ids = processor.text_ids(parsed.raw["prompt"], "prompt")
    return Prepared(request, Prompt(token_ids, [], []), SamplingParams(), 0.0)


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

    def check_grammar(self, grammar: Grammar, *, in_reasoning: bool, stop: StopSignal) -> None:
        """InputError for one that ranks would refuse, or that takes too long; the others as above."""


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
        self._grammar_threads = ThreadPoolExecutor(limits.grammar_threads, thread_name_prefix="prepare-grammar")
        self._known_grammars = KnownGrammars()
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
        tokenizing of small bodies go on to their end.
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
                messages = made.raw["messages"]
                if self._fetcher is not None and (urls := urls_in(messages)):
                    put_fetched(messages, await self._fetcher.fetch(urls, account, self._max_fetched))
                threads = self._clip_threads if has_clips(messages) else self._threads
                finish = partial(self._finish, made, stop)
                return await _on_thread(threads, finish, made.raw.clear, account)
            body = made
        # Escapes may hide the word. Then it is one of the large ones that waits for a clip.
        threads = self._clip_threads if await _speaks_of_clips(body) else self._large_threads
        work = partial(self._in_child, body, stop, self._blocking_fetch(account, stop), route)
        return await _on_thread(threads, work, body.clear, account)

    async def _check_grammar(self, grammar: Grammar, prompt: Prompt, account: BodyAccount, stop: StopSignal) -> None:
        """In a child, which can be killed: it may take long. Not again for one that is known."""
        if not has_grammars():
            raise no_grammars(grammar.param)
        in_reasoning = begins_in_reasoning(grammar, self._processor.tokenizer, prompt.token_ids)
        known = self._known_grammars
        if self._children is None or known.is_good(grammar, in_reasoning=in_reasoning):
            return
        known.queue()
        in_child = partial(self._children.check_grammar, in_reasoning=in_reasoning, stop=stop)
        check = partial(known.check, grammar, in_child, in_reasoning=in_reasoning)
        await _on_thread(self._grammar_threads, check, known.leave, account)

    def _read(self, body: bytearray, stop: StopSignal, route: BodyRoute) -> Prepared | Parsed | bytearray:
        """To the end, if there are no clips and URLs in it; the body again if it has much text."""
        stop.check()
        parsed = read_request(body, self._rules, route)
        if self._children is not None and _num_chars(parsed.raw) > SMALL_CHARS:
            return bytearray(body)
        if parsed.chat is None:
            return self._finish(parsed, stop)
        messages = parsed.raw["messages"]
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
                while not wait([work], timeout=_SLICE_S).done:
                    stop.check()
                found = work.result()
            finally:
                work.cancel()
            left -= sum(map(len, found.values()))
            return found

        return fetch


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
