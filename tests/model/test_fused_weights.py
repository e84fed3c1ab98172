"""Layers of one input whose weights lie behind one another: the same numbers, names and memory, in one product."""

from __future__ import annotations

import pytest
import torch

from qwen3vl_disagg.core.environment import KERNELS
from qwen3vl_disagg.model import use_kernels
from qwen3vl_disagg.model.attention import Attention
from qwen3vl_disagg.model.layers import Linear, SwiGLU, join, project
from qwen3vl_disagg.parallel.expert_placement import held_bytes
from tests.support.random_model import cuda_config, random_language_model
from tests.support.simcuda import DEVICE, simulated, to_device


def layers(*sizes: int) -> list[Linear]:
    torch.manual_seed(1)
    return [Linear(6, size) for size in sizes]


@torch.inference_mode()
def test_joined_layers_give_what_each_gives_under_the_names_and_in_the_memory_that_they_had():
    plain, x = layers(8, 2, 3), torch.randn(5, 6)
    expected = project(x, *plain)
    with simulated() as watch:
        joined = [to_device(layer, watch) for layer in layers(8, 2, 3)]
        join(*joined)
        x = x.to(DEVICE)
        for ours, theirs in zip(project(x, *joined), expected, strict=True):
            assert torch.allclose(ours.elem, theirs, atol=1e-6)
            assert ours.shape == theirs.shape
        assert [dict(layer.named_parameters()).keys() for layer in joined] == [{"weight"}] * 3
        assert [list(layer.state_dict()) for layer in joined] == [["weight"]] * 3
        assert [layer(x).shape[1] for layer in joined] == [8, 2, 3]
        assert len({layer.weight.elem.untyped_storage().data_ptr() for layer in joined}) == 1
        joined[1].weight.zero_()  # what is written into a layer is in the product
        assert not project(x, *joined)[1].elem.any()


@pytest.mark.parametrize("choice", ["on", "off"])
def test_on_a_gpu_what_has_one_input_is_one_product(choice, monkeypatch):
    monkeypatch.setenv(KERNELS, choice)
    with simulated() as watch:
        model = to_device(random_language_model(cuda_config(), seed=3), watch)
        num_bytes = held_bytes(model)
        use_kernels(model)
        assert held_bytes(model) == num_bytes > 0, "what lies in the product has no memory of its own"
        parts = [part for part in model.modules() if isinstance(part, (Attention, SwiGLU))]
        assert parts
        for part in parts:
            first = part.q_proj if isinstance(part, Attention) else part.gate_proj
            assert (first.joined is not None) == (choice == "on")
