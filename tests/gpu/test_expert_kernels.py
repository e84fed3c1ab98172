"""The Triton kernels of the expert layer on a GPU: the checks of the interpreter's tests, compiled."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not HAS_TRITON, reason="no CUDA device, or no Triton"),
]
CASES = {
    "check_route": "gpu_route",
    "check_route_of_broken_rows": "gpu_route",
    "check_order": "gpu_order",
    "check_pick": "gpu_pick",
    "check_swiglu": "gpu_swiglu",
    "check_combine": "gpu_combine",
    "check_experts": "gpu_few_rows",
    "check_sorted_experts": None,
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    """Few shapes: each is compiled."""
    from qwen3vl_disagg.kernels import gpu
    from qwen3vl_disagg.model.moe import run_experts_triton
    from tests.support import expert_kernels

    gpu.register()
    check = getattr(expert_kernels, name)
    op = run_experts_triton if CASES[name] is None else getattr(torch.ops.q3vl, CASES[name])

    @settings(max_examples=4, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def run(data):
        check(data.draw, op, "cuda")

    with torch.inference_mode():
        run()


def test_at_the_published_size():
    """A layer of 30B-A3B, few rows and many, against the PyTorch code on the same tensors."""
    from qwen3vl_disagg.kernels import gpu
    from qwen3vl_disagg.model.moe import route, run_experts_grouped, run_experts_triton

    gpu.register()
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) * scale

    gate_up, down = normal(128, 1536, 2048, scale=2048**-0.5), normal(128, 2048, 768, scale=768**-0.5)
    for rows in (1, 8, 9, 600):
        x, logits = normal(rows, 2048), normal(rows, 128)
        weights, ids = torch.ops.q3vl.gpu_route(logits, 8)
        torch.testing.assert_close(weights, route(logits, 8)[0], atol=1e-2, rtol=1e-2)
        actual = run_experts_triton(x, weights, ids, gate_up, down)
        torch.testing.assert_close(actual, run_experts_grouped(x, weights, ids, gate_up, down), atol=3e-2, rtol=3e-2)
