"""FlexAttention over the page pool: keys and values stay where they lie, block lists say which pages are read.

Query rows stand in blocks of at most M rows of one sequence: one row each when every sequence has one new token
(decode), else chunks of a sequence's new tokens (prefill). A block is a batch row of `flex_attention`, and the pool is
the one key-value row that all of them share, so a block's lists are its sequence's page table: a page is a KV block.
Pages in which every token is visible to every row are listed as full and need no mask. At most a few pages hold tokens
that some rows must not see, because these rows come before them; they are listed as partial, and the mask knows them
by their first slots. So there is no table from slots back to sequences: it would have an entry per page of the pool,
and one entry would not do, since a page may belong to several sequences.

All lists are made once per step, on the host, and reach the device in one copy. Every layer calls the same compiled
function, inside an operator, so the graphs around it do not depend on how sequences are spread over pages.

Dims: T packed tokens, N query heads, G kv heads, H head size, S slots of the pool, R blocks of M query rows, W pages in
a list, K partial pages at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from qwen3vl_disagg.core.tensors import uploaded

SPARSE_ROWS = 128
"""Query rows that one entry of a block mask covers. More than a block has: the decode kernel on CUDA wants a multiple
of the rows that it makes of one token, one for each query head of a kv head, and at least 16."""
ALIGNMENT = 4
"""int32 values: compiled code on CUDA copies what does not begin at 16 bytes."""
MIN_CUDA_PAGE = 16
"""The smallest operand of a matrix product in Triton."""


@dataclass(frozen=True)
class FlexKind:
    """What one graph is for.

    num_blocks: the number of query blocks, 0 where it may change from call to call. On CUDA the number is fixed for
        decode, as the kernel that splits contexts over multiprocessors needs it: lists are padded to a power of two.
    has_full: pages are split into full and partial ones. Not for decode on CUDA: with a list of full pages the kernel
        divides the whole pool among its splits instead of this sequence's pages, so that one split gets all the work.
    """

    device: str
    page_size: int
    rows: int
    num_blocks: int
    has_full: bool

    @property
    def num_partial(self) -> int:
        """M rows from the end of one page on: 1 + ceil((M - 1) / page size)."""
        return 1 - (1 - self.rows) // self.page_size


def flex_kind(device_type: str, page_size: int, *, num_sequences: int, is_decode: bool) -> FlexKind:
    """The graph that a batch needs. Decode: each sequence has one new token."""
    on_cuda = device_type == "cuda"
    if not is_decode:
        # Short blocks on CPU, where this is for tests: several of them in a short prompt.
        return FlexKind(device_type, page_size, SPARSE_ROWS if on_cuda else 8, 0, True)
    return FlexKind(device_type, page_size, 1, _power_of_two(num_sequences) if on_cuda else 0, not on_cuda)


def flex_kinds(device_type: str, page_size: int, max_sequences: int) -> set[FlexKind]:
    """All graphs that batches of up to `max_sequences` sequences can need."""
    counts = range(1, max_sequences + 1)
    decode = {flex_kind(device_type, page_size, num_sequences=n, is_decode=True) for n in counts}
    return decode | {flex_kind(device_type, page_size, num_sequences=1, is_decode=False)}


def why_not_flex(device: torch.device, page_size: int, head_dim: int) -> str | None:
    """What stands in the way, None for nothing."""
    if device.type == "cuda" and (page_size < MIN_CUDA_PAGE or page_size & (page_size - 1)):
        return f"FlexAttention on CUDA needs pages of a power of two of at least {MIN_CUDA_PAGE}, not {page_size}"
    if device.type == "cuda" and head_dim < MIN_CUDA_PAGE:
        return f"FlexAttention on CUDA needs heads of at least {MIN_CUDA_PAGE}, not {head_dim}"
    return None


def unwritten_slots(contexts_B: Tensor, tables_BW: Tensor, page_size: int, device: torch.device) -> Tensor:
    """Slots behind the last token of each sequence in its last page: the kernels multiply what lies there by 0, which
    does not take NaN away. One entry for each place of the page; those of before repeat the last token's. Contexts and
    tables on the host, or both on `device`.

    Example: page size 4, page table [7, 2], 6 tokens: slots 9, 9, 10, 11.
    """
    last_B1 = (contexts_B - 1)[:, None]
    place_BP = torch.arange(page_size, device=last_B1.device).maximum(last_B1 % page_size)
    slots = (tables_BW.gather(1, last_B1 // page_size) * page_size + place_BP).flatten()
    slots = uploaded(slots.repeat(1 if len(slots) > 1 else 2), device)  # a size of one is a constant
    torch._dynamo.mark_dynamic(slots, 0)
    return slots


@dataclass(frozen=True)
class FlexPlan:
    """A step's lists, as they go through a compiled layer: two tensors whose sizes no graph looks at.

    lists: int32, on the device: the fields of `FlexLists`, flat, behind one another, each from an aligned place on.
    sizes: int64 `[8]`, on the host: R, W, T and the fields of the kind.
    """

    lists: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class FlexLists:
    """
    num_partial, num_full: `[R]`, pages in each list.
    offset: `[R]`, place of a block's first row, counted from the beginning of its first partial page.
    starts: `[R, K]`, first slots of the partial pages; of those that are not there, a page's length below zero.
    partial, full: `[R, W]`, page ids. Both as wide, because the kernels use the strides of one for the other.
    rows: `[R * M]`, token of each row; what is not a token repeats the first.
    back: `[T]`, row of each token.
    """

    num_partial: Tensor
    num_full: Tensor
    offset: Tensor
    starts: Tensor
    partial: Tensor
    full: Tensor
    rows: Tensor
    back: Tensor


def make_plan(
    kind: FlexKind, new_B: Tensor, contexts_B: Tensor, tables_BW: Tensor, num_slots: int, device: torch.device
) -> FlexPlan:
    """Lists of a step from lengths and page tables on the host. `num_slots`: S.

    Example: page size 4, 3 new tokens after 6, page table [7, 2, 5]. One block of rows with places 6, 7, 8. Page 7
    (places 0 to 3) is full; in pages 2 and 5, beginning at slots 8 and 20, row m sees what is not after offset 2 + m,
    counted from slot 8 on in page 2, and from 4 before slot 20 in page 5.
    """
    page_size, rows = kind.page_size, kind.rows
    if not kind.has_full:
        width = max(2, -(-int(contexts_B.max()) // page_size))
        flat = decode_lists(kind, contexts_B, _as_wide(tables_BW, width))
        return plan_of(kind, flat, kind.num_blocks, len(new_B), width, device)
    blocks_B = (new_B + rows - 1) // rows
    ends_B = new_B.cumsum(0)
    sequence_R = torch.repeat_interleave(torch.arange(len(new_B)), blocks_B)
    number_R = torch.arange(len(sequence_R)) - (blocks_B.cumsum(0) - blocks_B)[sequence_R]
    # From the first token of the call, in places of the sequence and in packed tokens.
    first_R = (contexts_B - new_B)[sequence_R] + number_R * rows
    token_R = (ends_B - new_B)[sequence_R] + number_R * rows
    count_R = (ends_B[sequence_R] - token_R).clamp(max=rows)
    full_R = (first_R + 1) // page_size
    pages_R = (first_R + count_R - 1) // page_size + 1

    # On CPU the lists must be as wide as the pool; and a width of one would be a constant to the compiler.
    width = -(-num_slots // page_size) if kind.device == "cpu" else max(2, int(pages_R.max()))
    page_W = torch.arange(width)
    tables_RW = _as_wide(tables_BW, width)[sequence_R]
    tables_RW = torch.where(page_W < pages_R[:, None], tables_RW, 0)
    partial_RK = full_R[:, None] + torch.arange(kind.num_partial)
    is_there_RK = partial_RK < pages_R[:, None]
    starts_RK = tables_RW.gather(1, partial_RK.clamp(max=width - 1)) * page_size
    starts_RK = torch.where(is_there_RK, starts_RK, -page_size)
    row_RM = torch.arange(rows)
    rows_RM = torch.where(row_RM < count_R[:, None], token_R[:, None] + row_RM, token_R[:, None])
    back_T = (row_RM < count_R[:, None]).flatten().nonzero().squeeze(1)
    shifted_RW = tables_RW.gather(1, (full_R[:, None] + page_W).clamp(max=width - 1))
    lists = [pages_R - full_R, full_R, first_R - full_R * page_size, starts_RK, shifted_RW, tables_RW, rows_RM]
    num_blocks = kind.num_blocks or max(2, len(sequence_R))
    return plan_of(kind, _flat(lists, num_blocks, back_T), num_blocks, len(back_T), width, device)


def decode_lists(kind: FlexKind, contexts_R: Tensor, tables_RW: Tensor) -> Tensor:
    """`FlexPlan.lists` for one new token of each of R sequences, of a kind without full pages; where the arguments are,
    and on a device without a wait. What stands in the tables behind a sequence's pages is not read.

    W is no smaller for short contexts in a step that is captured: the kernel reads as many entries as there are pages.
    """
    page_size, (num_rows, width) = kind.page_size, tables_RW.shape
    full_R, last_R, row_R = contexts_R // page_size, contexts_R - 1, torch.arange(num_rows, device=contexts_R.device)
    pages_R = last_R // page_size + 1
    tables_RW = torch.where(torch.arange(width, device=row_R.device) < pages_R[:, None], tables_RW, 0)
    starts_R1 = tables_RW.gather(1, full_R[:, None].clamp(max=width - 1)) * page_size
    starts_R1 = torch.where((full_R < pages_R)[:, None], starts_R1, -page_size)
    lists = [pages_R, full_R * 0, last_R - full_R * page_size, starts_R1, tables_RW, row_R]
    return _flat(lists, kind.num_blocks, row_R)


def plan_of(
    kind: FlexKind, flat: Tensor, num_blocks: int, num_tokens: int, width: int, device: torch.device
) -> FlexPlan:
    """The lists on their device, and the sizes by which `read_plan` takes them apart."""
    sizes = [num_blocks, width, num_tokens, kind.page_size, kind.rows, kind.num_blocks, int(kind.has_full), 0]
    flat = uploaded(flat, device)
    # A size of its own: the compiler would take it for the same as another that is equal by chance.
    torch._dynamo.mark_dynamic(flat, 0)
    return FlexPlan(flat, torch.tensor(sizes))


def _as_wide(tables_BW: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tables_BW[:, :width], (0, max(0, width - tables_BW.shape[1])))


def _flat(lists_R: list[Tensor], num_blocks: int, back_T: Tensor) -> Tensor:
    """int32. Blocks without pages are added: their rows come out as zeros and are dropped."""
    missing = num_blocks - len(lists_R[0])
    padded = [torch.cat([part, part.new_zeros(missing, *part.shape[1:])]).flatten() for part in lists_R]
    aligned = [torch.nn.functional.pad(part, (0, -len(part) % ALIGNMENT)) for part in [*padded, back_T]]
    return torch.cat(aligned).to(torch.int32)


def read_plan(lists: Tensor, sizes: Tensor) -> tuple[FlexKind, FlexLists]:
    """Views of a plan's tensors."""
    num_blocks, width, num_tokens, page_size, rows, fixed, has_full, _ = sizes.tolist()  # on the host: no sync
    kind = FlexKind(lists.device.type, page_size, rows, fixed, bool(has_full))
    full_width = width if has_full else 0
    wide = [(num_blocks, w) for w in (kind.num_partial, width, full_width)]
    shapes = [(num_blocks,)] * 3 + wide + [(num_blocks * rows,), (num_tokens,)]
    views, start = [], 0
    for shape in shapes:
        views.append(lists.as_strided(shape, (*shape[1:], 1), start))
        length = math.prod(shape)
        start += length + -length % ALIGNMENT
    return kind, FlexLists(*views)


