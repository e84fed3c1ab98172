"""Resizing and normalising: 8-bit levels of a picture or frame -> what the vision tower is fed.

Dims: H, W pixels; C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_disagg.core.settings import ImageResize


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
