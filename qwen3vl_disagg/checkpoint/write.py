"""What a checkpoint folder in the published form holds: spelling of its config, layout of its experts, its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from qwen3vl_disagg.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from qwen3vl_disagg.checkpoint.layouts import ExpertLayout
from qwen3vl_disagg.model.config import VisionConfig, rope_entries, rope_theta

Spelling = Literal["hub", "v5"]


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
