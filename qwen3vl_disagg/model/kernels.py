"""Which parts of a loaded module run through the CPU kernels, and which weights are one on CUDA."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from qwen3vl_disagg.kernels import int8, ops
from qwen3vl_disagg.model.attention import Attention
from qwen3vl_disagg.model.decoder import Qwen3MoeModel
from qwen3vl_disagg.model.layers import Linear, RMSNorm, SwiGLU, join
from qwen3vl_disagg.model.moe import Experts, SparseMoe, takes_grouped_mm
from qwen3vl_disagg.model.quantized import QuantizedExperts, QuantizedLinear
from qwen3vl_disagg.model.vision import VisionAttention, VisionMlp

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def use_kernels(module: ModuleT) -> ModuleT:
    """Let every part whose weights the kernels can read use them; nothing changes where there are none.

    For inference alone: kernels have no gradients. To be called once the weights are in place, and again after they
    were replaced, before an engine is made.
    """
    for part in module.modules():
        if isinstance(part, QuantizedLinear):
            part.use_kernel = int8.can_linear_int8(part.weight, part.dtype)
        elif isinstance(part, QuantizedExperts):
            gate_up, _, down, _ = part.local_weights()
            part.impl = "kernel" if len(gate_up) and int8.can_experts_int8(down, part.dtype) else "grouped"
        elif isinstance(part, Linear):
            is_plain = _is_plain(part.weight)
            part.use_kernel = is_plain and part.bias is None and ops.can_linear(part.weight[:1], part.weight)
            part.use_tiles = is_plain and ops.can_many_rows(part.weight)
        elif isinstance(part, RMSNorm):
            part.use_kernel = _is_plain(part.weight) and ops.can_norm(len(part.weight), part.weight)
        elif isinstance(part, Qwen3MoeModel):
            part.use_kernel = ops.is_cpu_bf16(part.norm.weight)
        elif isinstance(part, SparseMoe):
            weight = part.gate.weight
            part.use_kernel = _is_plain(weight) and ops.can_route(len(weight), part.num_experts_per_tok, weight)
        elif isinstance(part, SwiGLU):
            weight = part.gate_proj.weight
            part.use_kernel = _is_plain(weight) and ops.can_swiglu(len(weight), weight)
            join(part.gate_proj, part.up_proj)
        elif isinstance(part, Attention):
            join(part.q_proj, part.k_proj, part.v_proj)
        elif isinstance(part, Experts):
            gate_up, down = part.local_weights()
            is_kernel = len(down) > 0 and all(map(_is_plain, (gate_up, down))) and ops.can_experts(down, gate_up, down)
            is_grouped = takes_grouped_mm(down.device.type, down.dtype, *down.shape[1:])
            part.impl = "kernel" if is_kernel else "grouped" if is_grouped else "loop"
        elif isinstance(part, VisionAttention):
            part.use_kernel = _is_plain(part.qkv.weight) and ops.can_attend_frames(part.head_dim, part.qkv.weight)
        elif isinstance(part, VisionMlp):
            part.use_kernel = _is_plain(part.linear_fc1.weight) and ops.is_cpu_bf16(part.linear_fc1.weight)
    return module


def _is_plain(weight: Tensor) -> bool:
    """Not quantized, and here."""
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_meta and weight.dtype == torch.bfloat16
