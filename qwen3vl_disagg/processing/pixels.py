"""Levels of pictures and frames -> what the vision tower is fed: settings of a checkpoint, sizes, resizing, patches.

Dims: H, W pixels; C channels; P patches in the tower's order, merge block by merge block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.core.json_text import parse_json
from qwen3vl_disagg.core.settings import ImageResize
from qwen3vl_disagg.model.config import VisionConfig
from qwen3vl_disagg.processing.positions import Grid


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


def fit_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, *, frames: int = 1, counted: int = 1
) -> tuple[int, int]:
    """Multiples of `factor` for all frames of a clip, or the one of an image, with their pixels within the bounds.

    The reference compares `counted` frames with the bounds, and scales by `frames` of them.
    """
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if counted * new_height * new_width > max_pixels:
        scale = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif counted * new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


class PixelTransform:
    """Bicubic with antialiasing on 8-bit levels, then each level normalised, by one of two arithmetics.

    "torch": what the reference's torchvision processors of images and of clips do on a CPU, bit for bit: uint8
    interpolation, then (x - 255 mean) / (255 std) in float32. "pillow": its PIL processor, bit for bit: Pillow's
    bicubic, levels times 1/255 in float64, then (x - mean) / std in float32. They differ by up to 2 grey levels where a
    picture is resized, and in the last bit where it is not.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], how: ImageResize) -> None:
        self.how = how
        self._mean_C11, self._std_C11 = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, levels_HWC: np.ndarray, height: int, width: int) -> Tensor:
        """`[H, W, C]` uint8 -> `[C, height, width]` float32."""
        is_resized = levels_HWC.shape[:2] != (height, width)
        if is_resized and self.how == "pillow":
            image = Image.fromarray(levels_HWC).resize((width, height), Image.Resampling.BICUBIC)
            levels_HWC = np.asarray(image)
        levels_CHW = torch.from_numpy(np.require(levels_HWC, requirements=["C", "W"])).permute(2, 0, 1)
        if self.how == "pillow":
            return (levels_CHW.double() * (1 / 255)).float().sub_(self._mean_C11).div_(self._std_C11)
        if is_resized:
            levels_CHW = _interpolate(levels_CHW, height, width)
        return levels_CHW.float().sub_(self._mean_C11 * 255.0).div_(self._std_C11 * 255.0)


def _interpolate(levels_CHW: Tensor, height: int, width: int) -> Tensor:
    """With channels last in memory, as pixels are decoded: the fastest way, of the same result.

    The stride of the batch of one is stated, without which the operator takes the layout for another and copies
    (pytorch#68430).
    """
    shape, strides = levels_CHW.shape, levels_CHW.stride()
    levels_1CHW = levels_CHW.as_strided((1, *shape), (levels_CHW.numel(), *strides))
    return F.interpolate(levels_1CHW, (height, width), mode="bicubic", antialias=True)[0]


def cut_patches(
    frames: Iterable[np.ndarray], num_frames: int, grid: Grid, config: VisionConfig, transform: PixelTransform
) -> Tensor:
    """That many frames `[H, W, 3]` uint8 -> patches `[P, patch_dim]`, merge block by merge block.

    Columns go (channel, frame, row, column). The last frame fills up its step: an image is its own second frame. One
    frame is held at a time.
    """
    (steps, rows, cols), patch, merge = grid, config.patch_size, config.spatial_merge_size
    temporal = config.temporal_patch_size
    out = torch.empty(steps, rows // merge, cols // merge, merge, merge, 3, temporal, patch, patch)
    for number, frame in enumerate(frames):
        step, first = divmod(number, temporal)
        stop = temporal if number == num_frames - 1 else first + 1
        pixels_CHW = transform(frame, rows * patch, cols * patch)
        blocks = pixels_CHW.reshape(3, rows // merge, merge, patch, cols // merge, merge, patch)
        out[step, ..., first:stop, :, :] = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    return out.view(steps * rows * cols, config.patch_dim)
