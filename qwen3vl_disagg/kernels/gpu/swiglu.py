"""`silu(gate) * up` of halves that lie side by side in a row, rounded where the two operators round; of the
rows of experts that are here alone."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

_BLOCK = 1024


@triton.jit
def _swiglu(gate_up, ends, out, row_stride, column_stride, width, E, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(ends + E - 1):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * row_stride + column * column_stride, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + (column + width) * column_stride, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton_op("q3vl::gpu_swiglu", mutates_args=())
def gpu_swiglu(gate_up_RG: Tensor, ends_E: Tensor) -> Tensor:
    """`[R, 2F]` -> `[R, F]`; rows past the last of `ends_E` (of `gpu_order`) are neither read nor written."""
    num_rows, width = gate_up_RG.shape[0], gate_up_RG.shape[1] // 2
    out_RF = gate_up_RG.new_empty(num_rows, width)
    wrap_triton(_swiglu)[(num_rows, triton.cdiv(width, _BLOCK))](
        gate_up_RG, ends_E, out_RF, *gate_up_RG.stride(), width, ends_E.shape[0], BLOCK=_BLOCK
    )
    return out_RF


@gpu_swiglu.register_fake
def _(gate_up_RG: Tensor, ends_E: Tensor) -> Tensor:
    return gate_up_RG.new_empty(gate_up_RG.shape[0], gate_up_RG.shape[1] // 2)


def swiglu_reference(gate_up_RG: Tensor) -> Tensor:
    gate, up = gate_up_RG.chunk(2, dim=-1)
    return F.silu(gate) * up
