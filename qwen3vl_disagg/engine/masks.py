"""What a grammar says of one answer: which tokens may come next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qwen3vl_disagg.core.grammar import Grammar


@dataclass(frozen=True, eq=False)
class Mask:
    """Which tokens may come, at least one: bit i % 8 of byte i // 8 of `bits`, uint8, for token i."""

    bits: np.ndarray

    def lets_other_than(self, token_ids: Iterable[int]) -> bool:
        """Whether something may come that is none of these."""
        bits = np.unpackbits(self.bits, bitorder="little")
        bits[list(token_ids)] = 0
        return bool(bits.any())


class TokenMatcher(Protocol):
    """One answer against its grammar. InputError when that takes more work than it may; then it is of no use."""

    def mask(self) -> Mask: ...

    def consume(self, token_id: int) -> None: ...

    def copy(self) -> TokenMatcher:
        """For another answer, which goes on from here."""


Compiler = Callable[[Grammar, Sequence[int]], TokenMatcher]
"""(a grammar, the prompt's ids) -> a matcher for the answer. InputError for a grammar that is wrong or too large.
Called by several threads at once."""
