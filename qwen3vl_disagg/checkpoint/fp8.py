"""Matrices in float8 (e4m3) with a scale for each block, as the published `*-FP8` files hold them.

Beside a tensor `NAME` stands `NAME_scale_inv`, for a matrix `[R, C]` of `[ceil(R / r), ceil(C / c)]` with blocks
`r x c`, for experts `[E, R, C]` one such table each. Despite its name it is multiplied:
`W[i, j] = float32(q[i, j]) * float32(scale[i // r, j // c])`, then rounded once to the dtype wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Block = tuple[int, int]
"""Rows and columns of a linear layer's weight `[out, in]` that share a scale. Where the files hold a weight the other
way round, its scales and the block's sides are the other way round too."""

DEFAULT_BLOCK: Block = (128, 128)
SCALE_SUFFIX = "_scale_inv"
FLOAT8 = "F8_E4M3"
SCALE_DTYPES = ("BF16", "F32")
MAX_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max
_MAX_SIDE = 2**16


def read_block(raw: Mapping[str, Any]) -> tuple[Block, list[str]]:
    """The block of a parsed `config.json`, and what about its `quantization_config` is not known here.

    Only the block is taken from it: which tensors are quantized is what their scales say.
    """
    text = raw.get("text_config")
    places = [("", raw)] + ([("text_config.", text)] if isinstance(text, Mapping) else [])
    found = [
        (f"{where}{name}", place[name])
        for where, place in places
        for name in ("quantization_config", "compression_config")
        if place.get(name) is not None
    ]
    block, problems = DEFAULT_BLOCK, []
    for where, value in found:
        if not isinstance(value, Mapping):
            problems.append(f"{where} must be an object, got {str(value)[:80]}")
            continue
        method, sides = value.get("quant_method"), value.get("weight_block_size", list(DEFAULT_BLOCK))
        if method != "fp8":
            problems.append(f"{where}.quant_method {method!r} is not supported (only 'fp8', block-scaled)")
            continue
        for name, ours in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
            if value.get(name, ours) != ours:
                problems.append(f"{where}.{name} {value[name]!r} is not supported (only {ours!r})")
        if isinstance(sides, list) and len(sides) == 2 and all(type(v) is int and 0 < v <= _MAX_SIDE for v in sides):
            block = (sides[0], sides[1])
        else:
            problems.append(f"{where}.weight_block_size must be two sides in 1..{_MAX_SIDE}, got {str(sides)[:80]}")
    return block, problems


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Of the scales of a matrix, or of experts' matrices, of `shape`."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def scale_rows(rows: range, num_dims: int, block: Block) -> range:
    """The rows (dim 0) of the scales that `rows` of a tensor with `num_dims` dims need."""
    return rows if num_dims == 3 else range(rows.start // block[0], -(-rows.stop // block[0]))


def dequantize_into(weight: Tensor, scale: Tensor, block: Block, out: Tensor, first_row: int = 0) -> None:
    """`weight [R, C]` float8 and its `scale` -> `out [R, C]`; `first_row` is the place of row 0 within its block."""
    num_rows, num_columns = weight.shape
    weight, scale = weight.to(out.device), scale.to(out.device, torch.float32)
    stops = [min(num_rows, (i + 1) * block[0] - first_row) for i in range(len(scale))]
    for start, stop, scales in zip([0, *stops], stops, scale, strict=False):
        columns = scales.repeat_interleave(block[1])[:num_columns]
        out[start:stop].copy_(weight[start:stop].float().mul_(columns))


def dequantize(weight: Tensor, scale: Tensor, block: Block, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A whole matrix, made anew."""
    out = torch.empty(weight.shape, dtype=dtype, device=device)
    dequantize_into(weight, scale, block, out)
    return out


def quantize_matrix(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """`[R, C]` -> the same in float8, and bfloat16 scales: each block's largest value becomes float8's largest.

    ValueError for numbers that are not finite. A block of zeros gets the scale 1.
    """
    num_rows, num_columns = weight.shape
    weight = weight.float()
    num_down, num_across = scale_shape((num_rows, num_columns), block)
    padded = F.pad(weight, (0, num_across * block[1] - num_columns, 0, num_down * block[0] - num_rows))
    largest = padded.abs().view(num_down, block[0], num_across, block[1]).amax((1, 3))
    if not largest.isfinite().all():
        raise ValueError("numbers that are not finite")
    scale = (largest / MAX_FLOAT8).to(torch.bfloat16)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    each = scale.float().repeat_interleave(block[0], 0)[:num_rows].repeat_interleave(block[1], 1)[:, :num_columns]
    return (weight / each).clamp_(-MAX_FLOAT8, MAX_FLOAT8).to(torch.float8_e4m3fn), scale


def num_scales(shape: tuple[int, ...], block: Block) -> int:
    return math.prod(scale_shape(shape, block))
