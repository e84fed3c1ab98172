"""Checkpoint folders in float8, made without the package's own code for it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from tests.support.weights import edit_json, edit_tensors

MATRICES = re.compile(r".*\.layers\.\d+\.(self_attn\.._proj|mlp\.(gate|up|down)_proj|mlp\.experts\..*)(\.weight)?")


def split(weight: Tensor, block: tuple[int, int], scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`[.., R, C]` -> float8, scales, and what those two stand for in float32: block after block, one number at a time
    where that is easiest to read."""
    values, scales = torch.zeros(weight.shape).to(torch.float8_e4m3fn), []
    meant = torch.zeros(weight.shape)
    for i, row in enumerate(range(0, weight.shape[-2], block[0])):
        scales.append([])
        for column in range(0, weight.shape[-1], block[1]):
            place = (..., slice(row, row + block[0]), slice(column, column + block[1]))
            part = weight[place].float()
            scale = (part.abs().amax((-2, -1)) / 400).to(scale_dtype)
            q = (part / scale.float()[..., None, None]).to(torch.float8_e4m3fn)
            values[place], meant[place] = q, q.float() * scale.float()[..., None, None]
            scales[i].append(scale)
    return values, torch.stack([torch.stack(row, -1) for row in scales], -2), meant


def make_float8(
    folder: Path, block: tuple[int, int] = (128, 128), scale_dtype: torch.dtype = torch.bfloat16, *, hub: bool = True
) -> dict[str, Tensor]:
    """Quantize the decoder's matrices of a folder of one file in place; `block` is that of `[out, in]`.

    `hub`: fused experts are stored `[E, in, out]`. Returns what each of the tensors stands for, in float32.
    """
    meant: dict[str, Tensor] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if MATRICES.fullmatch(name):
                sides = block[::-1] if hub and tensors[name].dim() == 3 else block
                tensors[name], tensors[f"{name}_scale_inv"], meant[name] = split(tensors[name], sides, scale_dtype)

    edit_tensors(folder, edit)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    edit_json(folder, lambda config: config.update(quantization_config=settings))
    return meant
