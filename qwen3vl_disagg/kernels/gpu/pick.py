"""Rows in the order of their experts, of those experts alone that are here: of the others nothing is read or written.

What a grouped product is given past its last offset may be anything: it does not look there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qwen3vl_disagg.kernels.gpu.blocks import power_of_two

_BLOCK = 1024


@triton.jit
def _pick(x, tokens, ends, out, row_stride, column_stride, D, E, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(ends + E - 1):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(tokens + row).to(tl.int64)
        values = tl.load(x + token * row_stride + column * column_stride, mask=column < D)
        tl.store(out + row * D + column, values, mask=column < D)


@triton_op("q3vl::gpu_pick", mutates_args=())
def gpu_pick(x_TD: Tensor, tokens_R: Tensor, ends_E: Tensor) -> Tensor:
    """`[R, D]`; `tokens_R` and `ends_E` as of `gpu_order`, of at least one expert. Rows past its last end are whatever
    was in memory."""
    num_rows, hidden = tokens_R.shape[0], x_TD.shape[1]
    out_RD = x_TD.new_empty(num_rows, hidden)
    block = min(power_of_two(hidden), _BLOCK)
    wrap_triton(_pick)[(num_rows, triton.cdiv(hidden, block))](
        x_TD, tokens_R, ends_E, out_RD, *x_TD.stride(), hidden, ends_E.shape[0], BLOCK=block
    )
    return out_RD


@gpu_pick.register_fake
def _(x_TD: Tensor, tokens_R: Tensor, ends_E: Tensor) -> Tensor:
    return x_TD.new_empty(tokens_R.shape[0], x_TD.shape[1])
