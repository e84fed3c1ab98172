"""Attention over pages of keys and values: what a batch of running sequences needs, and the ways to compute it.

All ways mean the same; `sdpa` is the reference, and `flex` has a file of its own. What changes from step to step is in
tensors, so a compiled layer is not compiled again.

Dims: T packed tokens, N query heads, G kv heads, H head size, B sequences, W pages of the longest, L longest context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_disagg.core.tensors import uploaded
from qwen3vl_disagg.kernels import ops
from qwen3vl_disagg.model.attention import ForwardBatch, LayerCache
from qwen3vl_disagg.model.flex import (
    decode_lists,
    flex_kind,
    make_plan,
    plan_of,
    unwritten_slots,
    why_not_flex,
    widened,
)

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
        self.logit_rows = uploaded(ends_B - 1, device) if last_only else None
        if impl == "flex":
            is_decode = max(self.seq_lens) == 1
            kind = flex_kind(device.type, page_size, num_sequences=len(new_B), is_decode=is_decode)
            self.plan = make_plan(kind, new_B, contexts_B, tables, len(caches[0][0]), device)
            self.new_slots_T = uploaded(self.new_slots_T, device)
            self.unwritten = unwritten_slots(contexts_B, tables, page_size, device)
        else:
            tables = tables.long().contiguous()
            self.places = PagedPlaces(new_B, contexts_B, tables, self.new_slots_T, page_size, device)
            self._packed = self.places.pack() if is_compiled else None

    @classmethod
    def of_tensors(
        cls, contexts_R: Tensor, tables_RW: Tensor, slots_R: Tensor, page_size: int, caches: Sequence[LayerCache]
    ) -> PagedBatch:
        """One new token for each row, by FlexAttention on CUDA, for a step that is captured: contexts and slots int64,
        page tables int32, all on the device, whose numbers the host does not know. Logits of all rows."""
        batch, device, (num_rows, width) = cls.__new__(cls), contexts_R.device, tables_RW.shape
        batch.seq_lens, batch.logit_rows, batch.impl = [1] * num_rows, None, "flex"
        batch.caches, batch.page_size = caches, page_size
        kind = flex_kind(device.type, page_size, num_sequences=num_rows, is_decode=True)
        lists = decode_lists(kind, contexts_R, tables_RW)
        batch.plan = plan_of(kind, lists, kind.num_blocks, num_rows, width, device)
        batch.new_slots_T, batch.unwritten = slots_R, unwritten_slots(contexts_R, tables_RW, page_size, device)
        return batch

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
            return torch.ops.q3vl.paged_attention(q_TNH, k_TGH, v_TGH, *cache, self._packed, self.page_size, impl)
        return paged_attention(q_TNH, k_TGH, v_TGH, *cache, self.places, impl)


class DecodeBatch(ForwardBatch):
    """One new token for each row, all of whose places are in tensors that may be written anew between two runs: for a
    step that is recorded. By the kernel alone."""

    def __init__(self, places: PagedPlaces, caches: Sequence[LayerCache]) -> None:
        self.seq_lens, self.logit_rows = [1] * len(places.new_B), None
        self.places, self.caches = places, caches

    def layer_cache(self, layer: int) -> LayerCache:
        return self.caches[layer]

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, cache: LayerCache | None) -> Tensor:
        if cache is None:
            raise ValueError("a paged batch needs the layer's cache")
        return paged_attention(q_TNH, k_TGH, v_TGH, *cache, self.places, "kernel")


@dataclass(frozen=True)
class PagedPlaces:
    """Where the tokens of a step lie: new tokens and contexts `[B]`, page tables `[B, W]`, slots of the new tokens
    `[T]`, int64 on the host. What follows from them for pools on `device` is computed once, for all layers."""

    new_B: Tensor
    contexts_B: Tensor
    tables_BW: Tensor
    new_slots_T: Tensor
    page_size: int
    device: torch.device

    def pack(self) -> Tensor:
        """All of it in one int64 tensor on the host, which a compiled layer hands on without looking at its size."""
        sizes = torch.tensor([*self.tables_BW.shape])
        return torch.cat([sizes, self.new_B, self.contexts_B, self.tables_BW.flatten(), self.new_slots_T])

    @classmethod
    def unpack(cls, packed: Tensor, page_size: int, device: torch.device) -> PagedPlaces:
        """Views."""
        num_sequences, width = packed[:2].tolist()
        sizes = [2, num_sequences, num_sequences, num_sequences * width]
        _, new_B, contexts_B, tables, new_slots_T = packed.split([*sizes, len(packed) - sum(sizes)])
        return cls(new_B, contexts_B, tables.view(num_sequences, width), new_slots_T, page_size, device)

    @property
    def is_decode(self) -> bool:
        """Each sequence has one new token."""
        return len(self.new_slots_T) == len(self.new_B)

    @cached_property
    def new_slots(self) -> Tensor:
        """`[T]`, on the device."""
        return uploaded(self.new_slots_T, self.device)

    @cached_property
    def context_slots(self) -> list[Tensor]:
        """Of each sequence's tokens, in order, on the device."""
        tables_BW = uploaded(self.tables_BW, self.device)
        return [self._slots(table_W[None], total)[0] for table_W, total in zip(tables_BW, self.totals, strict=True)]

    @cached_property
    def padded_slots(self) -> tuple[Tensor, Tensor]:
        """`[B, L]`, on the device: slots of each context, and which of them are no padding.

        Padding repeats the first token: a slot that was never written may hold NaN, which no weight of 0 takes away.
        """
        longest = max(self.totals)
        slots_BL = self._slots(uploaded(self.tables_BW, self.device), longest)
        is_context_BL = torch.arange(longest, device=self.device) < uploaded(self.contexts_B, self.device)[:, None]
        return torch.where(is_context_BL, slots_BL, slots_BL[:, :1]), is_context_BL

    @cached_property
    def totals(self) -> list[int]:
        return self.contexts_B.tolist()  # on the host: shapes are decided by them

    def _slots(self, tables_BW: Tensor, length: int) -> Tensor:
        token_L = torch.arange(length, device=self.device)
        return tables_BW[:, token_L // self.page_size] * self.page_size + token_L % self.page_size


# ---- the operator, opaque to the compiler ----

_library = torch.library.Library("q3vl", "FRAGMENT")
_library.define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor places, "
    "int page_size, str impl) -> Tensor"
)