def widened(rows: Tensor) -> Tensor:
    """Keys or values in the dtype that PyTorch computes attention in: at least float32 on the CPU, their own else."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) if rows.is_cpu else rows


def flex_attend(q_TNH: Tensor, k_pool: Tensor, v_pool: Tensor, kind: FlexKind, lists: FlexLists) -> Tensor:
    """Attention of packed tokens over pools `[S, G, H]` -> `[T, N, H]`, q's dtype."""
    k_pool, v_pool = widened(k_pool), widened(v_pool)
    q = q_TNH.to(k_pool.dtype)
    num_blocks = len(lists.num_partial)
    if len(lists.rows) != len(q) or kind.rows > 1:
        q = q.index_select(0, lists.rows)
    q = q.unflatten(0, (num_blocks, kind.rows)).transpose(1, 2)
    full = [lists.num_full, lists.full] if kind.has_full else []
    blocks = [lists.num_partial, lists.partial, lists.offset, lists.starts, *full]
    if not kind.num_blocks:
        for tensor in (q, *blocks):
            torch._dynamo.mark_dynamic(tensor, 0)
    if kind.device != "cpu":
        for tensor in (lists.partial, *full[1:]):
            torch._dynamo.mark_dynamic(tensor, 1)
    out = compiled_attention(kind)(q, k_pool, v_pool, *blocks).transpose(1, 2).flatten(0, 1)
    return (out[: len(lists.back)] if kind.rows == 1 else out.index_select(0, lists.back)).to(q_TNH.dtype)


