"""Image bytes -> patches: decoded, resized, normalised, cut up; and what clips have in common with that.

How bytes become RGB pixels is the business of `qwen3vl_disagg.media.images`. Where the tower is on a GPU, what goes
there is `Frames`: resized levels as bytes, which are cut up and normalised by the device, with the same arithmetic.

Dims: F frames; H, W pixels; C channels; P patches in the tower's order, merge block by merge block.
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

from qwen3vl_disagg.core.errors import ENCODE_ERROR, CheckpointError, ServerError
from qwen3vl_disagg.core.json_text import parse_json
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import ImageResize
from qwen3vl_disagg.core.tensors import uploaded
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.images import check_aspect, decode_rgb
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.model.config import VisionConfig
from qwen3vl_disagg.processing.positions import Grid

IMAGE_FILE = "preprocessor_config.json"


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
        return self.normalised(self.resized(levels_HWC, height, width))

    def resized(self, levels_HWC: np.ndarray, height: int, width: int) -> Tensor:
        """`[H, W, C]` uint8 -> `[C, height, width]` uint8, with channels last in memory."""
        is_resized = levels_HWC.shape[:2] != (height, width)
        if is_resized and self.how == "pillow":
            image = Image.fromarray(levels_HWC).resize((width, height), Image.Resampling.BICUBIC)
            levels_HWC = np.asarray(image)
        levels_CHW = torch.from_numpy(np.require(levels_HWC, requirements=["C", "W"])).permute(2, 0, 1)
        if is_resized and self.how == "torch":
            return _interpolate(levels_CHW, height, width)
        return levels_CHW

    def normalised(self, levels_CXX: Tensor) -> Tensor:
        """Levels `[.., C, .., ..]` uint8 on any device -> the same in float32. Divided by tensors: on a GPU a number
        is multiplied by its reciprocal, which rounds otherwise."""
        mean_C11, std_C11 = (uploaded(x, levels_CXX.device) for x in (self._mean_C11, self._std_C11))
        if self.how == "pillow":
            return (levels_CXX.double() * (1 / 255)).float().sub_(mean_C11).div_(std_C11)
        return levels_CXX.float().sub_(mean_C11 * 255.0).div_(std_C11 * 255.0)


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


@dataclass(frozen=True)
class Frames:
    """An image, or the frames of a clip, resized and not yet cut up: `levels` `[F, H, W, C]` uint8."""

    levels: Tensor
    transform: PixelTransform

    @classmethod
    def of(
        cls, frames: Iterable[np.ndarray], num_frames: int, grid: Grid, config: VisionConfig, transform: PixelTransform
    ) -> Frames:
        """What `cut_patches` takes, resized."""
        height, width = (size * config.patch_size for size in grid[1:])
        levels_FHWC = torch.empty(num_frames, height, width, 3, dtype=torch.uint8)
        for number, frame in enumerate(frames):
            levels_FHWC[number] = transform.resized(frame, height, width).permute(1, 2, 0)
        return cls(levels_FHWC, transform)

    def patches(self, levels_FHWC: Tensor, grid: Grid, config: VisionConfig) -> Tensor:
        """What `cut_patches` makes, `[P, patch_dim]` float32, of these levels wherever they are now."""
        (steps, rows, cols), patch, merge = grid, config.patch_size, config.spatial_merge_size
        lacking = steps * config.temporal_patch_size - len(levels_FHWC)
        filled = torch.cat([levels_FHWC, levels_FHWC[-1:].expand(lacking, -1, -1, -1)])
        blocks = filled.view(steps, -1, rows // merge, merge, patch, cols // merge, merge, patch, 3)
        levels_PCXX = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(steps * rows * cols, 3, -1, patch)
        return self.transform.normalised(levels_PCXX).view(-1, config.patch_dim)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to resize to: multiples of `factor`, about the same aspect, pixels within the bounds.

    Arithmetic as in the reference processor (float64, ties to even): 300 x 400 -> 288 x 384 with factor 32 and bounds
    65536 .. 16777216. InputError if one side is more than 200 times the other.
    """
    check_aspect(height, width)
    return fit_size(height, width, factor, min_pixels, max_pixels)


