"""Image bytes -> patches: checked from the header, decoded, resized, normalised, cut up.

The same rules for every image: content is sniffed and a declared type ignored; the first frame of an animation; EXIF
orientation applied; transparency composited on white; 16-bit greys scaled; then RGB.

Dims: H, W pixels; P patches in the vision tower's order (merge block by merge block).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.model.config import VisionConfig
from qwen3vl_disagg.processing.positions import Grid

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 20 * 2**20
MAX_ASPECT = 200

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageInfo:
    """What the header says; width and height as shown, that is after the EXIF orientation."""

    format: str
    width: int
    height: int


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to resize to: multiples of `factor`, about the same aspect, pixels within the bounds.

    Arithmetic as in the reference processor (float64, ties to even): 300 x 400 -> 288 x 384 with factor 32 and bounds
    65536 .. 16777216. InputError if one side is more than 200 times the other.
    """
    _check_aspect(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"image of {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


class ImageProcessor:
    """One checkpoint's way from bytes to patches.

    `backend` picks the arithmetic of resizing and normalising. "pil" equals the reference's PIL processor bit for bit:
    Pillow's bicubic, levels times 1/255 in float64, then (x - mean) / std in float32. "torch" does what the reference's
    torchvision processor does on a CPU: antialiased bicubic on uint8, then (x - 255 mean) / (255 std) in float32. They
    differ by up to 2 grey levels where an image is resized, and in the last bit where it is not. "pil" is the default
    because it is the one whose reference runs without torchvision, so that a test can hold the two equal.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        min_pixels: int,
        max_pixels: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        backend: Literal["pil", "torch"] = "pil",
    ) -> None:
        factor = config.patch_size * config.spatial_merge_size
        if not factor * factor <= max_pixels or not 0 < min_pixels <= max_pixels:
            raise ValueError(f"pixel bounds {min_pixels}..{max_pixels} leave no room for {factor} x {factor}")
        self.config, self.factor, self.backend = config, factor, backend
        self.min_pixels, self.max_pixels, self.mean, self.std = min_pixels, max_pixels, mean, std
        # A pixel has one of 256 levels, so normalising is a look-up: the formula runs once per level and channel.
        mean_C1, std_C1 = torch.tensor(mean)[:, None], torch.tensor(std)[:, None]
        if backend == "pil":
            levels_256 = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
            self._table_C256 = (levels_256 - mean_C1) / std_C1
        else:
            self._table_C256 = (torch.arange(256.0) - mean_C1 * 255.0) / (std_C1 * 255.0)

    @classmethod
    def from_folder(cls, folder: Path, config: VisionConfig) -> ImageProcessor:
        """Read preprocessor_config.json, or the `image_processor` part of processor_config.json."""
        raw = read_image_settings(folder)
        size = raw.get("size")
        size = size if isinstance(size, dict) else {}
        bounds = {
            "min_pixels": raw.get("min_pixels", size.get("shortest_edge")),
            "max_pixels": raw.get("max_pixels", size.get("longest_edge")),
        }
        problems = [f"{name} must be a positive integer, got {v!r}" for name, v in bounds.items() if type(v) is not int]
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
        vectors: dict[str, Any] = {}
        for name, key in (("mean", "image_mean"), ("std", "image_std")):
            value = raw.get(key, [0.5, 0.5, 0.5])
            if not isinstance(value, list) or len(value) != 3 or any(type(v) not in (int, float) for v in value):
                problems.append(f"{key} must have 3 numbers, got {value!r}")
                continue
            vectors[name] = tuple(map(float, value))
        if problems:
            raise CheckpointError(folder, [f"preprocessor_config.json: {problem}" for problem in problems])
        try:
            return cls(config, min_pixels=bounds["min_pixels"], max_pixels=bounds["max_pixels"], **vectors)
        except ValueError as error:
            raise CheckpointError(folder, [f"preprocessor_config.json: {error}"]) from error

    def settings(self) -> dict[str, str]:
        """What two ranks must agree on to see the same pixels."""
        names = ("min_pixels", "max_pixels", "mean", "std", "backend")
        return {f"image_{name}": str(getattr(self, name)) for name in names}

    def probe(self, data: bytes) -> ImageInfo:
        """Format and shown size from the header alone. InputError for anything that is not an allowed image."""
        return _open(data)[1]

    def grid(self, width: int, height: int) -> Grid:
        """(frames, height, width) in patches of an image of that many pixels."""
        new_height, new_width = self._target(height, width)
        return 1, new_height // self.config.patch_size, new_width // self.config.patch_size

    def _target(self, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def pixels(self, data: bytes) -> tuple[Tensor, Grid]:
        """Decode -> patches `[P, patch_dim]` float32 and the grid. InputError for a damaged image."""
        return self.patches(decode_rgb(data))

    def patches(self, image: Image.Image) -> tuple[Tensor, Grid]:
        """An RGB image -> patches `[P, patch_dim]` float32 and the grid."""
        height, width = self._target(image.height, image.width)
        if self.backend == "pil":
            if (width, height) != image.size:
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            levels_CHW = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        else:
            levels_CHW = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()
            if (width, height) != image.size:
                levels_CHW = F.interpolate(levels_CHW[None], (height, width), mode="bicubic", antialias=True)[0]
        channels = torch.arange(3)[:, None, None]
        return self._patchify(self._table_C256[channels, levels_CHW.long()])

    def _patchify(self, pixels_CHW: Tensor) -> tuple[Tensor, Grid]:
        """Columns go (channel, frame, row, column); a still image is its own second frame."""
        patch, merge, frames = (
            self.config.patch_size,
            self.config.spatial_merge_size,
            self.config.temporal_patch_size,
        )
        channels, height, width = pixels_CHW.shape
        rows, cols = height // patch, width // patch
        blocks = pixels_CHW.view(channels, rows // merge, merge, patch, cols // merge, merge, patch)
        blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
        blocks = blocks.expand(*blocks.shape[:5], frames, patch, patch)
        return blocks.reshape(rows * cols, -1), (1, rows, cols)


def read_image_settings(folder: Path) -> Mapping[str, Any]:
    """The image processor's settings as written in the folder. CheckpointError if there are none."""
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            raw = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(folder, [f"{name}: not JSON ({error})"]) from error
        raw = raw if key is None else raw.get(key)
        if isinstance(raw, dict):
            return raw
    raise CheckpointError(folder, ["preprocessor_config.json is missing"])


def decode_rgb(data: bytes) -> Image.Image:
    """The image as shown, mode RGB. InputError for a damaged one."""
    image, _, orientation = _open(data)
    try:
        image.load()
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        return _to_rgb(image)
    except Exception as error:  # whatever the decoder raises, the bytes are the cause; its text stays inside
        raise InputError("the image is damaged or cut off and cannot be decoded") from error


def _open(data: bytes) -> tuple[Image.Image, ImageInfo, int]:
    """The lazily opened image, what its header says, and its EXIF orientation."""
    if not data:
        raise InputError("the image is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise InputError(f"the image has {len(data)} bytes, the limit is {MAX_BYTES}", status=413)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise InputError(f"the image has more than the limit of {MAX_PIXELS} pixels") from None
    except Exception as error:
        raise InputError(f"not an image of an allowed format ({', '.join(FORMATS)})") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"the image has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise InputError(f"the image has {width * height} pixels, the limit is {MAX_PIXELS}")
    _check_aspect(height, width)
    orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width
    return image, ImageInfo(format=str(image.format), width=width, height=height), orientation


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 .. 8. A PNG's counts only when it stands before the pixels, so that headers suffice."""
    try:
        # Not image.getexif(): a PNG's would decode the pixels to find metadata behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not make the picture unusable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image, transparency)
    if "A" in image.getbands() or "a" in image.getbands() or transparency is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, transparency: object) -> Image.Image:
    """16-bit greys scaled to 8 bits (65535 -> 255), the transparent level white."""
    grey_HW = np.asarray(image).astype(np.float64)
    levels_HW = np.clip(np.round(grey_HW / 257), 0, 255).astype(np.uint8)
    if isinstance(transparency, int):
        levels_HW[grey_HW == transparency] = 255
    return Image.fromarray(levels_HW).convert("RGB")
