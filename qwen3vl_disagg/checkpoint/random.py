"""Checkpoints of random weights, for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen3vl_disagg.checkpoint.layouts import ExpertLayout, checkpoint_name
from qwen3vl_disagg.checkpoint.write import Spelling, write_checkpoint
from qwen3vl_disagg.model.config import ModelConfig, TextConfig, VisionConfig
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
RANDOM_PRESETS: dict[str, ModelConfig] = {
    "tiny-random": _TINY,
    "tiny-random-dense": _TINY_DENSE,
    "tiny-random-mixed": replace(_TINY, text=replace(_TINY.text, mlp_only_layers=(3,))),
}


def random_tensors(config: ModelConfig, *, seed: int, std: float = 0.04) -> dict[str, Tensor]:
    """Float32 weights under their published names, the same for a seed whatever they are written as.

    Normal around 0, norm weights around 1.
    """
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        mean = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        tensors[checkpoint_name(name)] = torch.randn(parameter.shape, generator=generator) * std + mean
    return tensors


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
        random_tensors(config, seed=seed, std=std),
        layout=layout,
        spelling=spelling,
        num_shards=num_shards,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    return config
