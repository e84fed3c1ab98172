"""The sampler's filters on their own, for tests."""

from __future__ import annotations

import torch

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.sampler import weigh
from qwen3vl_disagg.engine.sampling import SamplingPlan, SamplingRow


def settings_of(plan: SamplingPlan) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in plan.settings.items()}


def weights_of_rows(logits_BV: torch.Tensor, *rows: SamplingParams) -> torch.Tensor:
    """What each token weighs after temperature, top-k, top-p and min-p."""
    plan = SamplingPlan.of([SamplingRow(row, 0) for row in rows], vocab_size=logits_BV.shape[1], eos_ids=[])
    return weigh(logits_BV.float(), settings_of(plan), plan)


def weights(logits_BV: torch.Tensor, **params) -> torch.Tensor:
    """The same for all rows; temperature 1 unless given."""
    row = SamplingParams(**{"temperature": 1.0, **params})
    return weights_of_rows(logits_BV, *[row] * len(logits_BV))


def shares(logits_BV: torch.Tensor, **params) -> torch.Tensor:
    """The same as probabilities, float64."""
    found = weights(logits_BV, **params).double()
    return found / found.sum(-1, keepdim=True)


def kept(logits_BV: torch.Tensor, **params) -> list[list[int]]:
    """The tokens that can be picked."""
    return [row.nonzero().flatten().tolist() for row in weights(logits_BV, **params)]
