"""What a sampling step has to do, decided on the host from numbers and lists: no logits here.

Each request brings its own random numbers, one for each token, computed from its seed and the token's number. There is
no generator whose state could depend on the batch, or get lost when a request is preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from qwen3vl_disagg.core.requests import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM: dividing by them would overflow."""
MAX_BIAS = 100.0
_GAMMA, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def splitmix64(state: int) -> int:
    """The output for one state of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection of 64-bit numbers."""
    z = (state + _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of a request's token `index`, a multiple of 2**-53.

    The seed is mixed once before the index is counted on: the streams of neighbouring seeds are no shifted copies.
    """
    return (splitmix64((splitmix64(seed & _MASK) + index * _GAMMA) & _MASK) >> 11) * 2.0**-53


class _Counts:
    """How often each token occurs in a list that only grows; only what is new is looked at."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._num_counted = 0

    def of(self, token_ids: Sequence[int]) -> dict[int, int]:
        for token_id in token_ids[self._num_counted :]:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        self._num_counted = len(token_ids)
        return self._counts


@dataclass(frozen=True)
class SamplingRow:
    """One request as the sampler sees it. Keep it as long as the request: `generated` may be the list that grows."""

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int] = ()
    generated: Sequence[int] = ()

    @property
    def index(self) -> int:
        """The number of the token to be sampled, from 0."""
        return len(self.generated)

    @cached_property
    def _prompt_set(self) -> frozenset[int]:
        return frozenset(self.prompt_ids)

    @cached_property
    def _counts(self) -> _Counts:
        return _Counts()

    def edits(self, eos_ids: Sequence[int]) -> Iterator[tuple[int, float, float, float]]:
        """(token id, bias, repetition, minus), each id once: its logit x becomes y - minus, where with x + bias for x
        y = x / repetition if x is positive, else x * repetition.

        Repetition as in transformers (over prompt and output), presence and frequency as OpenAI's (over the output).
        """
        params = self.params
        bias = {i: min(max(value, -MAX_BIAS), MAX_BIAS) for i, value in params.logit_bias.items()}
        if params.ignore_eos or self.index < params.min_tokens:
            bias |= dict.fromkeys(eos_ids, float("-inf"))
        repeats = params.repetition_penalty != 1
        counts: dict[int, int] = {}
        if repeats or params.presence_penalty or params.frequency_penalty:
            counts = self._counts.of(self.generated)
        prompt: frozenset[int] = self._prompt_set if repeats else frozenset()
        for token_id in bias.keys() | counts.keys() | prompt:
            count = counts.get(token_id, 0)
            yield (
                token_id,
                bias.get(token_id, 0.0),
                params.repetition_penalty if count or token_id in prompt else 1.0,
                params.frequency_penalty * count + (params.presence_penalty if count else 0.0),
            )


@dataclass(frozen=True)
class Plan:
    """What to do with logits `[B, V]`. The columns are what goes to the device."""

    num_rows: int
    edits: tuple[list[float], ...]
    """Place of each edited logit (b * V + token id), bias, repetition, minus."""
    picked: list[int]
    """Rows that are sampled; the others are greedy."""
    settings: tuple[list[float], ...]
    """Of each sampled row: temperature, top_k (0: off), top_p, min_p, its random number."""
    num_sorted: int
    """How many of the largest logits top-k and top-p need in order; 0: none."""
    has_top_p: bool
    has_min_p: bool
    told: list[int]
    """Rows that want logprobs, and how many of the most likely tokens each."""
    num_top: list[int]

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], *, vocab_size: int, eos_ids: Sequence[int]) -> Plan:
        edits: tuple[list[float], ...] = ([], [], [], [])
        settings: tuple[list[float], ...] = ([], [], [], [], [])
        picked, told, num_top, num_sorted = [], [], [], 0
        has_top_p = has_min_p = False
        for b, row in enumerate(rows):
            params = row.params
            for token_id, *change in row.edits(eos_ids):
                _append(edits, b * vocab_size + token_id, *change)
            if params.logprobs is not None:
                told.append(b)
                num_top.append(min(params.logprobs, vocab_size))
            if params.temperature < GREEDY_BELOW:
                continue
            top_k = params.top_k if 0 < params.top_k < vocab_size else 0
            picked.append(b)
            u = uniform(row.seed, row.index)
            _append(settings, params.temperature, top_k, params.top_p, params.min_p, u)
            num_sorted = max(num_sorted, top_k or (vocab_size if params.top_p < 1 else 0))
            has_top_p, has_min_p = has_top_p or params.top_p < 1, has_min_p or params.min_p > 0
        return cls(len(rows), edits, picked, settings, num_sorted, has_top_p, has_min_p, told, num_top)


def _append(columns: tuple[list[float], ...], *values: float) -> None:
    for column, value in zip(columns, values, strict=True):
        column.append(value)
