"""The int8 kernels against the dequantized weights in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qwen3vl_disagg.kernels import build, int8, ops
from qwen3vl_disagg.model.moe import route

pytestmark = pytest.mark.skipif(build.load() is None, reason="no AVX-512 BF16 or no C++ compiler")


def bf16(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def quantized(*shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Any weight and scales of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return weight, torch.rand(shape[:-1], generator=generator) * 0.01 + 1e-4


def exact(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight.double() * scale.double().unsqueeze(-1)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert actual.dtype == torch.bfloat16
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


def test_every_int8_is_itself():
    """A row with one weight times one: bfloat16 holds each int8, so nothing is lost; for every way to read a row."""
    values = torch.arange(-127, 128).repeat(2)[:256].to(torch.int8)
    for place in (0, 31, 32, 63, 64, 95):
        weight = torch.zeros(256, 96, dtype=torch.int8)
        weight[:, place] = values
        for rows in (*range(1, 8), ops.MAX_LINEAR_ROWS):
            x = torch.zeros(rows, 96).bfloat16()
            x[:, place] = 1
            out = torch.ops.q3vl.linear_int8(x, weight, torch.ones(256))
            assert torch.equal(out, values.bfloat16().expand(rows, 256))


@given(
    rows=st.integers(1, ops.MAX_LINEAR_ROWS), blocks=st.integers(1, 9), depth=st.integers(1, 7), seed=st.integers(0, 99)
)
def test_linear(rows, blocks, depth, seed):
    x, weight = bf16(rows, 32 * depth, seed=seed), quantized(4 * blocks, 32 * depth, seed=seed + 1)
    assert int8.can_linear_int8(weight[0], x.dtype)
    expected = F.linear(x.double(), exact(*weight))
    assert distance(torch.ops.q3vl.linear_int8(x, *weight), expected) < 2**-8


def rounded_experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """`run_experts_loop` with float64 weights, rounded to bfloat16 where it rounds."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, choice in ((t, k) for t in range(ids.shape[0]) for k in range(ids.shape[1])):
        expert = ids[token, choice]
        if expert >= len(down):
            continue  # away
        gate, up = F.linear(x[token].double(), gate_up[expert]).bfloat16().chunk(2)
        y = F.linear((F.silu(gate) * up).double(), down[expert]).bfloat16()
        out[token] += y.double() * weights[token, choice].double()
    return out


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 60),
    experts=st.integers(1, 9),
    away=st.integers(0, 2),
    choices=st.integers(1, 4),
    hidden=st.integers(1, 4),
    width=st.integers(1, 4),
    skew=st.sampled_from([0.0, 30.0]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_experts(tokens, experts, away, choices, hidden, width, skew, threads, seed):
    """All tokens to few experts, which then have more rows than a block; the last away; threads' own scratch."""
    x = bf16(tokens, 32 * hidden, seed=seed)
    logits = bf16(tokens, experts + away, seed=seed + 1) + skew * (torch.arange(experts + away) < 2)
    weights, ids = route(logits.bfloat16(), min(choices, experts + away))
    gate_up = quantized(experts, 64 * width, 32 * hidden, seed=seed + 2)
    down = quantized(experts, 32 * hidden, 32 * width, seed=seed + 3)
    assert int8.can_experts_int8(down[0], x.dtype)
    expected = rounded_experts(x, weights, ids, exact(*gate_up), exact(*down))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = torch.ops.q3vl.experts_int8(x, weights, ids, *gate_up, *down)
    finally:
        torch.set_num_threads(before)
    assert distance(actual, expected) < 2**-7


def test_what_is_not_finite_stays_so():
    x, weight = bf16(2, 32, seed=0), quantized(4, 32, seed=1)
    x[1, 3] = float("nan")
    assert torch.ops.q3vl.linear_int8(x, *weight).isnan().any(1).tolist() == [False, True]


def test_other_dtypes_and_sizes_are_left_to_torch():
    assert not int8.can_linear_int8(quantized(8, 64, seed=0)[0], torch.float32)
    assert not int8.can_linear_int8(quantized(8, 48, seed=0)[0], torch.bfloat16)
    assert not int8.can_experts_int8(quantized(2, 64, 48, seed=0)[0], torch.bfloat16)
    assert not int8.can_experts_int8(quantized(2, 64, 64, seed=0)[0], torch.float32)


def test_operators_tell_the_compiler_the_truth():
    x = bf16(3, 64, seed=0)
    torch.library.opcheck(torch.ops.q3vl.linear_int8.default, (x, *quantized(8, 64, seed=1)))
    ids, weights = torch.tensor([[0, 1], [1, 0], [0, 1]]), bf16(3, 2, seed=3)
    experts = (*quantized(2, 64, 64, seed=4), *quantized(2, 64, 32, seed=5))
    torch.library.opcheck(torch.ops.q3vl.experts_int8.default, (x, weights, ids, *experts))
    torch.library.opcheck(torch.ops.q3vl.experts_dequantized.default, (x, weights, ids, *experts))
