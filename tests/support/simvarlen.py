"""`varlen_attn` of the device of `simcuda`: each segment by itself, and refused is what flash attention refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

MAX_HEAD = 256


def varlen_attn(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> Any:
    """Full attention `[T, N, H]`. Rows of no segment, or past the longest that is named, are what was in memory."""
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
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
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
