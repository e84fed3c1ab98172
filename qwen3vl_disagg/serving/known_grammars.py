"""Verdicts on grammars: what was checked is not checked again, and what waits for a check is bounded."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
from msgspec import structs

from qwen3vl_disagg.core.errors import Failure, InputError, OverloadedError
from qwen3vl_disagg.core.grammar import Grammar

MAX_KNOWN = 4096
"""Good ones, and as many bad ones."""
REFUSED_S = 60.0
"""So long a bad one is known: time that it took too much of may have been the machine's."""


def takes_too_long() -> InputError:
    return InputError("the grammar takes too long", code="grammar_too_complex")


class CheckLine:
    """Of those who wait for a check of up to `cpu_s` of CPU time, `num_threads` of whom have it. Thread-safe."""

    def __init__(self, cpu_s: float, num_threads: int, max_waiting: int) -> None:
        self.cpu_s, self.max_waiting = cpu_s, max_waiting
        self.threads = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare-grammar")
        self._lock = threading.Lock()
        self._num_waiting = 0

    def enter(self) -> None:
        """One more waits for its check, or has it. OverloadedError for too many."""
        with self._lock:
            if self._num_waiting >= self.max_waiting:
                raise OverloadedError("too many new grammars wait to be checked")
            self._num_waiting += 1

    def leave(self) -> None:
        with self._lock:
            self._num_waiting -= 1


class KnownGrammars:
    """Thread-safe. Grammars differ by whether an answer begins within reasoning, and not by where they were said."""

    def __init__(self) -> None:
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._refused: OrderedDict[bytes, tuple[float, Failure]] = OrderedDict()
        self._lock = threading.Lock()

    def is_good(self, grammar: Grammar, *, in_reasoning: bool) -> bool:
        """False for one that is not known. InputError for one that was refused."""
        digest = _digest(grammar, in_reasoning)
        with self._lock:
            until, failure = self._refused.get(digest, (0.0, None))
            if digest in self._good:
                self._good.move_to_end(digest)
                return True
        if failure is not None and time.monotonic() < until:
            raise failure.error().at(grammar.param)
        return False

    def check(
        self, grammar: Grammar, check: Callable[[Grammar], bool], *, in_reasoning: bool, is_last: bool = True
    ) -> bool:
        """What `check` says or raises. An InputError is remembered, and so is that it came to no end, by False, where
        `is_last`; it is not called where there is a verdict meanwhile."""
        if self.is_good(grammar, in_reasoning=in_reasoning):
            return True
        digest = _digest(grammar, in_reasoning)
        try:
            if not check(structs.replace(grammar, param="")):
                if not is_last:
                    return False
                raise takes_too_long()
        except InputError as error:
            with self._lock:
                self._refused.pop(digest, None)
                self._refused[digest] = (time.monotonic() + REFUSED_S, Failure.of(error))
                if len(self._refused) > MAX_KNOWN:
                    self._refused.popitem(last=False)
            raise error.at(grammar.param) from None
        with self._lock:
            self._good[digest] = None
            if len(self._good) > MAX_KNOWN:
                self._good.popitem(last=False)
        return True


def _digest(grammar: Grammar, in_reasoning: bool) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode((structs.replace(grammar, param=""), in_reasoning))).digest()
