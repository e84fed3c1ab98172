"""Verdicts on grammars: what was checked is not checked again, and what waits for a check is bounded."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
from msgspec import structs

from qwen3vl_disagg.core.errors import Failure, InputError, OverloadedError
from qwen3vl_disagg.core.grammar import Grammar

T = TypeVar("T")

MAX_KNOWN = 4096
"""Good ones, as many bad ones, and as many that take long."""
REFUSED_S = 60.0
"""So long a bad one is known: time that it took too much of may have been the machine's."""


def takes_too_long() -> InputError:
    return InputError("the grammar takes too long", code="grammar_too_complex")


class CheckLine:
    """Of grammars that wait for a check of up to `cpu_s` of CPU time, `num_threads` of which have it. Thread-safe."""

    def __init__(self, cpu_s: float, num_threads: int, max_waiting: int) -> None:
        self.cpu_s, self.max_waiting = cpu_s, max_waiting
        self.threads = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare-grammar")
        self._lock = threading.Lock()
        self._waiting = Counter[bytes]()

    def enter(self, digest: bytes) -> None:
        """One more waits for this grammar's check, or has it. OverloadedError for too many grammars: who waits for one
        that another waits for finds its verdict."""
        with self._lock:
            if digest not in self._waiting and len(self._waiting) >= self.max_waiting:
                raise OverloadedError("too many new grammars wait to be checked")
            self._waiting[digest] += 1

    def leave(self, digest: bytes) -> None:
        with self._lock:
            self._waiting[digest] -= 1
            if not self._waiting[digest]:
                del self._waiting[digest]


class KnownGrammars:
    """Thread-safe. Grammars differ by whether an answer begins within reasoning, and not by where they were said."""

    def __init__(self) -> None:
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._refused: OrderedDict[bytes, tuple[float, Failure]] = OrderedDict()
        self._long: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def is_good(self, grammar: Grammar, *, in_reasoning: bool) -> bool:
        """False for one that is not known. InputError for one that was refused."""
        digest = digest_of(grammar, in_reasoning)
        with self._lock:
            until, failure = self._refused.get(digest, (0.0, None))
            if digest in self._good:
                self._good.move_to_end(digest)
                return True
        if failure is not None and time.monotonic() < until:
            raise failure.error().at(grammar.param)
        return False

    def takes_long(self, digest: bytes) -> bool:
        """Its check has come to no end where it was not the last."""
        with self._lock:
            return digest in self._long

    def check(
        self, grammar: Grammar, check: Callable[[Grammar], bool], *, in_reasoning: bool, is_last: bool = True
    ) -> bool:
        """What `check` says or raises. An InputError is remembered, and so is that it came to no end, by False, which
        is an InputError where `is_last`. It is not called where that is known meanwhile."""
        if self.is_good(grammar, in_reasoning=in_reasoning):
            return True
        digest = digest_of(grammar, in_reasoning)
        if not is_last and self.takes_long(digest):
            return False
        try:
            if not check(structs.replace(grammar, param="")):
                if not is_last:
                    self._keep(self._long, digest, None)
                    return False
                raise takes_too_long()
        except InputError as error:
            self._keep(self._refused, digest, (time.monotonic() + REFUSED_S, Failure.of(error)))
            raise error.at(grammar.param) from None
        self._keep(self._good, digest, None)
        return True

    def _keep(self, known: OrderedDict[bytes, T], digest: bytes, what: T) -> None:
        with self._lock:
            known.pop(digest, None)
            known[digest] = what
            if len(known) > MAX_KNOWN:
                known.popitem(last=False)


def digest_of(grammar: Grammar, in_reasoning: bool) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode((structs.replace(grammar, param=""), in_reasoning))).digest()
