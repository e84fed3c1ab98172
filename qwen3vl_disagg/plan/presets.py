"""Configs of the published checkpoints, for planning and for random weights of the real shapes.

Sources and how far each was cross-checked: docs/model.md.
"""

from __future__ import annotations

from dataclasses import replace

from qwen3vl_disagg.model.config import ModelConfig, TextConfig, VisionConfig

_LARGE_TOWER = VisionConfig(
    depth=27,
    hidden_size=1152,
    num_heads=16,
    intermediate_size=4304,
    out_hidden_size=2048,
    num_position_embeddings=2304,
    deepstack_visual_indexes=(8, 16, 24),
)
_SMALL_TOWER = replace(
    _LARGE_TOWER, depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=(5, 11, 17)
)


def _config(
    tower: VisionConfig, *, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool = False
) -> ModelConfig:
    text = TextConfig(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=ffn,
        rms_norm_eps=1e-6,
        rope_theta=5_000_000.0,
        mrope_section=(24, 20, 20),
        max_position_embeddings=262144,
    )
    return ModelConfig(
        architecture="Qwen3VLForConditionalGeneration",
        text=text,
        vision=replace(tower, out_hidden_size=hidden),
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=tied,
    )


def _with_experts(config: ModelConfig, *, expert_ffn: int) -> ModelConfig:
    text = replace(config.text, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=expert_ffn)
    return replace(config, architecture="Qwen3VLMoeForConditionalGeneration", text=text)


IMAGE_ROWS = 16384
"""Visual tokens of the largest image that the published processors make: 16,777,216 pixels, 32 x 32 each."""
PRESETS: dict[str, ModelConfig] = {
    "30b-a3b": _with_experts(
        _config(_LARGE_TOWER, hidden=2048, layers=48, heads=32, kv_heads=4, ffn=6144), expert_ffn=768
    ),
    "235b-a22b": _with_experts(
        _config(_LARGE_TOWER, hidden=4096, layers=94, heads=64, kv_heads=4, ffn=12288), expert_ffn=1536
    ),
    "2b": _config(_SMALL_TOWER, hidden=2048, layers=28, heads=16, kv_heads=8, ffn=6144, tied=True),
    "4b": _config(_SMALL_TOWER, hidden=2560, layers=36, heads=32, kv_heads=8, ffn=9728, tied=True),
    "8b": _config(_LARGE_TOWER, hidden=4096, layers=36, heads=32, kv_heads=8, ffn=12288),
    "32b": _config(_LARGE_TOWER, hidden=5120, layers=64, heads=64, kv_heads=8, ffn=25600),
}