class ImageProcessor:
    """One checkpoint's way from bytes to patches. `resize` picks the arithmetic, see `PixelTransform`."""

    def __init__(self, config: VisionConfig, pixels: PixelSettings, *, resize: ImageResize = "torch") -> None:
        self.config, self.bounds, self.resize = config, pixels, resize
        self.factor = config.patch_size * config.spatial_merge_size
        self._transform = PixelTransform(pixels.mean, pixels.std, resize)

    @classmethod
    def from_folder(cls, folder: Path, config: VisionConfig, *, resize: ImageResize = "torch") -> ImageProcessor:
        """Read preprocessor_config.json, or the `image_processor` part of processor_config.json."""
        raw = read_section(folder, IMAGE_FILE, "image_processor")
        if raw is None:
            raise CheckpointError(folder, [f"{IMAGE_FILE} is missing"])
        pixels, problems = PixelSettings.read(raw, config)
        if pixels is None:
            raise CheckpointError(folder, [f"{IMAGE_FILE}: {problem}" for problem in problems])
        return cls(config, pixels, resize=resize)

    def settings(self) -> dict[str, str]:
        """What two ranks must agree on to see the same pixels, in images and in clips."""
        found = {**vars(self.bounds), "resize": self.resize}
        return {f"image_{name}": str(value) for name, value in found.items()}

    @property
    def max_rows(self) -> int:
        """Visual tokens of the largest image."""
        return self.bounds.max_pixels // self.factor**2

    def grid(self, width: int, height: int) -> Grid:
        """(frames, height, width) in patches of an image of that many pixels."""
        new_height, new_width = smart_resize(height, width, self.factor, self.bounds.min_pixels, self.bounds.max_pixels)
        return 1, new_height // self.config.patch_size, new_width // self.config.patch_size

    def pixels(
        self,
        data: bytes,
        visual: VisualItem | None = None,
        decoder: MediaDecoder | None = None,
        stop: StopSignal | None = None,
        notes: list[str] | None = None,
    ) -> tuple[Tensor, Grid]:
        """Decode -> patches `[P, patch_dim]` float32 and the grid, that of `visual` if it is given.

        InputError for a damaged image, ServerError for one of another size than announced, Stopped when nobody wants
        it any more. What is missing is appended to `notes`. Without a decoder, decoded in this process.
        """
        levels_HWC = self._levels(data, visual, decoder, stop, notes)
        return self.patches(levels_HWC, None if visual is None else visual.grid)

    def frames(
        self,
        data: bytes,
        visual: VisualItem,
        decoder: MediaDecoder | None = None,
        stop: StopSignal | None = None,
        notes: list[str] | None = None,
    ) -> tuple[Frames, Grid]:
        """As `pixels`, for a GPU to cut up."""
        levels_HWC = self._levels(data, visual, decoder, stop, notes)
        grid = 1, visual.grid[1], visual.grid[2]
        return Frames.of([levels_HWC], 1, grid, self.config, self._transform), grid

    def _levels(
        self,
        data: bytes,
        visual: VisualItem | None,
        decoder: MediaDecoder | None,
        stop: StopSignal | None,
        notes: list[str] | None,
    ) -> np.ndarray:
        if decoder is None:
            levels_HWC = np.asarray(decode_rgb(data, notes))
        else:
            levels_HWC = decoder.image(data, stop=stop, notes=notes)
        if visual is not None:
            check_size(levels_HWC, visual)
        return levels_HWC

    def patches(self, levels_HWC: np.ndarray, grid: Grid | None = None) -> tuple[Tensor, Grid]:
        """`[H, W, 3]` uint8 -> patches `[P, patch_dim]` float32 and the grid."""
        _, rows, cols = grid or self.grid(levels_HWC.shape[1], levels_HWC.shape[0])
        return cut_patches([levels_HWC], 1, (1, rows, cols), self.config, self._transform), (1, rows, cols)


def check_size(frame_HWC: np.ndarray, visual: VisualItem) -> None:
    """ServerError if an image or frame has not the size that the item was announced with."""
    height, width, _ = frame_HWC.shape
    if visual.size is not None and (height, width) != tuple(visual.size):
        message = f"the {visual.modality} is {height} x {width} pixels, the prompt was laid out for {visual.size}"
        raise ServerError(message, code=ENCODE_ERROR)
