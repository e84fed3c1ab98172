"""Which tokens a request's grammar lets come next: worked out on threads, beside the steps.

A grammar is compiled, and the first token's mask made, before its request is queued. Then, as soon as a token is
picked, a thread takes it in and makes the next one's mask, while the model computes that token's logits. A step that is
done before a mask is leaves that request out, if there is anything else to do: it comes with a later step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotReady
from importlib.util import find_spec

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.engine.masks import Compiler, Mask, TokenMatcher
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.processing.tokenizer import Tokenizer

PATIENCE_S = 0.01
"""How long a step waits for masks, all of them together."""
_COMPILERS, _MAX_WORKERS = 2, 4


def no_grammars(param: str) -> InputError:
    problem = "structured output needs llguidance, which is not installed here"
    return InputError(problem, param=param, code="not_installed")


def has_grammars() -> bool:
    return find_spec("llguidance") is not None


class AnswerMasks:
    """The masks of one answer, one for each of its tokens: `take` one, then `advance` with the token.

    `starting`: of all answers of a request, the first mask and a matcher for each; `number`: which is this one's.
    `wanted`: those of them that are not dropped.
    """

    def __init__(
        self,
        threads: ThreadPoolExecutor,
        starting: Future[tuple[list[TokenMatcher], Mask]],
        number: int,
        wanted: set[int],
    ) -> None:
        self._threads, self._starting, self._number, self._wanted = threads, starting, number, wanted
        self._pending: Future[Mask] | None = None
        self._is_late = False

    @property
    def is_started(self) -> bool:
        """The first mask is there, or an error in its place."""
        return self._starting.done()

    @property
    def is_late(self) -> bool:
        """A step went without this request, and its mask is still not there."""
        return self._is_late and self._pending is not None and not self._pending.done()

    def on_started(self, call: Callable[[], None]) -> None:
        """`call`, on some thread, as soon as `is_started`."""
        self._starting.add_done_callback(lambda _: call())

    def begin(self) -> None:
        """Once `is_started`. Raises what went wrong."""
        self._pending = Future()
        self._pending.set_result(self._starting.result(0)[1])

    def take(self, deadline: float | None, on_ready: Callable[[], None]) -> Mask | None:
        """The next token's; None if it is not there when `time.monotonic()` reaches `deadline`, then `on_ready` is
        called when it is. InputError when the grammar takes more work than it may."""
        if self._pending is None:
            raise RuntimeError("a mask before the first one is made")
        try:
            mask = self._pending.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except NotReady:
            self._is_late = True
            self._pending.add_done_callback(lambda _: on_ready())
            return None
        self._is_late = False
        return mask

    def advance(self, token_id: int) -> None:
        self._pending = self._threads.submit(self._next, token_id)

    def drop(self) -> None:
        """Its answer is not wanted any more."""
        self._wanted.discard(self._number)
        if not self._wanted:
            self._starting.cancel()
        if self._pending is not None:
            self._pending.cancel()

    def _next(self, token_id: int) -> Mask:
        matcher = self._starting.result(0)[0][self._number]
        matcher.consume(token_id)
        return matcher.mask()


class Grammars:
    """Threads for the grammars of an engine's requests. `make` makes the compiler, at `warm_up` or when the first one
    comes."""

    def __init__(self, make: Callable[[], Compiler]) -> None:
        self._make = make
        self._making: Future[Compiler] | None = None
        self._compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="grammar-compile")
        self._threads = ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1), thread_name_prefix="grammar-mask")

    @classmethod
    def of(
        cls, read_tokenizer: Callable[[], Tokenizer], config: ModelConfig, eos_ids: frozenset[int]
    ) -> Grammars | None:
        """None where llguidance is not installed. The tokenizer is read when the compiler is made."""
        if not has_grammars():
            return None

        def make() -> Compiler:
            from qwen3vl_disagg.engine.llguidance_matcher import LlguidanceCompiler

            banned = (config.image_token_id, config.video_token_id)
            return LlguidanceCompiler(read_tokenizer(), config.text.vocab_size, eos_ids=eos_ids, banned_ids=banned)

        return cls(make)

    def warm_up(self) -> Future[Compiler]:
        """Make the compiler on a thread. Of 150,000 tokens it takes the interpreter's lock for most of a second."""
        if self._making is None:
            self._making = self._compilers.submit(self._make)
        return self._making

    def start(self, grammar: Grammar, prompt_ids: Sequence[int], count: int = 1) -> list[AnswerMasks]:
        """Compile a grammar on a thread, and make its first mask, once for `count` answers."""
        making = self.warm_up()

        def begin() -> tuple[list[TokenMatcher], Mask]:
            matcher = making.result()(grammar, prompt_ids)
            mask = matcher.mask()
            return [matcher, *(matcher.copy() for _ in range(count - 1))], mask

        starting, wanted = self._compilers.submit(begin), set(range(count))
        return [AnswerMasks(self._threads, starting, number, wanted) for number in range(count)]
