"""The sampler as its definition says, one row at a time, from lists, in the order of the table of options.

`engine/sampler.py` must equal it bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen3vl_disagg.core.sampling_params import ORDER, Step
from qwen3vl_disagg.engine.sampling import GREEDY_BELOW, MAX_BIAS, SamplingRow, uniform

ONE = 2**40


def single(value: float) -> Tensor:
    """Rounded to float32 once."""
    return torch.tensor(value, dtype=torch.float64).float()


@dataclass
class Draw:
    """One token that is being drawn."""

    row: SamplingRow
    logits: Tensor
    banned: Sequence[int]
    eos_ids: Sequence[int]
    weights: list[int] = field(default_factory=list)
    """From `temperature` on: whole numbers, `ONE` for the most likely token, 0 for what is removed."""

    @property
    def order(self) -> list[int]:
        """Tokens by their logits, equal ones by id."""
        values = self.logits.tolist()
        return sorted(range(len(values)), key=lambda i: (-values[i], i))


def bias(draw: Draw) -> None:
    for i, value in draw.row.params.logit_bias.items():
        draw.logits[i] += single(min(max(value, -MAX_BIAS), MAX_BIAS))


def penalties(draw: Draw) -> None:
    params, counts, prompt = draw.row.params, Counter(draw.row.generated), set(draw.row.prompt_ids)
    for i in {*counts, *prompt}:
        x = draw.logits[i]
        x = x / single(params.repetition_penalty) if x > 0 else x * single(params.repetition_penalty)
        x = x - single(params.frequency_penalty * counts[i] + (params.presence_penalty if counts[i] else 0.0))
        draw.logits[i] = x


def bans(draw: Draw) -> None:
    params, generated = draw.row.params, list(draw.row.generated)
    ends = draw.eos_ids if params.ignore_eos or len(generated) < params.min_tokens else ()
    if len(generated) < params.min_tokens:
        ends = (*ends, *params.stop_token_ids)
    others = set(range(len(draw.logits))).difference(params.allowed_token_ids or range(len(draw.logits)))
    for *before, last in params.bad_words:
        if [None, *generated][-len(before) :] == before or not before:
            others.add(last)
    for i in (*draw.banned, *ends, *others):
        draw.logits[i] = float("-inf")


def temperature(draw: Draw) -> int | None:
    params, best = draw.row.params, draw.logits.max()
    if params.temperature < GREEDY_BELOW:
        return int(draw.logits.argmax())
    draw.weights = ((((draw.logits - best) / single(params.temperature)).exp()) * ONE).long().tolist()
    return None


def top_k(draw: Draw) -> None:
    count, values = draw.row.params.top_k, draw.logits.tolist()
    if 0 < count < len(values):
        kth = values[draw.order[count - 1]]
        draw.weights = [weight if value >= kth else 0 for weight, value in zip(draw.weights, values, strict=True)]


def top_p(draw: Draw) -> None:
    share = draw.row.params.top_p
    if share < 1:
        enough, before = int((torch.tensor(sum(draw.weights), dtype=torch.float64) * share).ceil()), 0
        for rank, i in enumerate(draw.order):
            weight = draw.weights[i]
            draw.weights[i] = weight if rank == 0 or before < enough else 0
            before += weight


def min_p(draw: Draw) -> None:
    least = int(torch.tensor(draw.row.params.min_p * ONE, dtype=torch.float64).ceil())
    draw.weights = [weight if weight >= least else 0 for weight in draw.weights]


def pick(draw: Draw) -> int:
    total = sum(draw.weights)
    number = torch.tensor(uniform(draw.row.seed, len(draw.row.generated)), dtype=torch.float64)
    point, reached = min(int(number * total), total - 1), 0
    for i, weight in enumerate(draw.weights):
        reached += weight
        if reached > point:
            return i
    raise AssertionError("the weights do not reach their sum")


STEPS: dict[Step, Callable[[Draw], int | None]] = {
    "bias": bias,
    "penalties": penalties,
    "bans": bans,
    "temperature": temperature,
    "top-k": top_k,
    "top-p": top_p,
    "min-p": min_p,
    "draw": pick,
}
"""All of the sampler's but `logprobs`, which changes nothing."""
SAMPLERS = ORDER[ORDER.index("logprobs") + 1 : ORDER.index("draw") + 1]


def next_token(logits_V: Tensor, row: SamplingRow, banned: Sequence[int], eos_ids: Sequence[int]) -> int:
    """The token that comes next."""
    draw = Draw(row, logits_V.float().clone(), banned, eos_ids)
    for step in SAMPLERS:
        token_id = STEPS[step](draw)
        if token_id is not None:
            return token_id
    raise AssertionError("no step has drawn")
