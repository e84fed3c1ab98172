"""Router: softmax, the largest K, renormalised, in one launch. Its reference is `model.moe.route`.

A row's logits become whole numbers that rise with them, with the expert's number below, so that one maximum gives the
next choice and of equal logits the first expert, and an id is always one of an expert, also in a row of NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qwen3vl_disagg.kernels.gpu.blocks import power_of_two


@triton.jit
def _route(
    logits,
    weights,
    ids,
    row_stride,
    expert_stride,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < E
    x = tl.load(logits + row * row_stride + expert * expert_stride, mask=is_expert, other=float("-inf")).to(tl.float32)
    p = tl.where(is_expert, tl.exp(x - tl.max(x, 0)), 0.0)
    p = p / tl.sum(p, 0)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are one
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    least = tl.full([BLOCK_E], -9223372036854775808, tl.int64)
    key = tl.where(is_expert, (rising << 32) | (BLOCK_E - 1 - expert).to(tl.int64), least)
    place = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.float32)
    chosen_ids = tl.zeros([BLOCK_K], tl.int64)
    for k in range(K):
        best = BLOCK_E - 1 - (tl.max(key, 0) & 0x7FFFFFFF)
        chosen = tl.where(place == k, tl.sum(tl.where(expert == best, p, 0.0), 0), chosen)
        chosen_ids = tl.where(place == k, best, chosen_ids)
        key = tl.where(expert == best, least, key)
    chosen = chosen / tl.sum(chosen, 0)
    tl.store(weights + row * K + place, chosen.to(weights.dtype.element_ty), mask=place < K)
    tl.store(ids + row * K + place, chosen_ids, mask=place < K)


@triton_op("q3vl::gpu_route", mutates_args=())
def gpu_route(logits_TE: Tensor, num_choices: int) -> tuple[Tensor, Tensor]:
    """Weights `[T, K]` in the logits' dtype, ids `[T, K]` int64, largest first."""
    num_rows, num_experts = logits_TE.shape
    weights_TK = logits_TE.new_empty(num_rows, num_choices)
    ids_TK = torch.empty(num_rows, num_choices, dtype=torch.int64, device=logits_TE.device)
    blocks = {"BLOCK_E": power_of_two(num_experts), "BLOCK_K": power_of_two(num_choices)}
    wrap_triton(_route)[(num_rows,)](
        logits_TE, weights_TK, ids_TK, *logits_TE.stride(), E=num_experts, K=num_choices, num_warps=1, **blocks
    )
    return weights_TK, ids_TK


@gpu_route.register_fake
def _(logits_TE: Tensor, num_choices: int) -> tuple[Tensor, Tensor]:
    weights_TK = logits_TE.new_empty(logits_TE.shape[0], num_choices)
    return weights_TK, torch.empty_like(weights_TK, dtype=torch.int64)
