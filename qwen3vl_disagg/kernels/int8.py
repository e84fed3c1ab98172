"""The kernels for int8 weights as operators: what `ops.py` has, with a float32 scale for each row of a weight.

Dims: T tokens, D hidden, N outputs, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3vl_disagg.kernels.calls import call, num_threads, scratch
from qwen3vl_disagg.kernels.ops import MAX_KERNEL_ROWS, fit_experts, is_cpu_bf16, is_dense, need

_library = torch.library.Library("q3vl", "FRAGMENT")
_library.define("linear_int8(Tensor x, Tensor weight, Tensor scale) -> Tensor")


def _linear_int8(x_TD: Tensor, weight_ND: Tensor, scale_N: Tensor) -> Tensor:
    x_TD = x_TD.contiguous()
    fits = x_TD.dim() == weight_ND.dim() == 2 and len(x_TD) <= MAX_KERNEL_ROWS and is_dense(torch.bfloat16, x_TD)
    fits = fits and is_dense(torch.int8, weight_ND) and is_dense(torch.float32, scale_N)
    fits = fits and scale_N.shape == (len(weight_ND),) and x_TD.shape[1] == weight_ND.shape[1]
    fits = fits and weight_ND.shape[0] % 4 == 0 and weight_ND.shape[1] % 32 == 0
    need(fits, "a few bfloat16 rows, int8 weights and float32 scales of whole pieces", x_TD, weight_ND, scale_N)
    (num_rows, depth), num_out = x_TD.shape, weight_ND.shape[0]
    out, widened = x_TD.new_empty(num_rows, num_out), scratch("widened", num_threads(), 4 * depth, dtype=torch.bfloat16)
    call("linear_int8", x_TD, weight_ND, scale_N, widened, out, num_rows, num_out, depth)
    return out


_library.impl("linear_int8", _linear_int8, "CPU")


@torch.library.register_fake("q3vl::linear_int8")
def _(x_TD: Tensor, weight_ND: Tensor, scale_N: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_ND.shape[0])


def can_linear_int8(weight_ND: Tensor, dtype: torch.dtype) -> bool:
    """int8 in sizes the kernel takes, bfloat16 for the rows. Few rows are the caller's business."""
    num_out, depth = weight_ND.shape
    if weight_ND.dtype != torch.int8:
        return False
    return num_out % 4 == 0 and depth % 32 == 0 and is_cpu_bf16(torch.empty(0, dtype=dtype, device=weight_ND.device))


_library.define(
    "experts_int8(Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
    "Tensor down_scale) -> Tensor"
)


def _experts_int8(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    gate_up_EGD: Tensor,
    gate_up_scale_EG: Tensor,
    down_EDF: Tensor,
    down_scale_ED: Tensor,
) -> Tensor:
    x_TD, weights_TK, ids_TK = x_TD.contiguous(), weights_TK.contiguous(), ids_TK.contiguous()
    scales = (gate_up_scale_EG, down_scale_ED)
    need(
        is_dense(torch.bfloat16, x_TD, weights_TK)
        and is_dense(torch.int8, gate_up_EGD, down_EDF)
        and is_dense(torch.float32, *scales)
        and fit_experts(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF)
        and gate_up_scale_EG.shape == gate_up_EGD.shape[:2]
        and down_scale_ED.shape == down_EDF.shape[:2],
        "bfloat16 rows and weights, int8 experts and float32 scales of whole pieces",
        *(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF, *scales),
    )
    (num_tokens, hidden), num_choices = x_TD.shape, ids_TK.shape[1]
    num_experts, _, width = down_EDF.shape
    num_rows = num_tokens * num_choices
    index = scratch("index", num_experts + 1 + 2 * num_rows, dtype=torch.int32)
    widened = scratch("widened", num_threads(), 4 * max(hidden, width), dtype=torch.bfloat16)
    act, y = (scratch(*room, dtype=torch.bfloat16) for room in (("act", num_rows, width), ("y", num_rows, hidden)))
    out = torch.empty_like(x_TD)
    tensors = (x_TD, ids_TK, weights_TK, gate_up_EGD, gate_up_scale_EG, down_EDF, down_scale_ED)
    call("experts_int8", *tensors, widened, index, act, y, out, num_tokens, num_experts, num_choices, hidden, width)
    return out


_library.impl("experts_int8", _experts_int8, "CPU")


@torch.library.register_fake("q3vl::experts_int8")
def _(x_TD: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(x_TD)


def can_experts_int8(down_EDF: Tensor, dtype: torch.dtype) -> bool:
    """int8 in sizes the kernel takes, bfloat16 for the rows."""
    hidden, width = down_EDF.shape[1:]
    if down_EDF.dtype != torch.int8:
        return False
    return hidden % 32 == 0 and width % 32 == 0 and is_cpu_bf16(torch.empty(0, dtype=dtype, device=down_EDF.device))
