"""Writing checkpoint folders in the published form: config, weights, processor and generation settings."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from qwen3vl_disagg.checkpoint.folder import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from qwen3vl_disagg.checkpoint.layouts import ExpertLayout, checkpoint_name
from qwen3vl_disagg.core.devices import DTYPES
from qwen3vl_disagg.model.config import ModelConfig, VisionConfig, rope_entries, rope_theta

Spelling = Literal["hub", "v5"]


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


def respelled(raw: Mapping[str, Any], spelling: Spelling) -> dict[str, Any]:
    """A parsed `config.json` of either spelling in the other one, or as it is: one that `ModelConfig` can be
    read of. What is read of it stays the same."""
    text, vision = dict(raw["text_config"]), dict(raw["vision_config"])
    experts, other = ("num_experts", "num_local_experts") if spelling == "hub" else ("num_local_experts", "num_experts")
    if text.get(experts) is None and text.get(other) is not None:
        text[experts] = text.pop(other)
    rope, theta = dict(rope_entries(text)), rope_theta(text)
    for place, name in ((text, "rope_parameters"), (text, "rope_scaling"), (text, "rope_theta"), (rope, "rope_theta")):
        place.pop(name, None)
    vision_theta = rope_theta(vision) or VisionConfig.rope_theta
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        vision.pop(name, None)
    if spelling == "hub":
        text |= {"rope_theta": theta, "rope_scaling": rope}
        if vision_theta != VisionConfig.rope_theta:  # no published file has it
            vision["rope_theta"] = vision_theta
    else:
        text["rope_parameters"] = {**rope, "rope_theta": theta}
        vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision_theta}
    if "model_type" in raw:
        vision["model_type"] = raw["model_type"] if spelling == "hub" else f"{raw['model_type']}_vision"
    return {**raw, "text_config": text, "vision_config": vision}


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


def in_layout(name: str, tensor: Tensor, layout: ExpertLayout, first_expert: int = 0) -> dict[str, Tensor]:
    """One tensor of the modules, of experts' also some rows from `first_expert` on -> what the layout stores for it."""
    experts, _, which = name.rpartition(".")
    if not experts.endswith(".mlp.experts") or layout == "v5":
        return {name: tensor}
    if layout == "hub":
        return {name: tensor.transpose(1, 2)}
    parts = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
    return {
        f"{experts}.{expert}.{part}.weight": weight
        for expert, rows in enumerate(tensor, first_expert)
        for part, weight in zip(parts, rows.chunk(len(parts)), strict=True)
    }


def write_weights(folder: Path, files: Sequence[Callable[[], Mapping[str, Tensor]]]) -> int:
    """Safetensors files, and the index if they are several. Returns the bytes of all tensors.

    One file after another: its tensors are asked for when its turn has come, and none is kept.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for i, make in enumerate(files):
        name = SINGLE_FILE if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        stored = {key: tensor.contiguous() for key, tensor in make().items()}
        save_file(stored, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, name)
        total += sum(tensor.nbytes for tensor in stored.values())
        del stored
    if len(files) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
