"""Experts and the tower's attention as they run on a GPU: without a wait, and with no more than a step uses."""

from __future__ import annotations

import copy

import pytest
import torch

from qwen3vl_disagg.model import moe, quantized
from qwen3vl_disagg.model.vision import attend_frames
from tests.model.test_expert_impls import inputs, make_experts
from tests.model.test_expert_impls import quantized as quantize
from tests.support.simcuda import DEVICE, WAITS, simulated, to_device

BF16, F32 = torch.bfloat16, torch.float32
KINDS = [None, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "hidden"), [(BF16, 32), (BF16, 36), (F32, 32)])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_experts_without_a_wait(kind, dtype, hidden, num_tokens, monkeypatch):
    """Also where `grouped_mm` does not take them. One token of two choices dequantizes two experts. A
    choice that is remote adds nothing, whatever `grouped_mm` leaves in its row."""
    experts = make_experts(hidden, 24, dtype)
    given = inputs(hidden, dtype, num_tokens=num_tokens)
    given[2][-1, 0] = 6  # on another rank
    expected = moe.run_experts_loop(*given, *experts.parameters())
    experts = experts if kind is None else quantize(experts, kind)
    numbers = []
    dequantize = quantized.dequantize
    monkeypatch.setattr(quantized, "dequantize", lambda w, *args: numbers.append(len(w)) or dequantize(w, *args))
    with simulated() as watch:
        on_device = to_device(copy.deepcopy(experts), watch)
        x, weights, ids = (t.to(DEVICE) for t in given)
        watch.reset()
        found = on_device(x, weights, ids)
        assert watch.of(*WAITS) == 0, str(watch)
        assert not watch.problems
        actual = found.elem
    torch.testing.assert_close(actual, expected, atol=2e-2 if kind is None else 0.1, rtol=2e-2 if kind is None else 0.2)
    is_grouped = dtype == BF16 and hidden == 32
    most = min(6, 2 * num_tokens) if is_grouped else 2 * num_tokens
    assert numbers == ([] if kind is None else [most, most])


def test_copies_of_matrices_have_a_bound(monkeypatch):
    """What would be more goes one by one, as on a CPU."""
    given = inputs(32, F32)
    experts = make_experts(32, 20, F32)
    expected = experts(*given)
    monkeypatch.setattr(moe, "MAX_GATHERED_BYTES", 1 << 10)
    with simulated() as watch:
        on_device = to_device(experts, watch)
        found = on_device(*(t.to(DEVICE) for t in given))
        assert watch.of("shape") > 0
        actual = found.elem
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("head", "has_math"), [(72, False), (16, False), (12, True)])
def test_attention_of_the_tower_is_not_chosen_by_shape(head, has_math):
    """Flash or the one that saves memory, never cuDNN; a matrix of all pairs only where the heads fit neither."""
    q = torch.randn(10, 2, head)
    ends = torch.tensor([0, 4, 10])
    expected = attend_frames(q, q, q, ends)
    with simulated() as watch:
        x = q.to(DEVICE)
        found = attend_frames(x, x, x, ends)
        assert watch.sdpa == {(True, True, has_math, False)}
        torch.testing.assert_close(found.elem, expected)
