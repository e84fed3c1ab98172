"""Checkpoint folders made from a config: of tensors that are given, or of random ones; and random models without a
folder. For tests and benchmarks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen3vl_disagg.checkpoint.folder import CONFIG_FILE
from qwen3vl_disagg.checkpoint.layouts import ExpertLayout, checkpoint_name
from qwen3vl_disagg.checkpoint.write import Spelling, in_layout, respelled, write_json, write_weights
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
    "mid-dense": replace(
        _MID,
        architecture="Qwen3VLForConditionalGeneration",
        text=replace(_MID.text, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0),
    ),
}


def config_to_dict(config: ModelConfig, *, spelling: Spelling = "hub") -> dict[str, Any]:
    """The parsed `config.json` of a config, as the published files or as transformers 5 spell it."""
    text, vision, is_moe = config.text, config.vision, config.text.num_experts > 0
    family = "qwen3_vl_moe" if is_moe else "qwen3_vl"
    rope = {"rope_type": "default"} if text.yarn is None else {"rope_type": "yarn", **asdict(text.yarn)}
    mrope = {**rope, "mrope_interleaved": True, "mrope_section": list(text.mrope_section)}
    text_dict: dict[str, Any] = {
        "model_type": f"{family}_text",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.intermediate_size,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": config.dtype,
    }
    text_dict |= {"rope_theta": text.rope_theta, "rope_scaling": mrope}
    if is_moe:
        text_dict |= {
            "num_experts": text.num_experts,
            "num_experts_per_tok": text.num_experts_per_tok,
            "moe_intermediate_size": text.moe_intermediate_size,
            "mlp_only_layers": list(text.mlp_only_layers),
            "decoder_sparse_step": text.decoder_sparse_step,
            "norm_topk_prob": True,
        }
    vision_dict: dict[str, Any] = {
        "model_type": family,
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "num_heads": vision.num_heads,
        "intermediate_size": vision.intermediate_size,
        "out_hidden_size": vision.out_hidden_size,
        "num_position_embeddings": vision.num_position_embeddings,
        "deepstack_visual_indexes": list(vision.deepstack_visual_indexes),
        "in_channels": vision.in_channels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": vision.rope_theta,
    }
    raw = {
        "architectures": [config.architecture],
        "model_type": family,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": config.dtype,
        "text_config": text_dict,
        "vision_config": vision_dict,
    }
    return respelled(raw, spelling)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters under their published names (experts as in the module), a tied head once."""
    return {checkpoint_name(name): parameter.detach() for name, parameter in module.named_parameters()}


def write_checkpoint(
    folder: Path | str,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    layout: ExpertLayout = "hub",
    spelling: Spelling = "hub",
    num_shards: int = 1,
    min_pixels: int = 65536,
    max_pixels: int = 16777216,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write config, weights, settings of the image and the video processor and `generation_config.json`; no tokenizer.

    Args:
        tensors: published names, experts as the modules hold them; cast to the config's dtype. Each is looked up once,
            when its file's turn has come: a mapping may make it then.
        min_pixels, max_pixels: bounds of a resized image's area; those of a whole clip follow from them.
        generation: entries of `generation_config.json` besides the end and padding tokens; greedy if absent.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, config_to_dict(config, spelling=spelling))
    names, dtype = list(tensors), DTYPES[config.dtype]

    def file(i: int) -> dict[str, Tensor]:
        mine = names[i * len(names) // num_shards : (i + 1) * len(names) // num_shards]
        parts = (part for name in mine for part in in_layout(name, tensors[name], layout).items())
        return {name: part.to(dtype) for name, part in parts}

    write_weights(folder, [functools.partial(file, i) for i in range(num_shards)])
    vision = config.vision
    preprocessor = {
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    # The published bounds of a whole clip are to those of an image as 1/16 and 3/2.
    clip = {"shortest_edge": -(-min_pixels // 16), "longest_edge": max_pixels * 3 // 2}
    video = {**preprocessor, "size": clip, "video_processor_type": "Qwen3VLVideoProcessor"}
    del video["image_processor_type"]
    write_json(folder / "video_preprocessor_config.json", video)
    # In every tokenizer of this family <|endoftext|> and <|im_end|> stand 9 and 7 before <|vision_start|>.
    end_of_text, end_of_turn = config.vision_start_token_id - 9, config.vision_start_token_id - 7
    generation_config = {"eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    write_json(folder / "generation_config.json", {**generation_config, **(generation or {"do_sample": False})})


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
