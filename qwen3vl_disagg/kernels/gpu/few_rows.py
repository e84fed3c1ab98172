"""Experts of few rows, without sorting: each choice of each row multiplies its expert's matrices with that row alone.

Two launches. The first makes `silu(gate) * up` of each choice, a program for some columns of it; the second all of a
token's choices times their `down` matrices, a program for some columns of the sum. Both are bound by the weights that
they read; rows that share an expert find its weights in the cache. Rounded to the model's dtype where the operators of
the reference (`model.moe.run_experts_loop`) round, but for a choice's output, which stays float32 until all are summed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qwen3vl_disagg.kernels.gpu.blocks import power_of_two

_COLUMNS, _DOWN_COLUMNS = 16, 8
"""Of the two launches' programs. With the depths below, a thread has 32 and at most 64 numbers of a matrix."""
_DEPTH, _DOWN_DEPTH = 256, 1024


@triton.jit
def _up(
    x,
    ids,
    gate_up,
    out,
    x_row,
    x_column,
    id_row,
    id_column,
    expert_stride,
    row_stride,
    column_stride,
    E,
    D,
    F,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    choice = tl.program_id(0)
    token = (choice // K).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.load(ids + token * id_row + (choice % K) * id_column).to(tl.int64)
    if expert < E:
        matrix = gate_up + expert * expert_stride
        gate = tl.zeros([COLUMNS, DEPTH], tl.float32)
        up = tl.zeros([COLUMNS, DEPTH], tl.float32)
        for start in range(0, D, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            row = tl.load(x + token * x_row + depth * x_column, mask=depth < D, other=0.0).to(tl.float32)
            inside = (column < F)[:, None] & (depth < D)[None, :]
            where = column[:, None] * row_stride + depth[None, :] * column_stride
            gate += tl.load(matrix + where, mask=inside, other=0.0).to(tl.float32) * row[None, :]
            up += tl.load(matrix + where + F * row_stride, mask=inside, other=0.0).to(tl.float32) * row[None, :]
        dtype = out.dtype.element_ty
        gate_C = tl.sum(gate, 1).to(dtype).to(tl.float32)
        up_C = tl.sum(up, 1).to(dtype).to(tl.float32)
        silu_C = (gate_C / (1.0 + tl.exp(-gate_C))).to(dtype).to(tl.float32)
        tl.store(out + choice.to(tl.int64) * F + column, (silu_C * up_C).to(dtype), mask=column < F)


@triton.jit
def _down(
    h,
    ids,
    weights,
    down,
    out,
    id_row,
    id_column,
    weight_row,
    weight_column,
    expert_stride,
    row_stride,
    column_stride,
    E,
    D,
    F,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in range(K):
        expert = tl.load(ids + token * id_row + k * id_column).to(tl.int64)
        if expert < E:
            weight = tl.load(weights + token * weight_row + k * weight_column).to(tl.float32)
            part = tl.zeros([COLUMNS, DEPTH], tl.float32)
            for start in range(0, F, DEPTH):
                depth = start + tl.arange(0, DEPTH)
                row = tl.load(h + (token * K + k) * F + depth, mask=depth < F, other=0.0).to(tl.float32)
                inside = (column < D)[:, None] & (depth < F)[None, :]
                where = expert * expert_stride + column[:, None] * row_stride + depth[None, :] * column_stride
                part += tl.load(down + where, mask=inside, other=0.0).to(tl.float32) * row[None, :]
            total += weight * tl.sum(part, 1)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


@triton_op("q3vl::gpu_few_rows", mutates_args=())
def gpu_few_rows(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """The weighted sum over each row's experts `[T, D]`; an id of E or more adds nothing. Right for any number of rows,
    made for up to `MAX_FEW_ROWS`."""
    (num_rows, num_choices), (num_experts, hidden, width) = ids_TK.shape, down_EDF.shape
    h_RF = x_TD.new_empty(num_rows * num_choices, width)
    out_TD = x_TD.new_empty(num_rows, hidden)
    sizes = (num_experts, hidden, width, num_choices)
    strides = (*x_TD.stride(), *ids_TK.stride(), *gate_up_EGD.stride())
    depth, down_depth = min(power_of_two(hidden), _DEPTH), min(power_of_two(width), _DOWN_DEPTH)
    wrap_triton(_up)[(num_rows * num_choices, triton.cdiv(width, _COLUMNS))](
        x_TD, ids_TK, gate_up_EGD, h_RF, *strides, *sizes, COLUMNS=_COLUMNS, DEPTH=depth, num_warps=4
    )
    strides = (*ids_TK.stride(), *weights_TK.stride(), *down_EDF.stride())
    wrap_triton(_down)[(num_rows, triton.cdiv(hidden, _DOWN_COLUMNS))](
        h_RF,
        ids_TK,
        weights_TK,
        down_EDF,
        out_TD,
        *strides,
        *sizes,
        COLUMNS=_DOWN_COLUMNS,
        DEPTH=down_depth,
        num_warps=4,
    )
    return out_TD


@gpu_few_rows.register_fake
def _(x_TD: Tensor, *_: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape)
