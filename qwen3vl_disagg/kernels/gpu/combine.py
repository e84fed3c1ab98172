"""Back to tokens: the weighted sum over each token's choices, accumulated in float32, from rows sorted by expert.

Rows that no choice points at are never read: past the last expert's, a grouped product leaves whatever was in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qwen3vl_disagg.kernels.gpu.blocks import power_of_two

_BLOCK = 1024


@triton.jit
def _combine(
    y,
    places,
    weights,
    out,
    row_stride,
    column_stride,
    weight_stride,
    choice_stride,
    D,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        place = tl.load(places + token * K + k).to(tl.int64)
        weight = tl.load(weights + token * weight_stride + k * choice_stride).to(tl.float32)
        is_here = (column < D) & (place >= 0)
        part = tl.load(y + place * row_stride + column * column_stride, mask=is_here, other=0.0).to(tl.float32)
        total += tl.where(is_here, weight * part, 0.0)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


@triton_op("q3vl::gpu_combine", mutates_args=())
def gpu_combine(y_RD: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """`[T, D]` in y's dtype. `places_TK`: contiguous int32, the row of each choice, -1 for one that adds nothing."""
    (num_rows, num_choices), hidden = places_TK.shape, y_RD.shape[1]
    out_TD = y_RD.new_empty(num_rows, hidden)
    block = min(power_of_two(hidden), _BLOCK)
    strides = (*y_RD.stride(), *weights_TK.stride())
    wrap_triton(_combine)[(num_rows, triton.cdiv(hidden, block))](
        y_RD, places_TK, weights_TK, out_TD, *strides, hidden, K=num_choices, BLOCK=block
    )
    return out_TD


@gpu_combine.register_fake
def _(y_RD: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return y_RD.new_empty(places_TK.shape[0], y_RD.shape[1])


def combine_reference(y_RD: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    is_here_TK1 = (places_TK >= 0).unsqueeze(-1)
    y_TKD = y_RD[places_TK.clamp(min=0).long()] if len(y_RD) else y_RD.new_zeros(*places_TK.shape, y_RD.shape[1])
    parts = y_TKD.float() * weights_TK.float().unsqueeze(-1)
    return torch.where(is_here_TK1, parts, 0).sum(1).to(y_RD.dtype)
