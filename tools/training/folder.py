"""The small checkpoint as a folder in the hub's form: its settings, its tokenizer, its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from qwen3vl_disagg.assets.scenes import all_words
from qwen3vl_disagg.model import ModelConfig, Qwen3VLMoeForConditionalGeneration
from tools.training.make_tokenizer import build_tokenizer

MIN_PIXELS, MAX_PIXELS = 16384, 22016
CLIP_FRAMES = 16
"""Frames of a clip that can all be as large as an image."""
"""Squares become 128 x 128 (16 visual tokens), 4:3 pictures 160 x 128 (20)."""
MAX_MERGES = 512
VOCAB_MULTIPLE = 64
_TEXT, _VISUAL, _HEAD = "model.language_model.", "model.visual.", "lm_head.weight"


def write_settings(folder: Path) -> None:
    """Every file but the weights."""
    texts = [*all_words(), "user\n", "assistant\n", "system\n"] * 8
    build_tokenizer(texts, 256 + MAX_MERGES, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    vocab_size = -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    vocabulary = tokenizer.get_vocab()
    names = ("image_pad", "video_pad", "vision_start", "vision_end", "endoftext", "im_end")
    ids = {name: vocabulary[f"<|{name}|>"] for name in names}
    pixels = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    files = {
        "config.json": model_settings(vocab_size, ids),
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [ids["im_end"], ids["endoftext"]],
            "pad_token_id": ids["endoftext"],
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
            **pixels,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": CLIP_FRAMES * MAX_PIXELS},
            **pixels,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def model_settings(vocab_size: int, ids: dict[str, int]) -> dict[str, Any]:
    """`config.json`. The sizes are all different where a mix-up could hide: H, I, 2I, heads * head size, vision."""
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "dtype": "float32",
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
            "use_cache": True,
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "dtype": "float32",
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe",
            "depth": 4,
            "hidden_size": 96,
            "num_heads": 4,
            "intermediate_size": 384,
            "out_hidden_size": 128,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 100,
            "deepstack_visual_indexes": [0, 1, 2],
            "initializer_range": 0.02,
        },
    }


def read_config(folder: Path) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))


def save_weights(model: Qwen3VLMoeForConditionalGeneration, path: Path) -> None:
    """Write the hub's names and orientation (experts `[E, D, 2F]` and `[E, F, D]`), by a rename at the end."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.detach()
        if ".experts." in name:
            value = value.transpose(1, 2)
        tensors[_hub_name(name)] = value.contiguous().clone()
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(path)


def load_weights(model: Qwen3VLMoeForConditionalGeneration, path: Path) -> None:
    """Read what `save_weights` wrote."""
    tensors = load_file(path)
    state = {}
    for name in model.state_dict():
        value = tensors[_hub_name(name)]
        state[name] = value.transpose(1, 2) if ".experts." in name else value
    with torch.no_grad():
        model.load_state_dict(state)


def load_model(folder: Path) -> Qwen3VLMoeForConditionalGeneration:
    """The model of a folder that `recipes/train_tiny.py` wrote, for evaluation."""
    model = Qwen3VLMoeForConditionalGeneration(read_config(folder))
    load_weights(model, folder / "model.safetensors")
    return model.eval()


def _hub_name(name: str) -> str:
    if name.startswith("visual."):
        return _VISUAL + name.removeprefix("visual.")
    if name == "language_model.lm_head.weight":
        return _HEAD
    return _TEXT + name.removeprefix("language_model.model.")
