"""How far two results of one computation may be from one another, by what they were computed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Closeness:
    """`limit`: of a row's distance, in lengths of the row. `share`: of the rows that may be farther away."""

    limit: float
    share: float = 0.0

    @classmethod
    def of(
        cls, dtype: torch.dtype, *, is_quantized: bool = False, depth: int = 0, has_router: bool = False
    ) -> Closeness:
        """Of what `depth` layers computed: a multiple of what roundings make of it, and less than half of what a lost
        DeepStack level does. With a router half of the rows count, as a rounding may send a token to another expert.
        """
        if dtype == torch.float32 and not is_quantized:
            return cls(1e-3, 0.5 if has_router else 0.0)
        return cls(min(0.5, 0.2 + 0.01 * depth), 0.5)

    def distance(self, got: Tensor, expected: Tensor) -> float:
        """Of rows `[R, ..]`: that of the farthest, but for `share` of them. Infinite for numbers that are not finite,
        and for another shape."""
        got, expected = got.detach().float().cpu(), expected.detach().float().cpu()
        if got.shape != expected.shape or not bool(got.isfinite().all()):
            return math.inf
        if len(got) == 0:
            return 0.0
        apart_R = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp(min=1e-20)
        return float(apart_R.sort().values[math.ceil(len(got) * (1 - self.share)) - 1])

    def is_close(self, got: Tensor, expected: Tensor) -> bool:
        return self.distance(got, expected) <= self.limit
