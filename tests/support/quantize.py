"""Quantizing what is in memory already: what loading has to make of the same weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from qwen3vl_disagg.checkpoint.quantize import QUANTIZED_DTYPES, make_room, quantize_into
from qwen3vl_disagg.model.kernels import use_kernels

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def quantize_tensor(weight: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """`[.., D]` -> the same in int8 or float8, and scales `[..]` float32."""
    quantized = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = torch.empty(weight.shape[:-1], device=weight.device)
    quantize_into(weight, quantized, scales)
    return quantized, scales


def quantize_(module: ModuleT, kind: str) -> ModuleT:
    """Quantize a loaded decoder in place, weight by weight."""
    weights = dict(module.named_parameters())
    for name in sorted(make_room(module, next(iter(weights.values())).dtype, kind)):
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        quantized, scale = quantize_tensor(weights.pop(name), QUANTIZED_DTYPES[kind])
        setattr(part, leaf, nn.Parameter(quantized, requires_grad=False))
        setattr(part, f"{leaf}_scale", scale)
    return use_kernels(module)
