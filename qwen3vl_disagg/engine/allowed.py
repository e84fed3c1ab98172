"""Which tokens a request itself lets come: `allowed_token_ids`, and none that completes one of `bad_words`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.sampling_params import SamplingParams
from qwen3vl_disagg.engine.masks import Mask


class AllowedTokens:
    """Of one request, for all of its answers, whose bad words are ids. What a step costs depends on how many lengths
    these have, not on their number."""

    def __init__(
        self, params: SamplingParams, *, vocab_size: int, banned_ids: Sequence[int], eos_ids: Sequence[int]
    ) -> None:
        self._behind: dict[tuple[int, ...], list[int]] = {}
        """What came last -> what may not come behind it."""
        for word in params.bad_words:
            if isinstance(word, str):
                raise ValueError(f"the bad word {word!r} is not told by its ids")
            *before, last = word
            self._behind.setdefault(tuple(before), []).append(last)
        named = params.allowed_token_ids
        self._always = _bits(named, vocab_size)
        self._always &= ~_bits([*banned_ids, *self._behind.pop((), [])], vocab_size)
        self._ends = _bits(eos_ids, vocab_size)
        self._lengths = sorted({len(before) for before in self._behind})
        self._given = ["allowed_token_ids"] * (named is not None) + ["bad_words"] * bool(params.bad_words)

    def mask(self, generated: Sequence[int], grammar: Mask | None) -> Mask:
        """What may come behind `generated`, of what the grammar lets come; its ends where nothing else may. InputError
        where nothing may come at all."""
        bits = self._always.copy() if grammar is None else self._always & grammar.bits[: len(self._always)]
        for length in self._lengths:
            for token_id in self._behind.get(tuple(generated[-length:]), ()):
                bits[token_id // 8] &= ~np.uint8(1 << token_id % 8)
        if grammar is not None and not bits.any():
            bits = self._ends & grammar.bits[: len(self._ends)]
        if not bits.any():
            given = [*self._given, "the grammar"] if grammar is not None else self._given
            problem = f"{' and '.join(given)} let no token come"
            raise InputError(problem, param=self._given[0], code="no_token_left")
        return Mask(bits)


def _bits(token_ids: Sequence[int] | None, vocab_size: int) -> np.ndarray:
    """A mask's, as long as the vocabulary needs; None: all of it."""
    places = np.zeros(vocab_size + 7 & -8, np.uint8)
    if token_ids is None:
        places[:vocab_size] = 1
    else:
        places[list(token_ids)] = 1
    return np.packbits(places, bitorder="little")
