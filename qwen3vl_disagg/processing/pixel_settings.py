"""What preprocessor_config.json and video_preprocessor_config.json say about pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.core.json_text import parse_json
from qwen3vl_disagg.model.config import VisionConfig


@dataclass(frozen=True)
class PixelSettings:
    """Bounds of the area after resizing (of an image, or of all frames of a clip together), and how levels are
    normalised, by channel."""

    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def read(cls, raw: Mapping[str, Any], config: VisionConfig) -> tuple[PixelSettings | None, list[str]]:
        """The settings, or None and what is wrong with them."""
        size = raw.get("size")
        size = size if isinstance(size, dict) else {}
        bounds = {
            "min_pixels": raw.get("min_pixels", size.get("shortest_edge")),
            "max_pixels": raw.get("max_pixels", size.get("longest_edge")),
        }
        problems = [f"{name} must be a positive integer, got {v!r}" for name, v in bounds.items() if type(v) is not int]
        if not problems and not 0 < bounds["min_pixels"] <= bounds["max_pixels"]:
            problems.append(f"pixel bounds {bounds['min_pixels']}..{bounds['max_pixels']} are not a range")
        factor = config.patch_size * config.spatial_merge_size
        if not problems and bounds["max_pixels"] < factor * factor:
            problems.append(f"max_pixels {bounds['max_pixels']} leaves no room for {factor} x {factor}")
        for name, ours in (
            ("patch_size", config.patch_size),
            ("temporal_patch_size", config.temporal_patch_size),
            ("merge_size", config.spatial_merge_size),
        ):
            if raw.get(name, ours) != ours:
                problems.append(f"{name} is {raw[name]!r}, config.json says {ours}")
        for name, ours in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
            if raw.get(name, ours) != ours:
                problems.append(f"{name} is {raw[name]!r}, only {ours!r} is supported")
        scale = raw.get("rescale_factor", 1 / 255)
        if not isinstance(scale, (int, float)) or abs(scale * 255 - 1) > 1e-6:
            problems.append(f"rescale_factor is {scale!r}, only 1/255 is supported")
        vectors: dict[str, tuple[float, ...]] = {}
        for name, key in (("mean", "image_mean"), ("std", "image_std")):
            value = raw.get(key, [0.5, 0.5, 0.5])
            if not isinstance(value, list) or len(value) != 3 or any(type(v) not in (int, float) for v in value):
                problems.append(f"{key} must have 3 numbers, got {value!r}")
            elif not all(map(math.isfinite, value)) or (name == "std" and min(value) <= 0):
                problems.append(f"{key} must be finite, and a deviation positive, got {value!r}")
            else:
                vectors[name] = tuple(map(float, value))
        if problems:
            return None, problems
        return cls(bounds["min_pixels"], bounds["max_pixels"], **vectors), []


def read_section(folder: Path, name: str, key: str) -> Mapping[str, Any] | None:
    """What `key` of processor_config.json holds, else the file `name`; None if there is neither.

    CheckpointError for a file that cannot be read.
    """
    for file, section in (("processor_config.json", key), (name, None)):
        path = folder / file
        if not path.is_file():
            continue
        try:
            raw = parse_json(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(folder, [f"{file}: not JSON ({error})"]) from error
        if section is not None:
            raw = raw.get(section) if isinstance(raw, dict) else None
            if raw is None:
                continue
        if not isinstance(raw, dict):
            raise CheckpointError(folder, [f"{file}: not a JSON object"])
        return raw
    return None
