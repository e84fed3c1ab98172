"""Small random models for tests that need tensors but no oracle."""

from dataclasses import replace

import torch

from qwen3vl_disagg.model import (
    ModelConfig,
    Qwen3MoeForCausalLMWithDeepStack,
    Qwen3VLMoeForConditionalGeneration,
    TextConfig,
    VisionConfig,
)

IMAGE_TOKEN = 60


def small_config(*, levels: int = 2) -> ModelConfig:
    """A few thousand parameters; no two sizes alike where a mix-up could hide."""
    text = TextConfig(
        vocab_size=72,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=40,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        mrope_section=(2, 2, 2),
        max_position_embeddings=512,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
    )
    vision = VisionConfig(
        depth=3,
        hidden_size=24,
        num_heads=2,
        intermediate_size=36,
        out_hidden_size=32,
        num_position_embeddings=36,
        deepstack_visual_indexes=tuple(range(levels)),
    )
    return ModelConfig(
        architecture="Qwen3VLMoeForConditionalGeneration",
        text=text,
        vision=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
        tie_word_embeddings=False,
        dtype="float32",
    )


def cuda_config() -> ModelConfig:
    """`small_config` with heads and experts as wide as the matrix units of a GPU want them."""
    config = small_config()
    text = replace(config.text, head_dim=16, mrope_section=(4, 2, 2), moe_intermediate_size=32)
    return replace(config, text=text)


def _randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else 1 + 0.1 * noise)
    module.eval().requires_grad_(False)


def random_language_model(config: ModelConfig, *, seed: int) -> Qwen3MoeForCausalLMWithDeepStack:
    model = Qwen3MoeForCausalLMWithDeepStack(config)
    _randomize(model, seed)
    return model


def random_vision_model(config: ModelConfig, *, seed: int) -> Qwen3VLMoeForConditionalGeneration:
    model = Qwen3VLMoeForConditionalGeneration(config, language_model=False)
    _randomize(model, seed)
    return model
