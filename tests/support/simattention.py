"""Attention kernels of the device of `simcuda`: FlexAttention by its lists, and flash attention over frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_disagg.model import flex
from tests.support.simstreams import here

MAX_HEAD = 256


def varlen_attn(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> Any:
    """Full attention `[T, N, H]`, each segment by itself; refused is what flash attention refuses. Rows of no segment,
    or past the longest that is named, are what was in memory."""
    watch, parts = q.watch, (q, k, v, cu_q, cu_k)
    if not all(hasattr(x, "elem") for x in parts):
        raise watch.problem("varlen_attn: tensors of two devices")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise watch.problem("FlashAttention only support fp16 and bf16 data type")
    if q.shape[2] % 8 or q.shape[2] > MAX_HEAD:
        raise watch.problem(f"FlashAttention: head size {q.shape[2]} is no multiple of 8 up to {MAX_HEAD}")
    if cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32:
        raise watch.problem("cu_seqlens must have dtype int32")
    if any(x.stride(-1) != 1 for x in parts):
        raise watch.problem("FlashAttention: the last dimension must be contiguous")
    step = watch.order.step([x.elem for x in parts], [])
    watch.varlen += 1
    with here():
        out = torch.full_like(q.elem, float("nan"))
        stops = zip(
            cu_q.elem.tolist(), cu_q.elem.tolist()[1:], cu_k.elem.tolist(), cu_k.elem.tolist()[1:], strict=False
        )
        for q_start, q_stop, k_start, k_stop in stops:
            rows, keys = slice(q_start, min(q_stop, q_start + max_q)), slice(k_start, min(k_stop, k_start + max_k))
            segment = [x.elem[part].transpose(0, 1) for x, part in ((q, rows), (k, keys), (v, keys))]
            out[rows] = F.scaled_dot_product_attention(*segment).transpose(0, 1)
        made = type(q)(out, watch)
    watch.order.tag(step, [out])
    return made


def attention_by_lists(kind: flex.FlexKind) -> Callable[..., Any]:
    """What the compiled kernel computes, from the pages that its lists name and no others."""

    def attend(*given: Any) -> Any:
        q, parts = given[0], [x.elem for x in given]
        step = q.watch.order.step(parts, [])
        with here():
            out = q.watch.graphs.run(compute, *parts)
        q.watch.order.tag(step, [out])
        return type(q)(out, q.watch)

    def compute(q_RNMH: Tensor, keys: Tensor, values: Tensor, *lists: Tensor) -> Tensor:
        num_partial, partial, offset, starts, *rest = lists
        mask_mod = flex.block_mask(kind, len(keys), num_partial, partial, offset, starts).mask_mod
        out = torch.zeros_like(q_RNMH, dtype=torch.float32)
        row_M1, group = torch.arange(q_RNMH.shape[2])[:, None], q_RNMH.shape[1] // keys.shape[1]
        for r in range(len(q_RNMH)):
            pages = partial[r, : num_partial[r]].long()
            full = rest[1][r, : rest[0][r]].long() if rest else pages[:0]
            listed = (torch.cat([pages, full])[:, None] * kind.page_size + torch.arange(kind.page_size)).flatten()
            if not len(listed):
                continue
            sees_ML = mask_mod(torch.tensor(r), torch.tensor(0), row_M1, listed)
            sees_ML[:, len(pages) * kind.page_size :] = True
            k, v = (pool[listed].float().transpose(0, 1).repeat_interleave(group, 0) for pool in (keys, values))
            scores = (q_RNMH[r].float() @ k.transpose(1, 2)) * q_RNMH.shape[3] ** -0.5
            weights = scores.masked_fill(~sees_ML, float("-inf")).softmax(-1)
            out[r] = weights.nan_to_num(0.0) @ v  # a row that sees nothing comes out as zeros
        return out.to(q_RNMH.dtype)

    return attend
