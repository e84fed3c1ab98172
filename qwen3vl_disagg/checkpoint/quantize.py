"""Weight-only quantization of the decoder, by torchao: int8 or float8 (e4m3), symmetric, a scale for each output
channel.

Quantized are the attention projections, the experts or the dense MLP, and a head of its own: all that is read for each
token. The rest keeps its dtype: the router, because a small error in it picks other experts; norms and embeddings,
because they are small or read by row; a head that is the embedding; and the vision tower, which is no decoder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qwen3vl_disagg.core.settings import check_quantize
from qwen3vl_disagg.model.layers import Linear
from qwen3vl_disagg.model.moe import Experts
from qwen3vl_disagg.model.quantized import QuantizedExperts, QuantizedLinear

BLOCK = 2**20
"""Weights given to torchao at once, in float32, of which it makes copies. Small ones leave no holes in the heap."""
QUANTIZED_DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
_QUIET = "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"


def load_torchao() -> ModuleType:
    """`torchao.quantization`. Its own kernels are not used, and its lines on stderr about them are not shown."""
    check_quantize("int8")
    before, level = os.environ.get(_QUIET), logging.root.manager.disable
    os.environ[_QUIET] = "1"
    logging.disable(logging.WARNING)
    try:
        import torchao.quantization as quantization
    finally:
        logging.disable(level)
        if before is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = before
    return quantization


def quantize_into(weight: Tensor, quantized: Tensor, scales: Tensor) -> None:
    """`[.., D]` -> `quantized [.., D]` int8 or float8 and `scales [..]` float32, both contiguous.

    A row's numbers depend on that row alone, so experts are rows of one matrix, and a large matrix goes in blocks.
    """
    torchao = load_torchao()
    if quantized.dtype not in QUANTIZED_DTYPES.values():
        raise ValueError(f"weights are not quantized to {quantized.dtype}")
    is_int8 = quantized.dtype == torch.int8
    settings = torchao.Int8WeightOnlyConfig if is_int8 else torchao.Float8WeightOnlyConfig
    matrix = weight.detach().reshape(-1, weight.shape[-1])
    size = max(1, BLOCK // max(1, matrix.shape[1]))
    blocks = matrix.split(size), quantized.view(matrix.shape).split(size), scales.view(-1).split(size)
    for rows, out, scale in zip(*blocks, strict=True):
        holder = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        holder.weight = nn.Parameter(rows.float(), requires_grad=False)  # a bfloat16 would round the scale as well
        torchao.quantize_(holder, settings(set_inductor_config=False))
        made: Any = holder.weight
        # Of an int8 row's 255 steps both ends are half a step away; of a float8 row of zeros it makes 0 / 0.
        out.copy_(made.qdata.clamp(min=-127) if is_int8 else made.qdata.float().nan_to_num_(nan=0.0))
        scale.copy_(made.scale.squeeze(-1))
        del holder.weight  # torchao makes a cycle of the holder, which would keep the block until the next collection


def quantized_modules(module: nn.Module) -> Iterator[tuple[str, Linear | Experts]]:
    """(name, part) of the parts to quantize."""
    shared = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for name, part in list(module.named_modules()):
        is_decoder = isinstance(part, Linear) and part.bias is None and not name.endswith("mlp.gate")  # nor the tower's
        if isinstance(part, Experts) or (is_decoder and id(part.weight) not in shared):
            yield name, part


def make_room(module: nn.Module, dtype: torch.dtype, kind: str) -> set[str]:
    """Exchange the parts to quantize for empty ones of `kind` (int8 or float8). Returns the parameters to quantize."""
    names = set()
    for name, part in quantized_modules(module):
        made = QuantizedExperts if isinstance(part, Experts) else QuantizedLinear
        empty = made(part, dtype, QUANTIZED_DTYPES[kind])  # type: ignore[arg-type]
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, empty)
        names |= {f"{name}.{weight}" for weight, _ in empty.named_parameters()}
    return names
