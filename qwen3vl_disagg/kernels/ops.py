"""The kernels as operators that `torch.compile` knows: called at once in eager code, nodes in a graph.

Dims: T tokens, D hidden, N query heads, G kv heads, H head size, E experts, K experts per token, F expert width,
B sequences, W pages of the longest one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3vl_disagg.kernels.build import load
from qwen3vl_disagg.kernels.calls import call, library, num_threads, scratch

MAX_LINEAR_ROWS = 48
"""With more rows a matrix is read often enough that a blocked multiplication is faster."""

_library = torch.library.Library("q3vl", "DEF")


def is_cpu_bf16(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: plain bfloat16 tensors on a CPU that can."""
    return tensors[0].device.type == "cpu" and all(t.dtype == torch.bfloat16 for t in tensors) and load() is not None


def has_kernels() -> bool:
    return load() is not None


def need(holds: bool, what: str, *tensors: Tensor) -> None:
    """ValueError unless `holds`. The kernels get plain addresses: what does not fit must not reach them."""
    if not holds:
        given = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device.type}" for t in tensors)
        raise ValueError(f"the CPU kernels take {what}, got {given}")


def is_dense(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether all of them are of this dtype, on the CPU, and in one piece."""
    for tensor in tensors:  # noqa: SIM110 - half of what a generator costs, in every call of every layer
        if tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return False
    return True


def is_on_cpu(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether all of them are of this dtype and on the CPU."""
    return all(t.dtype is dtype and t.is_cpu for t in tensors)


MAX_KERNEL_ROWS, MAX_KERNEL_WEIGHTS = 64, 4
MIN_TILE_ROWS = 4
"""For each expert, from which on AMX pays; with fewer, reading the weights is all."""
TILE_ROWS = 128
"""Rows of an expert that AMX takes at a time, each block of them filled up to whole tiles of 16."""

# ---- linear ----

_library.define("linear(Tensor x, Tensor[] weights) -> Tensor")


def _linear(x_TD: Tensor, weights: list[Tensor]) -> Tensor:
    """`[T, N]`: the products with up to 4 weights side by side."""
    x_TD, depth = x_TD.contiguous(), x_TD.shape[-1]
    fits = x_TD.dim() == 2 and x_TD.shape[0] <= MAX_KERNEL_ROWS and 0 < len(weights) <= MAX_KERNEL_WEIGHTS
    fits = fits and depth % 32 == 0 and is_dense(torch.bfloat16, x_TD, *weights)
    shapes = [weight.shape for weight in weights]
    for shape in shapes:
        fits = fits and len(shape) == 2 and shape[1] == depth and shape[0] % 4 == 0
    need(fits, "a few bfloat16 rows and up to 4 weights of whole pieces", x_TD, *weights)
    sizes = [shape[0] for shape in shapes]
    out = x_TD.new_empty(x_TD.shape[0], sum(sizes))
    addresses = (ctypes.c_void_p * len(sizes))(*[weight.data_ptr() for weight in weights])
    by_tiles = has_tiles() and all(size % 32 == 0 for size in sizes)
    num_groups = max(-(-len(x_TD) // 16), num_threads()) if by_tiles else 0
    packed = scratch("packed", num_groups * 16, depth, dtype=torch.bfloat16)
    arrays = (addresses, (ctypes.c_long * len(sizes))(*sizes))
    call("linear", x_TD, *arrays, len(sizes), packed, out, *out.shape, depth, by_tiles, reads=weights)
    return out


_library.impl("linear", _linear, "CPU")


def linear(x_TD: Tensor, weights: list[Tensor]) -> Tensor:
    """The operator; eager code has no use for the dispatcher, whose way is a quarter of a call with little work."""
    return torch.ops.q3vl.linear(x_TD, weights) if torch.compiler.is_compiling() else _linear(x_TD, weights)


@torch.library.register_fake("q3vl::linear")
def _(x_TD: Tensor, weights: list[Tensor]) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], sum(len(weight) for weight in weights))


def can_linear(x_TD: Tensor, weight_ND: Tensor) -> bool:
    """Few rows of plain bfloat16, sizes the kernel takes."""
    num_out, depth = weight_ND.shape
    is_small = x_TD.dim() == 2 and x_TD.shape[0] <= MAX_LINEAR_ROWS and num_out % 4 == 0 and depth % 32 == 0
    return is_small and is_cpu_bf16(x_TD, weight_ND)


PANEL_NUMBERS = 1 << 19
"""Of a weight's part that stays in the second cache, half of a small one of today."""


def can_many_rows(weight_ND: Tensor) -> bool:
    """Plain bfloat16 of sizes that tiles take, where the processor has them."""
    num_out, depth = weight_ND.shape
    return num_out >= 64 and depth > 0 and num_out % 16 == depth % 16 == 0 and is_cpu_bf16(weight_ND) and has_tiles()


def many_rows(x_TD: Tensor, weights: list[Tensor], bias_N: Tensor | None = None, *, is_gelu: bool = False) -> Tensor:
    """`[T, N]`: the products with up to 4 weights side by side, plus a bias; of that gelu in its tanh form, rounded
    where the operators round. By tiles, for which `can_many_rows` is to be asked."""
    x_TD, depth = x_TD.contiguous(), x_TD.shape[-1]
    sizes = [len(weight) for weight in weights]
    num_out = sum(sizes)
    fits = x_TD.dim() == 2 and depth > 0 == depth % 16 and 0 < len(weights) <= MAX_KERNEL_WEIGHTS and has_tiles()
    fits = fits and all(w.dim() == 2 and w.shape[1] == depth and len(w) > 0 == len(w) % 16 for w in weights)
    fits = fits and (bias_N is None or (bias_N.shape == (num_out,) and is_dense(torch.bfloat16, bias_N)))
    need(fits and is_dense(torch.bfloat16, x_TD, *weights), "bfloat16 rows and weights of whole pieces", x_TD, *weights)
    out = x_TD.new_empty(len(x_TD), num_out)
    panel = max(32, min(PANEL_NUMBERS // depth, 128) // 32 * 32)
    packed = x_TD.new_empty(num_threads(), panel + 32, -(-depth // 32) * 32)
    addresses = (ctypes.c_void_p * len(sizes))(*[weight.data_ptr() for weight in weights])
    arrays = (addresses, (ctypes.c_long * len(sizes))(*sizes), len(sizes))
    call("many_rows", x_TD, *arrays, 0 if bias_N is None else bias_N, is_gelu, panel, packed, out, *out.shape, depth)
    return out


def can_swiglu(width: int, weight: Tensor) -> bool:
    """Sizes the kernel takes; `weight` for device and dtype."""
    return width % 16 == 0 and is_cpu_bf16(weight)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`silu(gate) * up`, rounded where the two operators round -> `[T, F]`. Rows may lie apart."""
    gate_TF, up_TF = _with_whole_rows(gate_TF), _with_whole_rows(up_TF)
    fits = is_on_cpu(torch.bfloat16, gate_TF, up_TF) and gate_TF.dim() == 2 and gate_TF.shape == up_TF.shape
    need(fits and gate_TF.shape[1] % 16 == 0, "bfloat16 rows of whole pieces", gate_TF, up_TF)
    num_rows, width = gate_TF.shape
    out = gate_TF.new_empty(num_rows, width)
    call("swiglu", gate_TF, gate_TF.stride(0), up_TF, up_TF.stride(0), out, num_rows, width)
    return out


# ---- experts ----


@functools.cache
def has_tiles() -> bool:
    """Whether the kernels may use the tiles of AMX: the processor, the compiler and the system know them."""
    found = ctypes.c_int()
    library().q3_has_tiles(ctypes.byref(found))
    return bool(found.value)


def takes_tiles(num_tokens: int, num_choices: int, num_experts: int) -> bool:
    """Whether experts run by tiles. Never for as few tokens as the kernel of linear layers takes: there a row's bits
    here do not depend on how many others there are."""
    is_many = num_tokens > MAX_LINEAR_ROWS and num_tokens * num_choices >= MIN_TILE_ROWS * num_experts
    return is_many and has_tiles()


_library.define("experts(Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor down, bool may_tile) -> Tensor")


def _experts(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, may_tile: bool
) -> Tensor:
    x_TD, weights_TK, ids_TK = x_TD.contiguous(), weights_TK.contiguous(), ids_TK.contiguous()
    need(
        is_dense(torch.bfloat16, x_TD, weights_TK, gate_up_EGD, down_EDF)
        and fit_experts(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF),
        "bfloat16 rows, weights and experts of whole pieces",
        *(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF),
    )
    (num_tokens, hidden), num_choices = x_TD.shape, ids_TK.shape[1]
    num_experts, _, width = down_EDF.shape
    num_rows = num_tokens * num_choices
    by_tiles = may_tile and takes_tiles(num_tokens, num_choices, num_experts)
    num_blocks = num_experts + num_rows // TILE_ROWS if by_tiles else 0
    index = scratch("index", num_experts + 1 + 2 * num_rows + 4 * num_blocks, dtype=torch.int32)
    act = scratch("act", num_rows + 16 * num_blocks, width, dtype=torch.bfloat16)
    y, out = scratch("y", len(act), hidden, dtype=torch.bfloat16), torch.empty_like(x_TD)
    tensors = (x_TD, ids_TK, weights_TK, gate_up_EGD, down_EDF, index, act, y, out)
    call("experts", *tensors, num_tokens, num_experts, num_choices, hidden, width, by_tiles)
    return out


def fit_experts(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> bool:
    """Whether shapes fit together and sizes the kernel, and ids are int64."""
    if x_TD.dim() != 2 or ids_TK.dim() != 2 or down_EDF.dim() != 3 or not is_dense(torch.int64, ids_TK):
        return False
    hidden, width = down_EDF.shape[1:]
    sizes = x_TD.shape == (ids_TK.shape[0], hidden) and weights_TK.shape == ids_TK.shape
    sizes = sizes and gate_up_EGD.shape == (down_EDF.shape[0], 2 * width, hidden)
    return sizes and hidden % 32 == 0 and width % 32 == 0


_library.impl("experts", _experts, "CPU")


def experts(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, may_tile: bool = True
) -> Tensor:
    """The weighted sum over each token's experts `[T, D]`. Not `may_tile`: a row's bits are those that it has alone."""
    run = torch.ops.q3vl.experts if torch.compiler.is_compiling() else _experts
    return run(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF, may_tile)


@torch.library.register_fake("q3vl::experts")
def _(x_TD: Tensor, *_: Tensor | bool) -> Tensor:
    return torch.empty_like(x_TD)


def can_experts(x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> bool:
    """Plain bfloat16, sizes the kernel takes."""
    hidden, width = down_EDF.shape[1:]
    return hidden % 32 == 0 and width % 32 == 0 and is_cpu_bf16(x_TD, gate_up_EGD, down_EDF)


MAX_EXPERTS = 1024


def can_route(num_experts: int, num_choices: int, weight: Tensor) -> bool:
    """Sizes the kernel takes; `weight` for device and dtype."""
    return 0 < num_choices <= num_experts <= MAX_EXPERTS and is_cpu_bf16(weight)


def route(logits_TE: Tensor, num_choices: int) -> tuple[Tensor, Tensor]:
    """Softmax, the largest `num_choices`, renormalised, in float32 -> weights `[T, K]` bfloat16, ids `[T, K]` int64; of
    equal ones those that `Tensor.topk` takes."""
    fits = is_dense(torch.bfloat16, logits_TE) and logits_TE.dim() == 2
    fits = fits and 0 < num_choices <= logits_TE.shape[1] <= MAX_EXPERTS
    need(fits, f"bfloat16 logits of up to {MAX_EXPERTS} experts", logits_TE)
    weights_TK = logits_TE.new_empty(len(logits_TE), num_choices)
    ids_TK = torch.empty(weights_TK.shape, dtype=torch.int64)
    call("route", logits_TE, weights_TK, ids_TK, *logits_TE.shape, num_choices)
    return weights_TK, ids_TK


# ---- sampling ----


def can_take_largest(logits_BV: Tensor) -> bool:
    return is_cpu_bf16(logits_BV) and logits_BV.is_contiguous()


def largest(logits_BV: Tensor, banned_ids: Sequence[int], more_ids: Sequence[int], has_more: list[bool]) -> list[int]:
    """The id of each row's largest logit, the lowest of equal ones, none of `banned_ids`, nor of `more_ids` in the rows
    of `has_more` (ids that are not of the vocabulary mean nothing); -1 where a logit of the row is not finite."""
    num_rows, vocab_size = logits_BV.shape
    lists = [sorted(i for i in {*ids} if 0 <= i < vocab_size) for ids in (banned_ids, (*banned_ids, *more_ids))]
    fits = is_dense(torch.bfloat16, logits_BV) and len(has_more) == num_rows and vocab_size < 2**31
    need(fits, "bfloat16 logits and a flag for each row", logits_BV)
    sizes = [len(ids) for ids in lists]
    arrays = (ctypes.c_int64 * (sum(sizes) or 1))(*lists[0], *lists[1]), (ctypes.c_long * 2)(*sizes)
    ids_B = (ctypes.c_int64 * (num_rows or 1))()
    call("largest", logits_BV, *arrays, (ctypes.c_uint8 * (num_rows or 1))(*has_more), ids_B, num_rows, vocab_size)
    return ids_B[:num_rows]


# ---- norm ----


def can_norm(size: int, weight: Tensor) -> bool:
    """Sizes the kernel takes, with or without the rotary embedding."""
    return size % 32 == 0 and is_cpu_bf16(weight)


def _with_whole_rows(x: Tensor) -> Tensor:
    """Rows may lie apart (pieces of a wider product), each in one piece."""
    is_whole = x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])
    return x if is_whole else x.contiguous()


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim, rounded where `RMSNorm` rounds -> the shape of `x`."""
    x_TD, size = x_TD.contiguous(), x_TD.shape[-1]
    fits = is_dense(torch.bfloat16, x_TD, weight_D) and weight_D.shape == (size,) and size % 32 == 0
    need(fits, "bfloat16 rows and weights of whole pieces", x_TD, weight_D)
    out = torch.empty_like(x_TD)
    call("rms_norm", x_TD, weight_D, float(eps), out, x_TD.numel() // size, size)
    return out


def add_rms_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + y` and its RMSNorm, each rounded where it is by itself."""
    x_TD, y_TD = x_TD.contiguous(), y_TD.contiguous()
    fits = is_dense(torch.bfloat16, x_TD, y_TD, weight_D) and x_TD.dim() == 2 and x_TD.shape == y_TD.shape
    fits = fits and weight_D.shape == x_TD.shape[1:] and x_TD.shape[1] % 32 == 0
    need(fits, "bfloat16 rows and weights of whole pieces", x_TD, y_TD, weight_D)
    sum_TD, out_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    call("add_rms_norm", x_TD, y_TD, weight_D, float(eps), sum_TD, out_TD, *x_TD.shape)
    return sum_TD, out_TD


def norm_rotary(x_TNH: Tensor, weight_H: Tensor, eps: float, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """RMSNorm of each head, then the rotary embedding -> `[T, N, H]`."""
    x_TNH, cos_T1H, sin_T1H = _with_whole_rows(x_TNH), cos_T1H.contiguous(), sin_T1H.contiguous()
    num_tokens, num_heads, size = x_TNH.shape
    fits = x_TNH.dtype is torch.bfloat16 and x_TNH.is_cpu and is_dense(torch.bfloat16, weight_H, cos_T1H, sin_T1H)
    fits = fits and weight_H.shape == (size,) and size % 32 == 0
    fits = fits and cos_T1H.shape == sin_T1H.shape == (num_tokens, 1, size)
    need(fits, "bfloat16 heads of whole pieces", x_TNH, weight_H, cos_T1H, sin_T1H)
    out = x_TNH.new_empty(num_tokens, num_heads, size)
    call("norm_rotary", x_TNH, x_TNH.stride(0), weight_H, float(eps), cos_T1H, sin_T1H, out, *out.shape)
    return out


def text_rotary(positions_3T: Tensor, inv_freq_J: Tensor, axis_J: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, 1, 2 * J]` of the angles `positions[axis_J] * inv_freq_J`, times `factor`."""
    num_tokens, half = positions_3T.shape[1], len(inv_freq_J)
    fits = is_on_cpu(torch.int64, positions_3T) and len(positions_3T) == 3 and positions_3T.stride(1) == 1
    fits = fits and is_dense(torch.float32, inv_freq_J) and is_dense(torch.int64, axis_J)
    fits = fits and inv_freq_J.shape == axis_J.shape == (half,)
    need(fits, "int64 positions on three axes and a frequency and an axis for each angle", positions_3T, inv_freq_J)
    cos, sin = (torch.empty(num_tokens, 1, 2 * half, dtype=torch.bfloat16) for _ in "cs")
    call("rotary", positions_3T, positions_3T.stride(0), inv_freq_J, axis_J, float(factor), cos, sin, num_tokens, half)
    return cos, sin


# ---- attention ----


HEAD_SIZES, MAX_GROUP = (64, 128), 16


def can_attend(q_TNH: Tensor, num_kv_heads: int) -> bool:
    """Plain bfloat16 queries, a head size and a group the kernels take."""
    num_heads, size = q_TNH.shape[1:]
    return size in HEAD_SIZES and num_heads <= MAX_GROUP * num_kv_heads and is_cpu_bf16(q_TNH)


def can_attend_frames(head_dim: int, weight: Tensor) -> bool:
    """Heads of the vision tower that the kernel takes; `weight` for device and dtype."""
    return head_dim in HEAD_SIZES and is_cpu_bf16(weight)


def _padded(length: int) -> int:
    return -(-length // 128) * 128


def _need_attention(q_TNH: Tensor, k_pool: Tensor, v_pool: Tensor, *places: Tensor) -> None:
    fits = q_TNH.dim() == k_pool.dim() == 3 and k_pool.shape == v_pool.shape and q_TNH.shape[2] == k_pool.shape[2]
    fits = fits and is_dense(torch.bfloat16, q_TNH, k_pool, v_pool)
    fits = fits and is_dense(torch.int64, *places) and q_TNH.shape[1] % k_pool.shape[1] == 0
    fits = fits and q_TNH.shape[2] in HEAD_SIZES and q_TNH.shape[1] <= MAX_GROUP * k_pool.shape[1]
    need(fits, f"bfloat16 queries and pages with heads of {HEAD_SIZES}", q_TNH, k_pool, v_pool, *places)


def prefill_attention(q_TNH: Tensor, k_pool: Tensor, v_pool: Tensor, slots_L: Tensor) -> Tensor:
    """New tokens at the end of one sequence's context -> `[T, N, H]`. Pools `[slots, G, H]` bfloat16, contiguous."""
    q_TNH = q_TNH.contiguous()
    _need_attention(q_TNH, k_pool, v_pool, slots_L)
    (num_new, num_heads, size), (_, num_kv_heads, _) = q_TNH.shape, k_pool.shape
    length = slots_L.shape[0]
    need(0 < num_new <= length, "no more queries than the context has tokens", q_TNH, slots_L)
    packed = q_TNH.new_empty(2 * num_kv_heads * _padded(length) * size)
    out = torch.empty_like(q_TNH)
    places = (k_pool, v_pool, slots_L.contiguous(), length)
    call("prefill_attention", q_TNH, num_new, *places, num_heads, num_kv_heads, size, packed, out)
    return out


def decode_attention(
    q_BNH: Tensor,
    k_BGH: Tensor,
    v_BGH: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    tables_BW: Tensor,
    contexts_B: Tensor,
    slots_B: Tensor,
    page_size: int,
) -> Tensor:
    """One new token for each sequence: its key and value into their slots, then attend -> `[B, N, H]`.

    Pools `[slots, G, H]` bfloat16; tables, contexts (with the new token) and slots int64.
    """
    q_BNH, k_BGH, v_BGH = q_BNH.contiguous(), _with_whole_rows(k_BGH), _with_whole_rows(v_BGH)
    tables_BW, contexts_B, slots_B = tables_BW.contiguous(), contexts_B.contiguous(), slots_B.contiguous()
    _need_attention(q_BNH, k_pool, v_pool, tables_BW, contexts_B, slots_B)
    (num_sequences, num_heads, size), (_, num_kv_heads, _) = q_BNH.shape, k_pool.shape
    fits = is_on_cpu(torch.bfloat16, k_BGH, v_BGH)
    fits = fits and k_BGH.shape == v_BGH.shape == (num_sequences, num_kv_heads, size)
    fits = fits and len(tables_BW) == len(contexts_B) == len(slots_B) == num_sequences
    need(fits, "a bfloat16 key and value for each query", q_BNH, k_BGH, v_BGH, tables_BW, contexts_B, slots_B)
    out = torch.empty_like(q_BNH)
    new = (q_BNH, k_BGH, k_BGH.stride(0), v_BGH, v_BGH.stride(0))
    places = (k_pool, v_pool, tables_BW, tables_BW.shape[1], contexts_B, slots_B, page_size)
    call("decode_attention", *new, *places, num_sequences, num_heads, num_kv_heads, size, out)
    return out


def full_attention(q_PNH: Tensor, k_PNH: Tensor, v_PNH: Tensor, lengths: list[int], tiles: bool = True) -> Tensor:
    """Frames of these lengths behind one another, each by itself -> `[P, N, H]`. Pieces of one packed product are read
    where they lie. `tiles`: by AMX, where the processor has it."""
    q_PNH, k_PNH, v_PNH = _with_whole_rows(q_PNH), _with_whole_rows(k_PNH), _with_whole_rows(v_PNH)
    if not q_PNH.stride(0) == k_PNH.stride(0) == v_PNH.stride(0):
        q_PNH, k_PNH, v_PNH = q_PNH.contiguous(), k_PNH.contiguous(), v_PNH.contiguous()
    _, num_heads, size = q_PNH.shape
    fits = q_PNH.shape == k_PNH.shape == v_PNH.shape and size in HEAD_SIZES and sum(lengths) == len(q_PNH)
    fits = fits and min(lengths) >= 0 and is_on_cpu(torch.bfloat16, q_PNH, k_PNH, v_PNH)
    need(fits, f"bfloat16 heads of {HEAD_SIZES} and frames of all rows", q_PNH, k_PNH, v_PNH)
    out = q_PNH.new_empty(q_PNH.shape)
    packed = q_PNH.new_empty(2 * num_heads * _padded(max(lengths)) * size)
    stride, start = q_PNH.stride(0), 0
    for length in lengths:
        pointers = (t.data_ptr() + start * stride * t.itemsize for t in (q_PNH, k_PNH, v_PNH))
        to = out.data_ptr() + start * num_heads * size * out.itemsize
        call("full_attention", *pointers, stride, length, num_heads, size, packed, to, tiles)
        start += length
    return out


# ---- what else a vision block is made of ----


def rotate_(x_PNH: Tensor, cos_P1H: Tensor, sin_P1H: Tensor) -> None:
    """`apply_rotary` in float32, with the result rounded, in place. Rows may lie apart, the heads of one may not."""
    cos_P1H, sin_P1H = cos_P1H.contiguous(), sin_P1H.contiguous()
    num_patches, num_heads, size = x_PNH.shape
    fits = is_on_cpu(torch.bfloat16, x_PNH) and x_PNH.stride(1) == size and x_PNH.stride(2) == 1 and size % 32 == 0
    fits = fits and is_dense(torch.float32, cos_P1H, sin_P1H)
    fits = fits and cos_P1H.shape == sin_P1H.shape == (num_patches, 1, size)
    need(fits, "bfloat16 heads of whole pieces and float32 angles", x_PNH, cos_P1H, sin_P1H)
    call("rotate", x_PNH, x_PNH.stride(0), cos_P1H, sin_P1H, num_patches, num_heads, size)


def gelu_tanh_(x: Tensor) -> Tensor:
    """`gelu` with the tanh form, in place."""
    need(is_dense(torch.bfloat16, x), "bfloat16 in one piece", x)
    call("gelu_tanh", x, x.numel())
    return x
