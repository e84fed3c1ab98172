"""Small measurements that decide what to build: each way on the same tensors, its difference from the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen3vl_disagg.kernels import gpu
from qwen3vl_disagg.model import flex
from qwen3vl_disagg.model.moe import route, run_experts_grouped, run_experts_loop, run_experts_triton
from tools.gpu_steps.sizes import difference, least_ms, sizes_of
from tools.gpu_steps.step import Check

TOWER_HEADS, TOWER_HEAD, PATCHES = 16, 72, 4096
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def choices(check: Check) -> None:
    with torch.inference_mode():
        experts(check)
        attention(check)
        tower_attention(check)


def gathered(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Copies of each choice's matrices, then batched products: for few rows."""
    gate, up = torch.einsum("tkgd,td->tkg", gate_up_EGD[ids_TK], x_TD).chunk(2, dim=-1)
    y_TKD = torch.einsum("tkdf,tkf->tkd", down_EDF[ids_TK], F.silu(gate) * up)
    return (y_TKD.float() * weights_TK.float()[..., None]).sum(1).to(x_TD.dtype)


def experts(check: Check) -> None:
    """Milliseconds by rows, of the eager functions."""
    text = sizes_of(check).config.text
    generator = torch.Generator(check.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=check.device, dtype=torch.bfloat16) * 0.02

    hidden, width = text.hidden_size, text.moe_intermediate_size
    weights = (random(text.num_experts, 2 * width, hidden), random(text.num_experts, hidden, width))
    for rows in (1, 4, 9) if check.is_dry else (1, 8, 32, 128, 512):
        x = random(rows, hidden) * 50
        routed = route(random(rows, text.num_experts) * 50, text.num_experts_per_tok)
        expected = run_experts_loop(x, *routed, *weights)
        ways: dict[str, Experts] = {"loop": run_experts_loop, "grouped": run_experts_grouped}
        if rows <= gpu.MAX_FEW_ROWS:
            ways["gathered"] = gathered
        if check.needs_gpu(f"triton_{rows}"):
            ways["triton"] = run_experts_triton
        for name, way in ways.items():
            with check.part(f"{name}_{rows}"):
                off = difference(way(x, *routed, *weights), expected)
                milliseconds = least_ms(check, partial(way, x, *routed, *weights), 5)
                check.say(**{f"{name}_{rows}": {"ms": milliseconds, "difference": off}})


def attention(check: Check) -> None:
    """FlexAttention of a decode step, by the size of a page and the context."""
    text = sizes_of(check).config.text
    heads, kv_heads, size = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    for page in (16,) if check.is_dry else (16, 64, 128):
        for context in (40,) if check.is_dry else (1024, 8192, 32768):
            with check.part(f"flex_{page}_{context}"):
                pages = -(-context // page)
                shape = (pages * page, kv_heads, size)
                k, v = (torch.randn(shape, device=check.device, dtype=torch.bfloat16) for _ in "kv")
                kind = flex.flex_kind(check.device, page, num_sequences=1, is_decode=True)
                tables = torch.randperm(pages)[None]
                one, total = torch.tensor([1]), torch.tensor([context])
                plan = flex.make_plan(kind, one, total, tables, pages * page, torch.device(check.device))
                kind, lists = flex.read_plan(plan.lists, plan.sizes)
                q = torch.randn(1, heads, size, device=check.device, dtype=torch.bfloat16)
                if check.needs_gpu(f"flex_{page}_{context}"):
                    ms = least_ms(check, partial(flex.flex_attend, q, k, v, kind, lists))
                    check.say(**{f"flex_{page}_{context}": {"us": ms * 1e3}})


def tower_attention(check: Check) -> None:
    """Which of SDPA's backends take heads of the tower's size, and how fast."""
    patches = 64 if check.is_dry else PATCHES
    shape = (1, TOWER_HEADS, patches, TOWER_HEAD)
    q, k, v = (torch.randn(shape, device=check.device, dtype=torch.bfloat16) for _ in "qkv")
    for name in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        if name != "MATH" and not check.needs_gpu(f"sdpa_{name}"):
            continue
        with check.part(f"sdpa_{name}"), sdpa_kernel(getattr(SDPBackend, name)):
            check.say(**{f"sdpa_{name}": {"ms": least_ms(check, lambda: F.scaled_dot_product_attention(q, k, v), 5)}})
