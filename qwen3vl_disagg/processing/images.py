"""Image bytes -> patches: checked from the header, decoded, resized, normalised, cut up.

How bytes become RGB pixels is the business of `qwen3vl_disagg.media.images`.

Dims: H, W pixels; P patches in the vision tower's order (merge block by merge block).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.core.settings import ImageResize
from qwen3vl_disagg.media.image_headers import ImageInfo
from qwen3vl_disagg.media.images import MAX_ASPECT, MAX_BYTES, check_aspect, decode_rgb, probe_image
from qwen3vl_disagg.model.config import VisionConfig
from qwen3vl_disagg.processing.pixel_settings import PixelSettings, read_section
from qwen3vl_disagg.processing.positions import Grid
from qwen3vl_disagg.processing.resize import PixelTransform

__all__ = ["MAX_ASPECT", "MAX_BYTES", "ImageInfo", "ImageProcessor", "cut_patches", "decode_rgb", "smart_resize"]

IMAGE_FILE = "preprocessor_config.json"


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to resize to: multiples of `factor`, about the same aspect, pixels within the bounds.

    Arithmetic as in the reference processor (float64, ties to even): 300 x 400 -> 288 x 384 with factor 32 and bounds
    65536 .. 16777216. InputError if one side is more than 200 times the other.
    """
    check_aspect(height, width)
    return fit_size(height, width, factor, min_pixels, max_pixels)


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


class ImageProcessor:
    """One checkpoint's way from bytes to patches. `resize` picks the arithmetic, see `PixelTransform`."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        min_pixels: int,
        max_pixels: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        resize: ImageResize = "torch",
    ) -> None:
        factor = config.patch_size * config.spatial_merge_size
        if not factor * factor <= max_pixels or not 0 < min_pixels <= max_pixels:
            raise ValueError(f"pixel bounds {min_pixels}..{max_pixels} leave no room for {factor} x {factor}")
        self.config, self.factor, self.resize = config, factor, resize
        self.min_pixels, self.max_pixels, self.mean, self.std = min_pixels, max_pixels, mean, std
        self._transform = PixelTransform(mean, std, resize)

    @classmethod
    def from_folder(cls, folder: Path, config: VisionConfig, *, resize: ImageResize = "torch") -> ImageProcessor:
        """Read preprocessor_config.json, or the `image_processor` part of processor_config.json."""
        raw = read_section(folder, IMAGE_FILE, "image_processor")
        if raw is None:
            raise CheckpointError(folder, [f"{IMAGE_FILE} is missing"])
        pixels, problems = PixelSettings.read(raw, config)
        if pixels is None:
            raise CheckpointError(folder, [f"{IMAGE_FILE}: {problem}" for problem in problems])
        return cls(config, **vars(pixels), resize=resize)

    def settings(self) -> dict[str, str]:
        """What two ranks must agree on to see the same pixels, in images and in clips."""
        names = ("min_pixels", "max_pixels", "mean", "std", "resize")
        return {f"image_{name}": str(getattr(self, name)) for name in names}

    def probe(self, data: bytes) -> ImageInfo:
        """Format and shown size from the header alone. InputError for anything that is not an allowed image."""
        return probe_image(data)

    @property
    def max_rows(self) -> int:
        """Visual tokens of the largest image."""
        return self.max_pixels // self.factor**2

    def grid(self, width: int, height: int) -> Grid:
        """(frames, height, width) in patches of an image of that many pixels."""
        new_height, new_width = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        return 1, new_height // self.config.patch_size, new_width // self.config.patch_size

    def levels(self, data: bytes, decode: Callable[[bytes], np.ndarray] | None = None) -> np.ndarray:
        """Decode -> `[H, W, 3]` uint8. InputError for a damaged image. `decode`: for example `MediaDecoder.image`;
        without it, decoded in this process."""
        return np.asarray(decode_rgb(data)) if decode is None else decode(data)

    def pixels(
        self, data: bytes, *, decode: Callable[[bytes], np.ndarray] | None = None, grid: Grid | None = None
    ) -> tuple[Tensor, Grid]:
        """Decode -> patches `[P, patch_dim]` float32 and the grid. InputError for a damaged image.

        `grid`: the one that the prompt was laid out for, if the request had a word in it.
        """
        return self.patches(self.levels(data, decode), grid)

    def patches(self, levels_HWC: np.ndarray, grid: Grid | None = None) -> tuple[Tensor, Grid]:
        """`[H, W, 3]` uint8 -> patches `[P, patch_dim]` float32 and the grid."""
        _, rows, cols = grid or self.grid(levels_HWC.shape[1], levels_HWC.shape[0])
        patch = self.config.patch_size
        return self._patchify(self._transform(levels_HWC, rows * patch, cols * patch))

    def _patchify(self, pixels_CHW: Tensor) -> tuple[Tensor, Grid]:
        """Columns go (channel, frame, row, column); a still image is its own second frame."""
        patch, frames = self.config.patch_size, self.config.temporal_patch_size
        rows, cols = pixels_CHW.shape[1] // patch, pixels_CHW.shape[2] // patch
        blocks = cut_patches(pixels_CHW, patch, self.config.spatial_merge_size).unsqueeze(5)
        blocks = blocks.expand(*blocks.shape[:5], frames, patch, patch)
        return blocks.reshape(rows * cols, -1), (1, rows, cols)


def cut_patches(pixels_CHW: Tensor, patch: int, merge: int) -> Tensor:
    """A frame -> a view `[H / (m p), W / (m p), m, m, C, p, p]`: merge block by merge block (p patch, m merge)."""
    channels, height, width = pixels_CHW.shape
    block = patch * merge
    blocks = pixels_CHW.reshape(channels, height // block, merge, patch, width // block, merge, patch)
    return blocks.permute(1, 4, 2, 5, 0, 3, 6)