@cache
def compiled_attention(kind: FlexKind) -> Callable[..., Tensor]:
    """The function that all layers share, of one graph per size of heads and pool."""

    def attend(
        q_RNMH: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        num_partial: Tensor,
        partial: Tensor,
        offset: Tensor,
        starts: Tensor,
        num_full: Tensor | None = None,
        full: Tensor | None = None,
    ) -> Tensor:
        mask = block_mask(kind, len(k_pool), num_partial, partial, offset, starts, num_full, full)
        k, v = (pool.transpose(0, 1)[None] for pool in (k_pool, v_pool))
        # Triton's blocks of keys must divide a page.
        options: Any = {"BLOCK_N": min(64, kind.page_size)} if kind.device == "cuda" else None
        return flex_attention(q_RNMH, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)

    # The compiler counts graphs per code object, and gives up after a few.
    attend.__code__ = attend.__code__.replace(co_name=f"attend_{kind.rows}_{kind.num_blocks}_{kind.page_size}")
    return torch.compile(attend, fullgraph=True, dynamic=False)


def block_mask(
    kind: FlexKind,
    num_slots: int,
    num_partial: Tensor,
    partial: Tensor,
    offset: Tensor,
    starts: Tensor,
    num_full: Tensor | None = None,
    full: Tensor | None = None,
) -> BlockMask:
    """No work, only names: the lists are taken as they are. `mask_mod` is right within listed pages only."""

    def mask_mod(block: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        last = offset[block] + row
        hidden = slot < 0
        for k in range(kind.num_partial):
            inside = slot - starts[block, k]
            hidden = hidden | ((inside >= 0) & (inside < kind.page_size) & (inside + k * kind.page_size > last))
        return ~hidden

    return BlockMask.from_kv_blocks(
        num_partial[:, None, None],
        partial[:, None, None],
        None if num_full is None else num_full[:, None, None],
        None if full is None else full[:, None, None],
        BLOCK_SIZE=(SPARSE_ROWS, kind.page_size),
        mask_mod=mask_mod,
        seq_lengths=(kind.rows, num_slots),
        compute_q_blocks=False,
    )


def _power_of_two(count: int) -> int:
    """The smallest that is not less."""
    return 1 << (count - 1).bit_length()


# ---- the operator, opaque to the compiler ----

_library = torch.library.Library("q3vl", "FRAGMENT")
_library.define(
    "flex_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor new_slots, "
    "Tensor unwritten, Tensor lists, Tensor sizes) -> Tensor"
)


def _flex_attention(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    new_slots_T: Tensor,
    unwritten: Tensor,
    lists: Tensor,
    sizes: Tensor,
) -> Tensor:
    """Zeros into the unwritten slots, the new keys and values into theirs, then attend -> `[T, N, H]`, q's dtype."""
    for pool, new_TGH in ((k_pool, k_TGH), (v_pool, v_TGH)):
        pool.index_fill_(0, unwritten, 0).index_copy_(0, new_slots_T, new_TGH.to(pool.dtype))
    # The first call of a compiled layer is watched (torch._functorch.config.check_custom_op_aliasing) and sees other
    # dispatch keys than later ones, which would be a second graph. Below all of autograd they are the same.
    with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
        return flex_attend(q_TNH, k_pool, v_pool, *read_plan(lists, sizes))


_library.impl("flex_attention", _flex_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("q3vl::flex_attention")
def _(q_TNH: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q_TNH)
