"""Vectors and scores of prompts, of the rows that prefill ends with.

Dims: P prompts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_disagg.core.pooling import Pooling
from qwen3vl_disagg.model.layers import Linear


@torch.inference_mode()
def pool(x_PD: Tensor, wanted: Sequence[Pooling], head: Linear) -> list[bytes | None]:
    """Of each prompt what is wanted, little-endian float32; None where that is not finite."""
    states = x_PD.float().cpu()  # of all at once: the one wait for the device
    pairs = {pooling.tokens for pooling in wanted if pooling.tokens is not None}
    axes = {pair: torch.sub(*head.rows(list(pair))).cpu() for pair in pairs}
    found: list[bytes | None] = []
    for state_D, pooling in zip(states, wanted, strict=True):
        if pooling.tokens is not None:
            value = (state_D @ axes[pooling.tokens])[None]
        else:
            value = F.normalize(state_D[: pooling.dimensions or None], dim=0)
        found.append(value.numpy().astype("<f4").tobytes() if value.isfinite().all() else None)
    return found