def paged_attention(
    q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, k_pool: Tensor, v_pool: Tensor, places: PagedPlaces, impl: str = ""
) -> Tensor:
    """Write the new keys and values into their slots, then attend -> `[T, N, H]`, q's dtype."""
    if not impl:
        impl = "kernel" if k_pool.dtype == q_TNH.dtype and ops.can_attend(q_TNH, k_pool.shape[1]) else "sdpa"
    if impl == "kernel" and places.is_decode:  # one call for all of it
        args = (k_pool, v_pool, places.tables_BW, places.contexts_B, places.new_slots_T, places.page_size)
        return ops.decode_attention(q_TNH, k_TGH, v_TGH, *args)
    k_pool.index_copy_(0, places.new_slots, k_TGH.to(k_pool.dtype))
    v_pool.index_copy_(0, places.new_slots, v_TGH.to(v_pool.dtype))
    if places.is_decode:
        return decode_sdpa(q_TNH, k_pool, v_pool, *places.padded_slots)
    extend = ops.prefill_attention if impl == "kernel" else extend_sdpa
    parts = zip(q_TNH.split(places.new_B.tolist()), places.context_slots, strict=True)
    outs = [extend(q, k_pool, v_pool, slots_L) for q, slots_L in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _paged_attention(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    packed: Tensor,
    page_size: int,
    impl: str,
) -> Tensor:
    places = PagedPlaces.unpack(packed, page_size, k_pool.device)
    return paged_attention(q_TNH, k_TGH, v_TGH, k_pool, v_pool, places, impl)


_library.impl("paged_attention", _paged_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("q3vl::paged_attention")
def _(q_TNH: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q_TNH)


# ---- ways to compute it ----


def decode_sdpa(q_BNH: Tensor, k_pool: Tensor, v_pool: Tensor, slots_BL: Tensor, is_context_BL: Tensor) -> Tensor:
    """One new token per sequence, on padded copies. The query heads of a kv head are the rows of one SDPA call."""
    k, v = (widened(pool[slots_BL]).transpose(1, 2) for pool in (k_pool, v_pool))
    q = q_BNH.to(k.dtype).unflatten(1, (k_pool.shape[1], -1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_context_BL[:, None, None, :])
    return out.flatten(1, 2).to(q_BNH.dtype)


def extend_sdpa(q_TNH: Tensor, k_pool: Tensor, v_pool: Tensor, slots_L: Tensor) -> Tensor:
    """The last T tokens of a sequence over its whole context."""
    new, total = len(q_TNH), len(slots_L)
    group = q_TNH.shape[1] // k_pool.shape[1]
    k, v = (widened(pool[slots_L]).transpose(0, 1).repeat_interleave(group, dim=0)[None] for pool in (k_pool, v_pool))
    q = q_TNH.to(k.dtype).transpose(0, 1)[None]
    if new == total:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        query = torch.arange(total - new, total, device=q.device)
        mask = torch.arange(total, device=q.device) <= query[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1).to(q_TNH.dtype)
