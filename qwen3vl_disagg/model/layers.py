"""The small parts that decoder layers share: RMSNorm, linear layers, and the dense SwiGLU MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen3vl_disagg.kernels.ops import MAX_LINEAR_ROWS


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim: statistics in float32, weight applied after the cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Linear(nn.Linear):
    """Without bias; few rows go through the kernel that reads the weight as it is, where there is one."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.use_kernel = False

    def forward(self, x: Tensor) -> Tensor:
        if self.use_kernel and x.shape[0] <= MAX_LINEAR_ROWS:
            return torch.ops.q3vl.linear(x, self.weight)
        return F.linear(x, self.weight)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
