"""Image bytes -> patches: checked from the header, decoded, resized, normalised, cut up.

How bytes become RGB pixels is the business of `qwen3vl_disagg.media.images`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from qwen3vl_disagg.core.errors import ENCODE_ERROR, CheckpointError, ServerError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import ImageResize
from qwen3vl_disagg.media.decoder import MediaDecoder
from qwen3vl_disagg.media.images import check_aspect, decode_rgb
from qwen3vl_disagg.media.stop import Stop
from qwen3vl_disagg.model.config import VisionConfig
from qwen3vl_disagg.processing.pixels import PixelSettings, PixelTransform, cut_patches, fit_size, read_section
from qwen3vl_disagg.processing.positions import Grid

IMAGE_FILE = "preprocessor_config.json"


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
        stop: Stop | None = None,
        notes: list[str] | None = None,
    ) -> tuple[Tensor, Grid]:
        """Decode -> patches `[P, patch_dim]` float32 and the grid, that of `visual` if it is given.

        InputError for a damaged image, ServerError for one of another size than announced, Stopped when nobody wants
        it any more. What is missing is appended to `notes`. Without a decoder, decoded in this process.
        """
        if decoder is None:
            levels_HWC = np.asarray(decode_rgb(data, notes))
        else:
            levels_HWC = decoder.image(data, stop=stop, notes=notes)
        if visual is None:
            return self.patches(levels_HWC)
        check_size(levels_HWC, visual)
        return self.patches(levels_HWC, visual.grid)

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
