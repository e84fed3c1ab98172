"""Where each choice goes when rows are sorted by expert: histogram, offsets and permutation in one launch.

A program for each expert, and one for the choices that are elsewhere: it counts the choices of the experts before it,
which is where its own begin, then numbers its own in their order. Nothing is summed up by atomics, so the order is the
same each time: that of a stable sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_BLOCK = 1024


@triton.jit
def _order(ids, tokens, places, ends, num_routed, row_stride, choice_stride, E, K: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = 0
    count = 0
    for start in range(0, num_routed, BLOCK):
        routed = start + lane
        inside = routed < num_routed
        where = (routed // K).to(tl.int64) * row_stride + (routed % K) * choice_stride
        chosen = tl.minimum(tl.load(ids + where, mask=inside, other=0), E)  # remote ones come last
        before += tl.sum((inside & (chosen < expert)).to(tl.int32), 0)
        count += tl.sum((inside & (chosen == expert)).to(tl.int32), 0)
    tl.store(ends + expert, before + count, mask=expert < E)
    for start in range(0, num_routed, BLOCK):
        routed = start + lane
        inside = routed < num_routed
        where = (routed // K).to(tl.int64) * row_stride + (routed % K) * choice_stride
        is_mine = inside & (tl.minimum(tl.load(ids + where, mask=inside, other=0), E) == expert)
        place = before + tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(tokens + place, routed // K, mask=is_mine)
        tl.store(places + routed, tl.where(expert < E, place, -1), mask=is_mine)
        before += tl.sum(is_mine.to(tl.int32), 0)


@triton_op("q3vl::gpu_order", mutates_args=())
def gpu_order(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32: token of each sorted row `[R]`, sorted row of each choice `[T, K]` (-1 where its id is `num_experts` or
    more), the end of each expert's rows `[E]`."""
    num_rows, num_choices = ids_TK.shape
    places_TK = torch.empty(num_rows, num_choices, dtype=torch.int32, device=ids_TK.device)
    tokens_R = places_TK.new_empty(num_rows * num_choices)
    ends_E = places_TK.new_empty(num_experts)
    wrap_triton(_order)[(num_experts + 1,)](
        ids_TK,
        tokens_R,
        places_TK,
        ends_E,
        num_rows * num_choices,
        *ids_TK.stride(),
        num_experts,
        K=num_choices,
        BLOCK=_BLOCK,
    )
    return tokens_R, places_TK, ends_E


@gpu_order.register_fake
def _(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    places_TK = torch.empty(ids_TK.shape, dtype=torch.int32, device=ids_TK.device)
    return places_TK.new_empty(ids_TK.shape[0] * ids_TK.shape[1]), places_TK, places_TK.new_empty(num_experts)


def order_reference(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_R = ids_TK.flatten().clamp(max=num_experts)
    order_R = ids_R.argsort(stable=True)
    places_R = torch.empty_like(order_R).index_copy(0, order_R, torch.arange(len(ids_R), device=ids_R.device))
    places_R = torch.where(ids_R < num_experts, places_R, -1)
    ends_E = torch.bincount(ids_R, minlength=num_experts + 1)[:num_experts].cumsum(0)
    tokens_R = order_R // max(ids_TK.shape[1], 1)
    return tokens_R.int(), places_R.view(ids_TK.shape).int(), ends_E.int()
