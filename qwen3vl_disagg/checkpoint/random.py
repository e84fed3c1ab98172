"""Random weights: checkpoint folders for tests and benchmarks, and models made on a device without any folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen3vl_disagg.checkpoint.layouts import ExpertLayout, checkpoint_name
from qwen3vl_disagg.checkpoint.write import Spelling, write_checkpoint
from qwen3vl_disagg.core.devices import DTYPES
from qwen3vl_disagg.model.config import ModelConfig, TextConfig, VisionConfig
from qwen3vl_disagg.model.deepstack import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.kernels import use_kernels
from qwen3vl_disagg.model.vl import Qwen3VLMoeForConditionalGeneration

# Sizes differ from one another wherever they can, so that a swap of two of them fails.
_TINY = ModelConfig(
    architecture="Qwen3VLMoeForConditionalGeneration",
    text=TextConfig(
        vocab_size=304,
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=112,
        rms_norm_eps=1e-6,
        rope_theta=5_000_000.0,
        mrope_section=(6, 5, 5),
        max_position_embeddings=4096,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
    ),
    vision=VisionConfig(
        depth=4,
        hidden_size=48,
        num_heads=4,
        intermediate_size=88,
        out_hidden_size=64,
        num_position_embeddings=64,
        deepstack_visual_indexes=(0, 1, 3),
    ),
    image_token_id=290,
    video_token_id=291,
    vision_start_token_id=287,
    vision_end_token_id=288,
    tie_word_embeddings=False,
    dtype="float32",
)
_TINY_DENSE = replace(
    _TINY,
    architecture="Qwen3VLForConditionalGeneration",
    text=replace(_TINY.text, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0),
    tie_word_embeddings=True,
)
# Large enough that a benchmark on a CPU waits for memory and not for Python; everything else as in the 30B model.
_MID = ModelConfig(
    architecture="Qwen3VLMoeForConditionalGeneration",
    text=TextConfig(
        vocab_size=32768,
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=3072,
        rms_norm_eps=1e-6,
        rope_theta=5_000_000.0,
        mrope_section=(12, 10, 10),
        max_position_embeddings=32768,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=384,
    ),
    vision=VisionConfig(
        depth=12,
        hidden_size=512,
        num_heads=8,
        intermediate_size=2048,
        out_hidden_size=1024,
        num_position_embeddings=2304,
        deepstack_visual_indexes=(2, 5, 8),
    ),
    image_token_id=32760,
    video_token_id=32761,
    vision_start_token_id=32757,
    vision_end_token_id=32758,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
RANDOM_PRESETS: dict[str, ModelConfig] = {
    "tiny-random": _TINY,
    "tiny-random-dense": _TINY_DENSE,
    "tiny-random-mixed": replace(_TINY, text=replace(_TINY.text, mlp_only_layers=(3,))),
    "mid": _MID,
}


def _mean(name: str, parameter: Tensor) -> float:
    """Weights lie around 0, those of norms around 1."""
    return 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0


def random_tensors(
    config: ModelConfig, *, seed: int, std: float = 0.04, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Normal weights under their published names, the same for a seed whatever they are written as.

    Made in float32, each cast to `dtype` before the next one is made.
    """
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    room = torch.empty(max(parameter.numel() for parameter in model.parameters()))  # fresh memory each time is slow
    tensors = {}
    for name, parameter in model.named_parameters():
        weight = torch.randn(parameter.shape, generator=generator, out=room[: parameter.numel()].view(parameter.shape))
        tensors[checkpoint_name(name)] = weight.mul_(std).add_(_mean(name, parameter)).to(dtype, copy=True)
    return tensors


def random_language_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int, std: float = 0.02
) -> Qwen3MoeForCausalLMWithDeepStack:
    """A decoder whose weights are made on the device itself: nothing is read, written or copied. For benchmarks."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLMWithDeepStack(config)
    _fill_random(model, dtype, torch.device(device), seed, std)
    if config.tie_word_embeddings:
        model.tie_weights()
    return use_kernels(model.requires_grad_(False).eval())


def random_vision_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int, std: float = 0.02
) -> Qwen3VLMoeForConditionalGeneration:
    """A vision tower without a decoder, made like `random_language_model`."""
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(config, language_model=False)
    _fill_random(model, dtype, torch.device(device), seed, std)
    return use_kernels(model.requires_grad_(False).eval())


def _fill_random(model: nn.Module, dtype: torch.dtype, device: torch.device, seed: int, std: float) -> None:
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        weight.normal_(_mean(name, parameter), std, generator=generator)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


def write_random_checkpoint(
    folder: Path | str,
    config: ModelConfig,
    *,
    seed: int,
    std: float = 0.04,
    layout: ExpertLayout = "hub",
    num_shards: int = 1,
    spelling: Spelling = "hub",
    dtype: str | None = None,
    min_pixels: int = 1024,
    max_pixels: int = 65536,
) -> ModelConfig:
    """Write a checkpoint folder without a tokenizer. Returns the config written: `config`, with `dtype` if given."""
    config = replace(config, dtype=dtype or config.dtype)
    write_checkpoint(
        folder,
        config,
        random_tensors(config, seed=seed, std=std, dtype=DTYPES[config.dtype]),
        layout=layout,
        spelling=spelling,
        num_shards=num_shards,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    return config
