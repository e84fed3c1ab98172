"""Weights that are not finite are refused while they are read, in any layout and dtype, naming file and tensor."""

from __future__ import annotations

import math
import random

import pytest
import torch

from qwen3vl_disagg.checkpoint import load_language_model, load_model, load_vision_model
from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.core.tensors import all_finite
from tests.support.float8 import make_float8
from tests.support.weights import edit_tensors, load_text_model, write_smallest

LAYOUTS = ("hub", "v5", "per_expert")


def poison(folder, value: float, choose) -> str:
    """One number of one tensor, anywhere; its name."""
    chosen = []

    def edit(tensors):
        name = random.Random(str(folder)).choice(sorted(name for name in tensors if choose(name)))
        tensor = tensors[name].clone()
        flat = tensor.view(-1)
        where = random.Random(name).randrange(len(flat))
        if tensor.dtype == torch.float8_e4m3fn:
            flat.view(torch.uint8)[where] = 0x7F  # NaN
        else:
            flat[where] = value
        tensors[name] = tensor
        chosen.append(name)

    edit_tensors(folder, edit)
    return chosen[0]


def problems(load) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        load()
    return caught.value.problems


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("stored", "dtype"), [("float32", None), ("float32", torch.bfloat16), ("bfloat16", None)])
def test_any_tensor_of_a_decoder(tmp_path, value, layout, stored, dtype):
    folder = write_smallest(tmp_path / "0", layout=layout, dtype=stored)
    name = poison(folder, value, lambda name: "visual" not in name)
    expected = [f"model.safetensors: {name}: numbers that are not finite"]
    assert problems(lambda: load_language_model(folder, dtype=dtype)) == expected
    load_vision_model(folder, dtype=dtype)


@pytest.mark.parametrize("load", [load_model, load_text_model, load_language_model])
@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj", "embed_tokens", "mlp.gate.weight", "norm.weight"])
def test_each_part_by_each_loader(tmp_path, load, part):
    folder = write_smallest(tmp_path / "0")
    name = poison(folder, math.nan, lambda name: part in name and "visual" not in name)
    assert problems(lambda: load(folder)) == [f"model.safetensors: {name}: numbers that are not finite"]


def test_the_vision_tower(tmp_path):
    folder = write_smallest(tmp_path / "0")
    name = poison(folder, math.inf, lambda name: "visual" in name)
    assert problems(lambda: load_vision_model(folder)) == [f"model.safetensors: {name}: numbers that are not finite"]
    load_language_model(folder)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["weights", "scales"])
def test_float8_and_its_scales(tmp_path, layout, which, quantize):
    folder = write_smallest(tmp_path / "0", layout=layout, dtype="bfloat16")
    meant = make_float8(folder, (16, 24), torch.float32, hub=layout == "hub")
    suffix = "_scale_inv" if which == "scales" else ""
    name = poison(folder, math.inf, lambda name: name in {f"{key}{suffix}" for key in meant})
    expected = [f"model.safetensors: {name}: numbers that are not finite"]
    assert problems(lambda: load_language_model(folder, quantize=quantize)) == expected


def test_numbers_that_only_the_wider_dtype_has(tmp_path):
    folder = write_smallest(tmp_path / "0", dtype="float32")
    name = poison(folder, 3.4e38, lambda name: "down_proj" in name)
    expected = [f"model.safetensors: {name}: numbers too large for bfloat16"]
    assert problems(lambda: load_language_model(folder, dtype=torch.bfloat16)) == expected
    load_language_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 130), (4, 1), (0,), (3, 0)])
def test_all_finite(dtype, shape):
    x = torch.randn(shape).to(dtype)
    assert all_finite(x)
    for value in (math.nan, math.inf, -math.inf):
        for place in range(0, x.numel(), 7):
            broken = x.clone()
            broken.view(-1)[place] = value
            assert not all_finite(broken)


def test_large_numbers_are_finite():
    assert all_finite(torch.full((3, 100), 3e38))
    assert all_finite(torch.full((3, 100), 3e38, dtype=torch.bfloat16))
