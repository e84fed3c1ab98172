"""Verdicts on grammars: what was checked is not checked again, and what waits for a check is bounded."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec
from msgspec import structs

from qwen3vl_disagg.core.errors import Failure, InputError, OverloadedError
from qwen3vl_disagg.core.grammar import Grammar

MAX_KNOWN = 4096
"""Good ones, and as many bad ones."""
REFUSED_S = 60.0
"""So long a bad one is known: time that it took too much of may have been the machine's."""
MAX_WAITING = 64


class KnownGrammars:
    """Thread-safe. Grammars differ by whether an answer begins within reasoning, and not by where they were said."""

    def __init__(self) -> None:
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._refused: OrderedDict[bytes, tuple[float, Failure]] = OrderedDict()
        self._lock = threading.Lock()
        self._num_waiting = 0

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

    def queue(self) -> None:
        """One more waits for its check. OverloadedError for too many."""
        with self._lock:
            if self._num_waiting >= MAX_WAITING:
                raise OverloadedError("too many new grammars wait to be checked")
            self._num_waiting += 1

    def leave(self) -> None:
        with self._lock:
            self._num_waiting -= 1

    def check(self, grammar: Grammar, check: Callable[[Grammar], None], *, in_reasoning: bool) -> None:
        """What `check` raises; an InputError is remembered. It is not called where there is a verdict meanwhile."""
        if self.is_good(grammar, in_reasoning=in_reasoning):
            return
        digest = _digest(grammar, in_reasoning)
        try:
            check(structs.replace(grammar, param=""))
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


def _digest(grammar: Grammar, in_reasoning: bool) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode((structs.replace(grammar, param=""), in_reasoning))).digest()
