"""Models whose weights are made on the device; random tensors."""

import pytest
import torch

from qwen3vl_disagg.checkpoint import load_language_model
from qwen3vl_disagg.model import ForwardBatch
from tools.checkpoints import (
    RANDOM_PRESETS,
    random_language_model,
    random_tensors,
    random_vision_model,
    write_random_checkpoint,
)

CONFIG = RANDOM_PRESETS["tiny-random"]


def weights(model):
    return {name: parameter.float() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("build", [random_language_model, random_vision_model])
def test_weights_are_there_and_the_seed_decides(build):
    first, same, other = (weights(build(CONFIG, torch.float32, "cpu", seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    for name, weight in first.items():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        assert abs(weight.mean() - mean) < 0.01, name
        assert 0.01 < weight.std() < 0.03, name


def test_a_decoder_made_on_the_device_has_the_parts_of_one_that_was_loaded(tmp_path):
    write_random_checkpoint(tmp_path, CONFIG, seed=0)
    loaded = load_language_model(tmp_path, dtype=torch.bfloat16)
    made = random_language_model(CONFIG, torch.bfloat16, "cpu", 0)
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in loaded.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in made.named_parameters()
    }
    assert not made.training
    assert [part.impl for part in loaded.modules() if hasattr(part, "impl")] == [
        part.impl for part in made.modules() if hasattr(part, "impl")
    ]


@torch.inference_mode()
def test_it_computes():
    model = random_language_model(CONFIG, torch.float32, "cpu", 0)
    tokens, positions = torch.arange(7), torch.arange(7).expand(3, 7)
    assert torch.isfinite(model(tokens, positions, ForwardBatch.for_prompt([7]))).all()
    tower = random_vision_model(CONFIG, torch.float32, "cpu", 0)
    rows = tower.get_image_feature(torch.randn(16, CONFIG.vision.patch_dim), [(1, 4, 4)])
    assert rows.shape == (4, 4 * CONFIG.text.hidden_size)
    assert torch.isfinite(rows).all()


def test_a_tied_head_stays_tied():
    model = random_language_model(RANDOM_PRESETS["tiny-random-dense"], torch.float32, "cpu", 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_dtype_is_only_a_cast():
    exact = random_tensors(CONFIG, seed=3)
    cast = random_tensors(CONFIG, seed=3, dtype=torch.bfloat16)
    assert all(torch.equal(cast[name], exact[name].to(torch.bfloat16)) for name in exact)
    assert len({weight.data_ptr() for weight in exact.values()}) == len(exact)
