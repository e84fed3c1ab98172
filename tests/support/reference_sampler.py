"""The sampler as its definition says, one row at a time, from lists. `engine/sampler.py` must equal it bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3vl_disagg.engine.sampling import GREEDY_BELOW, MAX_BIAS, SamplingRow, uniform

ONE = 2**40


def changed_logits(logits_V: Tensor, row: SamplingRow, banned: Sequence[int], eos_ids: Sequence[int]) -> Tensor:
    """Bias, penalties and bans; each token by itself."""
    params, counts, prompt = row.params, Counter(row.generated), set(row.prompt_ids)
    out = logits_V.float().clone()

    def single(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64).float()

    bias = {i: min(max(value, -MAX_BIAS), MAX_BIAS) for i, value in params.logit_bias.items()}
    for i in {*bias, *counts, *prompt}:
        x = out[i] + single(bias.get(i, 0.0))
        if i in counts or i in prompt:
            x = x / single(params.repetition_penalty) if x > 0 else x * single(params.repetition_penalty)
        x = x - single(params.frequency_penalty * counts[i] + (params.presence_penalty if counts[i] else 0.0))
        out[i] = x
    ends = eos_ids if params.ignore_eos or len(row.generated) < params.min_tokens else ()
    for i in (*banned, *ends):
        out[i] = float("-inf")
    return out


def weights(logits_V: Tensor, row: SamplingRow) -> list[int]:
    """Whole numbers, `ONE` for the most likely token, 0 for what top-k, top-p or min-p remove."""
    params, size = row.params, len(logits_V)
    temperature = torch.tensor(params.temperature, dtype=torch.float64).float()
    found = ((((logits_V - logits_V.max()) / temperature).exp()) * ONE).long().tolist()
    values = logits_V.tolist()
    order = sorted(range(size), key=lambda i: (-values[i], i))
    if 0 < params.top_k < size:
        kth = values[order[params.top_k - 1]]
        found = [weight if value >= kth else 0 for weight, value in zip(found, values, strict=True)]
    if params.top_p < 1:
        enough, before = int((torch.tensor(sum(found), dtype=torch.float64) * params.top_p).ceil()), 0
        for rank, i in enumerate(order):
            weight, found[i] = found[i], found[i] if rank == 0 or before < enough else 0
            before += weight
    least = int(torch.tensor(params.min_p * ONE, dtype=torch.float64).ceil())
    return [weight if weight >= least else 0 for weight in found]


def next_token(logits_V: Tensor, row: SamplingRow, banned: Sequence[int], eos_ids: Sequence[int]) -> int:
    """The token that comes next."""
    masked = changed_logits(logits_V, row, banned, eos_ids)
    if row.params.temperature < GREEDY_BELOW:
        return int(masked.argmax())
    found = weights(masked, row)
    total = sum(found)
    point = min(int(torch.tensor(uniform(row.seed, len(row.generated)), dtype=torch.float64) * total), total - 1)
    reached = 0
    for i, weight in enumerate(found):
        reached += weight
        if reached > point:
            return i
    raise AssertionError("the weights do not reach their sum")
