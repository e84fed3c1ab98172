"""The small parts that decoder layers share: RMSNorm, linear layers, and the dense SwiGLU MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen3vl_disagg.core.environment import KERNELS, variable
from qwen3vl_disagg.kernels import ops
from qwen3vl_disagg.kernels.ops import MAX_LINEAR_ROWS


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim: statistics in float32, weight applied after the cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.use_kernel = False

    def forward(self, x: Tensor) -> Tensor:
        if self.use_kernel and not torch.compiler.is_compiling():  # the compiler makes one kernel of it by itself
            return ops.rms_norm(x, self.weight, self.eps)
        if x.dtype == torch.float32:  # the same in one call
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)

    def of_sum(self, x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, Tensor]:
        """`x + y`, and the norm of that."""
        if self.use_kernel and not torch.compiler.is_compiling():
            return ops.add_rms_norm(x_TD, y_TD, self.weight, self.eps)
        x_TD = x_TD + y_TD
        return x_TD, self(x_TD)


class Linear(nn.Linear):
    """Few rows go through the kernel that reads the weight as it is, where there is one and no bias; many through the
    one for tiles, where the processor has them."""

    joined: Tensor | None
    """On the first of several layers of one input, the weight of all of them (`join`)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("joined", None, persistent=False)
        self.use_kernel = self.use_tiles = False

    def forward(self, x: Tensor) -> Tensor:
        if self.use_kernel and x.shape[0] <= MAX_LINEAR_ROWS:
            return ops.linear(x, [self.weight])
        if self.use_tiles and not torch.compiler.is_compiling():
            return ops.many_rows(x, [self.weight], self.bias)
        return F.linear(x, self.weight, self.bias)

    def rows(self, numbers: list[int]) -> Tensor:
        """These of the weight's, `[R, D]` float32."""
        return self.weight[numbers].float()


def project(x_TD: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Several layers of one input, without bias; those that a bfloat16 kernel runs in one call."""
    is_kernel = all(type(layer) is Linear and layer.use_kernel for layer in layers)
    is_tiles = all(type(layer) is Linear and layer.use_tiles and layer.bias is None for layer in layers)
    weights, sizes = [layer.weight for layer in layers], [layer.out_features for layer in layers]
    if is_kernel and x_TD.shape[0] <= MAX_LINEAR_ROWS:  # in this order: a look at the size is a graph more
        return ops.linear(x_TD, weights).split(sizes, dim=-1)
    if is_tiles and not torch.compiler.is_compiling():
        return ops.many_rows(x_TD, weights).split(sizes, dim=-1)
    if type(layers[0]) is Linear and layers[0].joined is not None:
        return F.linear(x_TD, layers[0].joined).split(sizes, dim=-1)
    return tuple(layer(x_TD) for layer in layers)


@torch.no_grad()
def join(*layers: Linear) -> None:
    """One weight for layers of one input that `project` runs: on CUDA, where each product is a launch. Each layer's own
    stays under its name and becomes a part of it; until then both are in memory. Nothing where one of them is quantized
    or has a bias, or with `Q3VL_KERNELS=off`."""
    if variable(KERNELS) == "off" or not all(type(layer) is Linear for layer in layers):
        return
    weights = [layer.weight for layer in layers]
    is_plain = all(layer.bias is None and layer.weight.dtype == weights[0].dtype for layer in layers)
    if not is_plain or any(weight.device.type != "cuda" for weight in weights):
        layers[0].joined = None
        return
    layers[0].joined = joined = torch.cat(weights)
    for layer, part in zip(layers, joined.split([len(weight) for weight in weights]), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.use_kernel = False

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = project(x_TD, self.gate_proj, self.up_proj)
        is_kernel = self.use_kernel and not torch.compiler.is_compiling()  # which fuses the two by itself
        return self.down_proj(ops.swiglu(gate, up) if is_kernel else F.silu(gate) * up)
