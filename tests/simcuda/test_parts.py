"""Experts and the tower's attention as they run on a GPU: without a wait, and with no more than a step uses."""

from __future__ import annotations

import copy

import pytest
import torch

from qwen3vl_disagg.model import ForwardBatch, moe, quantized, use_kernels
from qwen3vl_disagg.model.attention import Attention
from qwen3vl_disagg.model.layers import SwiGLU
from qwen3vl_disagg.model.vision import attend_frames
from qwen3vl_disagg.parallel.expert_placement import held_bytes
from tests.model.test_expert_impls import inputs, make_experts
from tests.model.test_expert_impls import quantized as quantize
from tests.support.peak import peak_bytes
from tests.support.random_model import small_config
from tests.support.simcuda import DEVICE, WAITS, simulated, to_device

BF16, F32 = torch.bfloat16, torch.float32
KINDS = [None, torch.int8, torch.float8_e4m3fn]


def scaled(experts: moe.Experts) -> moe.Experts:
    """So that what they make of a row is no smaller than the bounds here."""
    for weight in experts.parameters():
        weight.mul_(10)
    return experts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "hidden"), [(BF16, 32), (BF16, 36), (F32, 32)])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_experts_without_a_wait(kind, dtype, hidden, num_tokens, monkeypatch):
    """Also where `grouped_mm` does not take them. One token of two choices dequantizes two experts. A
    choice that is remote adds nothing, whatever `grouped_mm` leaves in its row."""
    experts = scaled(make_experts(hidden, 24, dtype))
    given = inputs(hidden, dtype, num_tokens=num_tokens)
    given[2][-1, 0] = 6  # on another rank
    expected = moe.run_experts_loop(*given, *experts.parameters())
    if kind is not None:
        experts = quantize(experts, kind)
        expected = quantized.run_experts_dequantized(*given, *experts.local_weights())
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
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
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


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize("room", [2, 6, 1000])
def test_rows_of_several_ranks_in_slices(num_tokens, room, monkeypatch):
    """With room for the choices of one token, of three, of all; the ids of 4 and 5 are of another rank."""
    monkeypatch.setattr(moe, "MAX_ROUTED_ROWS", room)
    experts = scaled(make_experts(32, 24, BF16))
    given = inputs(32, BF16, num_tokens=num_tokens)
    weights = [weight[:4] for weight in experts.local_weights()]
    expected = moe.run_experts_loop(*given, *weights)
    experts.dispatcher = type("Spread", (moe.Dispatcher,), {})()
    with simulated() as watch:
        on_device = to_device(experts, watch)
        rows = [t.to(DEVICE) for t in given]
        watch.reset()
        found = on_device.run(*rows, *(weight[:4] for weight in on_device.local_weights()))
        assert watch.of(*WAITS) == 0, str(watch)
        assert not watch.problems
        actual = found.elem
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


def test_room_for_rows_of_six_ranks():
    """A chunk of 4,096 tokens on each, 30b-a3b, by shapes alone, without Triton: the output is 96 MiB of it."""
    x, ids = torch.empty(6 * 4096, 2048, dtype=BF16, device="meta"), torch.empty(6 * 4096, 8, device="meta").long()
    weights = [torch.empty(shape, dtype=BF16, device="meta") for shape in ((22, 1536, 2048), (22, 2048, 768))]
    before = peak_bytes(lambda: moe.run_experts_grouped(x, ids.bfloat16(), ids, *weights))
    now = peak_bytes(lambda: moe.run_experts_in_slices(x, ids.bfloat16(), ids, *weights))
    assert before > 6000 << 20
    assert now < 1200 << 20


@pytest.mark.parametrize(
    ("make", "names"), [(Attention, ("q_proj", "k_proj", "v_proj")), (SwiGLU, ("gate_proj", "up_proj"))]
)
def test_one_product_for_layers_of_one_input(make, names):
    """On the device; names and values of their weights are as before, and what is loaded into them counts."""
    text = small_config().text
    torch.manual_seed(0)
    module = (Attention(text) if make is Attention else SwiGLU(32, 24)).bfloat16()
    x = torch.randn(5, module.get_submodule(names[0]).in_features).bfloat16()
    rotary = tuple(torch.rand(5, 1, text.head_dim).bfloat16() for _ in "cs")
    run = (lambda m, x, *r: m(x, r, ForwardBatch.for_prompt([5]), None)) if make is Attention else lambda m, x, *_: m(x)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        expected = [run(module, x, *rotary), run(copy.deepcopy(module).apply(halve), x, *rotary)]
    with simulated() as watch, torch.no_grad():
        on_device = use_kernels(to_device(module, watch))
        assert len(on_device.get_submodule(names[0]).joined) == sum(len(kept[f"{name}.weight"]) for name in names)
        assert held_bytes(on_device) == sum(value.nbytes for value in kept.values()), "counted once"
        held = {name: value.elem for name, value in on_device.state_dict().items()}
        given = [t.to(DEVICE) for t in (x, *rotary)]
        actual = [run(on_device, *given).elem]
        on_device.apply(halve)
        actual.append(run(on_device, *given).elem)
    torch.testing.assert_close(held, {name: value / 2 for name, value in kept.items()}, rtol=0, atol=0)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=2e-2)


def halve(module: torch.nn.Module) -> None:
    """In place, as a checkpoint is loaded."""
    for parameter in module.parameters(recurse=False):
        parameter.mul_(0.5)


def test_on_a_cpu_nothing_is_joined():
    assert use_kernels(Attention(small_config().text).bfloat16()).q_proj.joined is None


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
