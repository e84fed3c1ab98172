"""Attention over pages of keys and values: what a batch of running sequences needs, and the ways to compute it.

All ways mean the same; `sdpa` is the reference, and `flex` has a file of its own. What changes from step to step is in
tensors, so a compiled layer is not compiled again.

Dims: T packed tokens, N query heads, G kv heads, H head size, B sequences, W pages of the longest, L longest context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_disagg.kernels import ops
from qwen3vl_disagg.model.attention import ForwardBatch, LayerCache
from qwen3vl_disagg.model.flex import flex_kind, make_plan, unwritten_slots, why_not_flex

PagedImpl = Literal["sdpa", "kernel", "flex"]


class PagedBatch(ForwardBatch):
    """New tokens of sequences whose earlier keys and values lie in pages.

    Args:
        seq_lens: new tokens of each sequence in this call.
        context_lens: tokens of each sequence once these are added; `context_lens[b] >= seq_lens[b]`.
        page_tables: `[B, W]` int64, page ids of each sequence in order; entries past the context are ignored. Best on
            the host, where they are read.
        page_size: tokens per page.
        caches: per layer, key and value pools `[num_pages * page_size, G, H]`. `attend` writes into them.
        last_only: logits of each sequence's last token only.
        impl: how attention is computed; None for `flex` on CUDA where it can, else for the fastest that the model's
            dtype allows.
        is_compiled: whether layers may be compiled, which get page tables packed into a copy; else none is made.

    Token i of sequence b lives in slot `page_tables[b, i // page_size] * page_size + i % page_size`. Example with
    page_size 4 and page table [7, 2]: token 5 lies in slot 2 * 4 + 1 = 9.
    """

    def __init__(
        self,
        seq_lens: Sequence[int],
        context_lens: Sequence[int],
        page_tables: Tensor,
        page_size: int,
        caches: Sequence[LayerCache],
        *,
        last_only: bool = True,
        impl: PagedImpl | None = None,
        is_compiled: bool = True,
    ) -> None:
        self.seq_lens, self.context_lens = list(seq_lens), list(context_lens)
        if any(not 1 <= new <= total for new, total in zip(self.seq_lens, self.context_lens, strict=True)):
            raise ValueError(f"new tokens {self.seq_lens} do not fit contexts {self.context_lens}")
        self.caches, self.page_size = caches, page_size
        device = caches[0][0].device if caches else page_tables.device
        if impl is None and caches and device.type == "cuda":
            impl = "sdpa" if why_not_flex(device, page_size, caches[0][0].shape[2]) else "flex"
        self.impl = impl
        tables = page_tables.cpu()
        new_B, contexts_B = torch.tensor(self.seq_lens), torch.tensor(self.context_lens)
        ends_B = new_B.cumsum(0)
        # Token t of this call is number `contexts[b] - (ends[b] - t)` of its sequence b.
        sequence_T = torch.repeat_interleave(torch.arange(len(new_B)), new_B)
        place_T = torch.arange(sum(self.seq_lens)) + (contexts_B - ends_B)[sequence_T]
        pages_T = tables[sequence_T, place_T // page_size]
        self.new_slots_T = pages_T * page_size + place_T % page_size
        self.logit_rows = ends_B.to(device) - 1 if last_only else None
        if impl == "flex":
            is_decode = max(self.seq_lens) == 1
            kind = flex_kind(device.type, page_size, num_sequences=len(new_B), is_decode=is_decode)
            self.plan = make_plan(kind, new_B, contexts_B, tables, len(caches[0][0]), device)
            self.new_slots_T = self.new_slots_T.to(device, non_blocking=True)
            self.unwritten = unwritten_slots(contexts_B, tables, page_size, device)
        else:
            self._unpacked = (new_B, contexts_B, tables.long().contiguous(), self.new_slots_T)
            self.places = _pack(*self._unpacked) if is_compiled else None

    def layer_cache(self, layer: int) -> LayerCache:
        return self.caches[layer]

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, cache: LayerCache | None) -> Tensor:
        if cache is None:
            raise ValueError("a paged batch needs the layer's cache")
        if self.impl == "flex":
            args = (self.new_slots_T, self.unwritten, self.plan.lists, self.plan.sizes)
            return torch.ops.q3vl.flex_attention(q_TNH, k_TGH, v_TGH, *cache, *args)
        impl = self.impl or ""
        if torch.compiler.is_compiling():
            return torch.ops.q3vl.paged_attention(q_TNH, k_TGH, v_TGH, *cache, self.places, self.page_size, impl)
        return paged_attention(q_TNH, k_TGH, v_TGH, *cache, self._unpacked, self.page_size, impl)


Places = tuple[Tensor, Tensor, Tensor, Tensor]


def _pack(new_B: Tensor, contexts_B: Tensor, tables_BW: Tensor, new_slots_T: Tensor) -> Tensor:
    """All of it in one int64 tensor on the host, which a compiled layer hands on without looking at its size."""
    sizes = torch.tensor([*tables_BW.shape])
    return torch.cat([sizes, new_B, contexts_B, tables_BW.flatten(), new_slots_T])


def _unpack(places: Tensor) -> Places:
    """new lens `[B]`, contexts `[B]`, tables `[B, W]`, new slots `[T]`: views."""
    num_sequences, width = places[:2].tolist()
    sizes = [2, num_sequences, num_sequences, num_sequences * width]
    _, new_B, contexts_B, tables, new_slots_T = places.split([*sizes, len(places) - sum(sizes)])
    return new_B, contexts_B, tables.view(num_sequences, width), new_slots_T


# ---- the operator, opaque to the compiler ----

_library = torch.library.Library("q3vl", "FRAGMENT")
_library.define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor places, "
    "int page_size, str impl) -> Tensor"
)


def paged_attention(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    places: Places,
    page_size: int,
    impl: str = "",
) -> Tensor:
    """Write the new keys and values into their slots, then attend -> `[T, N, H]`, q's dtype."""
    new_B, contexts_B, tables_BW, new_slots_T = places
    if not impl:
        is_kernel = k_pool.dtype == torch.float32 and ops.can_attend(q_TNH, k_pool.shape[1])
        impl = "kernel" if is_kernel else "sdpa"
    is_decode = q_TNH.shape[0] == new_B.shape[0]
    if impl == "kernel" and is_decode:  # one call for all of it
        args = (k_pool, v_pool, tables_BW, contexts_B, new_slots_T, page_size)
        return ops.decode_attention(q_TNH, k_TGH, v_TGH, *args)
    tables_BW, new_slots_T = tables_BW.to(k_pool.device), new_slots_T.to(k_pool.device)
    k_pool.index_copy_(0, new_slots_T, k_TGH.to(k_pool.dtype))
    v_pool.index_copy_(0, new_slots_T, v_TGH.to(v_pool.dtype))
    if is_decode:
        return decode_sdpa(q_TNH, k_pool, v_pool, tables_BW, contexts_B, page_size)
    extend = ops.prefill_attention if impl == "kernel" else extend_sdpa
    outs = []
    # Shapes are decided on the host; these two tensors live there.
    for b, (q, total) in enumerate(zip(q_TNH.split(new_B.tolist()), contexts_B.tolist(), strict=True)):
        token_L = torch.arange(total, device=tables_BW.device)
        slots_L = tables_BW[b, token_L // page_size] * page_size + token_L % page_size
        outs.append(extend(q, k_pool, v_pool, slots_L))
    return torch.cat(outs)


def _paged_attention(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    places: Tensor,
    page_size: int,
    impl: str,
) -> Tensor:
    return paged_attention(q_TNH, k_TGH, v_TGH, k_pool, v_pool, _unpack(places), page_size, impl)


_library.impl("paged_attention", _paged_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("q3vl::paged_attention")
def _(q_TNH: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q_TNH)


# ---- ways to compute it ----


def decode_sdpa(
    q_BNH: Tensor, k_pool: Tensor, v_pool: Tensor, tables_BW: Tensor, contexts_B: Tensor, page_size: int
) -> Tensor:
    """One new token per sequence, on padded copies. The query heads of a kv head are the rows of one SDPA call."""
    token_L = torch.arange(int(contexts_B.max()), device=q_BNH.device)
    slots_BL = tables_BW[:, token_L // page_size] * page_size + token_L % page_size
    is_context_BL = token_L < contexts_B.to(q_BNH.device)[:, None]
    # Padding repeats the first token: a slot that was never written may hold NaN, which no weight of 0 takes away.
    slots_BL = torch.where(is_context_BL, slots_BL, slots_BL[:, :1])
    k, v = (pool[slots_BL].transpose(1, 2) for pool in (k_pool, v_pool))
    q = q_BNH.to(k.dtype).unflatten(1, (k_pool.shape[1], -1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_context_BL[:, None, None, :])
    return out.flatten(1, 2).to(q_BNH.dtype)


def extend_sdpa(q_TNH: Tensor, k_pool: Tensor, v_pool: Tensor, slots_L: Tensor) -> Tensor:
    """The last T tokens of a sequence over its whole context."""
    new, total = len(q_TNH), len(slots_L)
    group = q_TNH.shape[1] // k_pool.shape[1]
    k, v = (pool[slots_L].transpose(0, 1).repeat_interleave(group, dim=0)[None] for pool in (k_pool, v_pool))
    q = q_TNH.to(k.dtype).transpose(0, 1)[None]
    if new == total:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        query = torch.arange(total - new, total, device=q.device)
        mask = torch.arange(total, device=q.device) <= query[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1).to(q_TNH.dtype)
