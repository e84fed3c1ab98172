"""Linear layers and experts whose weights are int8 or float8, with a float32 scale for each output channel (a row of a
weight).

Where there are kernels, they read int8 as it is. Elsewhere, and float8 anywhere, a weight is dequantized each time it
is used, of the experts those that a step uses: right, and slower than the bfloat16 it came from. Dims as in `moe.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen3vl_disagg.kernels import int8  # noqa: F401 - defines the operators
from qwen3vl_disagg.kernels.ops import MAX_LINEAR_ROWS
from qwen3vl_disagg.model.layers import Linear
from qwen3vl_disagg.model.moe import (
    Experts,
    run_experts_grouped,
    run_gathered,
    run_one_by_one,
    should_gather,
    takes_grouped_mm,
    used_experts,
)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight [.., D]` int8 or float8, `scale [..]` -> `[.., D]`; the product in float32, rounded once."""
    return weight.to(dtype).mul_(scale.unsqueeze(-1))


class QuantizedLinear(Linear):
    """`Linear` with `weight [N, D]` int8 or float8 and `weight_scale [N]`, to be filled; its rows are of `dtype`."""

    weight_scale: Tensor

    def __init__(self, linear: Linear, dtype: torch.dtype, weight_dtype: torch.dtype = torch.int8) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.use_kernel = linear.in_features, linear.out_features, False
        self.dtype = dtype
        _hold(self, "weight", linear.weight.shape, weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_kernel and x.shape[0] <= MAX_LINEAR_ROWS:
            return torch.ops.q3vl.linear_int8(x, self.weight, self.weight_scale)
        return F.linear(x, dequantize(self.weight, self.weight_scale, x.dtype))

    def rows(self, numbers: list[int]) -> Tensor:
        return dequantize(self.weight[numbers], self.weight_scale[numbers], torch.float32)


def run_experts_dequantized(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    gate_up_EGD: Tensor,
    gate_up_scale_EG: Tensor,
    down_EDF: Tensor,
    down_scale_ED: Tensor,
) -> Tensor:
    """As `run_experts_loop`: of the experts that have rows, one at a time is dequantized. Beyond the CPU all that a
    step can use at once, as it does not wait to know which these are."""
    num_experts, dtype, device = len(down_EDF), x_TD.dtype, x_TD.device.type

    def matrices(experts: int | Tensor) -> tuple[Tensor, Tensor]:
        gate_up = dequantize(gate_up_EGD[experts], gate_up_scale_EG[experts], dtype)
        return gate_up, dequantize(down_EDF[experts], down_scale_ED[experts], dtype)

    if device != "cpu" and num_experts and takes_grouped_mm(device, dtype, *down_EDF.shape[1:]):
        used_S, places_TK = used_experts(ids_TK, num_experts)
        return run_experts_grouped(x_TD, weights_TK, places_TK, *matrices(used_S))
    row_bytes = (gate_up_EGD[0].numel() + down_EDF[0].numel()) * dtype.itemsize if num_experts else 0
    if should_gather(device, ids_TK.numel(), row_bytes):
        return run_gathered(x_TD, weights_TK, ids_TK, num_experts, matrices)
    return run_one_by_one(x_TD, weights_TK, ids_TK, num_experts, matrices)


# Which experts have rows is nothing that the compiler could know.
_library = torch.library.Library("q3vl", "FRAGMENT")
_library.define(
    "experts_dequantized(Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
    "Tensor down_scale) -> Tensor"
)
_library.impl("experts_dequantized", run_experts_dequantized, "CompositeExplicitAutograd")


@torch.library.register_fake("q3vl::experts_dequantized")
def _(x_TD: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(x_TD)


class QuantizedExperts(Experts):
    """`Experts` with int8 or float8 weights, `gate_up_proj_scale [E, 2F]`, `down_proj_scale [E, D]`, to be filled."""

    weight_names = ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale")
    gate_up_proj_scale: Tensor
    down_proj_scale: Tensor

    def __init__(self, experts: Experts, dtype: torch.dtype, weight_dtype: torch.dtype = torch.int8) -> None:
        nn.Module.__init__(self)
        self.impl, self.dtype, self.dispatcher = "grouped", dtype, experts.dispatcher
        _hold(self, "gate_up_proj", experts.gate_up_proj.shape, weight_dtype)
        _hold(self, "down_proj", experts.down_proj.shape, weight_dtype)

    def run(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, *local_weights: Tensor) -> Tensor:
        if self.impl == "kernel":
            return torch.ops.q3vl.experts_int8(x_TD, weights_TK, ids_TK, *local_weights)
        return torch.ops.q3vl.experts_dequantized(x_TD, weights_TK, ids_TK, *local_weights)


def _hold(module: nn.Module, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    weight = torch.empty(shape, dtype=dtype, device="meta")
    module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    module.register_buffer(f"{name}_scale", torch.empty(shape[:-1], device="meta"))
