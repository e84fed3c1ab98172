"""What a sampling step has to do, decided on the host from numbers and lists: no logits here.

Each request brings its own random numbers, one for each token, computed from its seed and the token's number. There is
no generator whose state could depend on the batch, or get lost when a request is preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from qwen3vl_disagg.core.sampling_params import DEFAULTS, OPTIONS, ORDER, SamplingParams
from qwen3vl_disagg.engine.masks import Mask

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM: dividing by them would overflow."""
MAX_BIAS = 100.0
FILTERS = [
    name for name, option in OPTIONS.items() if option.step in ORDER[ORDER.index("temperature") : ORDER.index("draw")]
]
"""Options that decide what a token weighs once logits are as they should be."""
FEW = 64
"""Looking for fewer of the largest logits than this is no cheaper."""
GREEDY_SETTINGS = (0.0, 0.0, 1.0, 0.0, 1.0, 0.0)
"""`few_settings` of a row that may end and is not drawn."""
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


def sample_seed(seed: int, number: int) -> int:
    """Of a request's answer `number`, from 0: what a request for it alone would have to ask for."""
    return (seed + number) % 2**63


@dataclass(frozen=True, eq=False)
class SamplingRow:
    """One request as the sampler sees it. Keep it as long as the request: `generated` may be the list that grows, and
    the sampler remembers what it has made of the prompt."""

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int] = ()
    generated: Sequence[int] = ()
    request: object | None = None
    """What the rows of a request have in common, if there may be others: what its options let come is kept for that."""

    @property
    def index(self) -> int:
        """The number of the token to be sampled, from 0."""
        return len(self.generated)

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before, or a bias, changes its logits."""
        params = self.params
        return bool(
            params.logit_bias or params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        )

    @property
    def is_narrowed(self) -> bool:
        """Whether it lets only some tokens come, beside its grammar."""
        return self.params.allowed_token_ids is not None or bool(self.params.bad_words)

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @cached_property
    def is_simple(self) -> bool:
        """Whether the logits stay as they are but for end tokens, whatever was said before, and only the token is
        told."""
        params = self.params
        return params.logprobs is None and not (
            self.has_penalties or self.is_narrowed or (params.min_tokens and params.stop_token_ids)
        )

    @cached_property
    def is_plain(self) -> bool:
        """Whether it takes the largest logit of those that may come, whatever was said before, and tells only that."""
        return self.is_greedy and self.is_simple

    @cached_property
    def needs_few(self) -> bool:
        """Whether it is simple, and the FEW largest logits are enough to say which tokens may be drawn."""
        params, settings = self.params, ("temperature", "top_k", "top_p")
        is_known = all(getattr(params, name) == DEFAULTS[name] for name in FILTERS if name not in settings)
        is_few = params.top_k <= FEW and (params.top_p >= 1 or params.top_k > 0)
        return self.is_simple and (self.is_greedy or (is_known and is_few))

    @property
    def bans_end(self) -> bool:
        """Whether no end token may come now."""
        return self.params.ignore_eos or self.index < self.params.min_tokens

    @property
    def few_settings(self) -> tuple[float, ...]:
        """What `Sampler.run_few` has to know of a row that needs few."""
        params = self.params
        if self.is_greedy:
            return float(self.bans_end), *GREEDY_SETTINGS[1:]
        drawn = (params.temperature, params.top_k, params.top_p, uniform(self.seed, self.index))
        return float(self.bans_end), 1.0, *drawn


@dataclass(frozen=True)
class SortedRows:
    """Rows of those that are sampled, whose top-k and top-p need about as many of the largest logits in order."""

    rows: list[int]
    """Among `SamplingPlan.picked`."""
    count: int
    """How many; the vocabulary's size for all of them."""
    has_top_p: bool


@dataclass(frozen=True)
class SamplingPlan:
    """What to do with logits `[B, V]`. Its size depends on the number of rows alone."""

    num_rows: int
    penalized: list[int]
    """Rows with penalties or a bias, and `requests`: whose they are."""
    requests: list[SamplingRow]
    bans: list[int]
    """Places (b * V + token id) of tokens that end an answer and may not come."""
    masked: list[int]
    """Rows of which only some tokens may come, and `masks`: which."""
    masks: list[Mask]
    picked: list[int]
    """Rows that are sampled; the others are greedy."""
    settings: dict[str, list[float]]
    """Of each sampled row what FILTERS are; a top_k of the whole vocabulary is 0."""
    is_on: frozenset[str]
    """Those of FILTERS that some sampled row asks for."""
    uniform: list[float]
    """Of each sampled row: its random number."""
    sorted: list[SortedRows]
    told: list[int]
    """Rows that want logprobs, and how many of the most likely tokens each."""
    num_top: list[int]

    @classmethod
    def of(
        cls,
        rows: Sequence[SamplingRow],
        *,
        vocab_size: int,
        eos_ids: Sequence[int],
        masks: Sequence[Mask | None] | None = None,
    ) -> SamplingPlan:
        """`masks`: for each row which tokens may come, None for all. Bans that leave none do not hold."""
        settings = {name: list[float]() for name in FILTERS}
        penalized, bans, picked, told, num_top = (list[int]() for _ in range(5))
        numbers = list[float]()
        by_size: dict[int, list[tuple[int, int, bool]]] = {}
        by_row = masks or [None] * len(rows)
        for b, (row, mask) in enumerate(zip(rows, by_row, strict=True)):
            params = row.params
            if row.has_penalties:
                penalized.append(b)
            banned = [*eos_ids] if row.bans_end else []
            if row.index < params.min_tokens:
                banned += params.stop_token_ids
            if banned and (mask is None or mask.lets_other_than(banned)):
                bans += [b * vocab_size + token_id for token_id in banned]
            if params.logprobs is not None:
                told.append(b)
                num_top.append(min(params.logprobs, vocab_size))
            if params.temperature < GREEDY_BELOW:
                continue
            for name, column in settings.items():
                column.append(getattr(params, name))
            settings["top_k"][-1] = top_k = params.top_k if 0 < params.top_k < vocab_size else 0
            numbers.append(uniform(row.seed, row.index))
            count = top_k or (vocab_size if params.top_p < 1 else 0)
            if count:
                # One row that needs many, or all, makes the others no dearer.
                by_size.setdefault(max(count, FEW).bit_length(), []).append((len(picked), count, params.top_p < 1))
            picked.append(b)
        return cls(
            num_rows=len(rows),
            penalized=penalized,
            requests=[rows[b] for b in penalized],
            bans=bans,
            masked=[b for b, mask in enumerate(by_row) if mask is not None],
            masks=[mask for mask in by_row if mask is not None],
            picked=picked,
            settings=settings,
            is_on=frozenset(name for name, column in settings.items() if any(v != DEFAULTS[name] for v in column)),
            uniform=numbers,
            sorted=[
                SortedRows([s for s, _, _ in group], max(n for _, n, _ in group), any(has for _, _, has in group))
                for group in by_size.values()
            ],
            told=told,
            num_top=num_top,
        )
