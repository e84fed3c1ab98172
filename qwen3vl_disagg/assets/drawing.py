"""Scenes as pictures, and pictures as files."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOUR_RGB = {
    "red": (215, 40, 40),
    "green": (40, 155, 60),
    "blue": (40, 80, 215),
    "yellow": (235, 205, 40),
    "purple": (150, 55, 180),
    "black": (25, 25, 25),
}
SHAPE_NAMES = ("circle", "square", "triangle", "cross")
NATIVE_SIZES = ((128, 128), (160, 128), (128, 160))
SQUARE_SIZES = (128, 128, 160, 192, 256, 384)
WIDE_SIZES = ((160, 120), (240, 180), (320, 240), (400, 300))
FORMATS = ("jpg", "png", "webp", "gif", "bmp")


def random_size(rng: random.Random) -> tuple[int, int]:
    """(width, height): square, 4:3 or 3:4, native or larger."""
    if rng.random() < 0.7:
        side = rng.choice(SQUARE_SIZES)
        return side, side
    width, height = rng.choice(WIDE_SIZES)
    return (width, height) if rng.random() < 0.5 else (height, width)


def draw_scene(scene: Sequence[tuple[str, str] | None], size: tuple[int, int], rng: random.Random) -> Image.Image:
    """An RGB picture `size` = (width, height) of nine cells in reading order, each (colour, shape) or None.

    Place within the cell, size, shade and background vary.
    """
    width, height = size
    shade = rng.randint(225, 255)
    image = Image.new("RGB", size, tuple(shade + rng.randint(-6, 0) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    unit = min(width, height) / 3
    for i, thing in enumerate(scene):
        if thing is None:
            continue
        colour, shape = thing
        radius = unit * rng.uniform(0.28, 0.38)
        slack = unit * 0.46 - radius
        x = width * (i % 3 + 0.5) / 3 + rng.uniform(-slack, slack)
        y = height * (i // 3 + 0.5) / 3 + rng.uniform(-slack, slack)
        rgb = tuple(min(255, max(0, value + rng.randint(-18, 18))) for value in COLOUR_RGB[colour])
        draw_shape(draw, shape, x, y, radius, rgb)
    return image


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, rgb: tuple[int, ...]) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=rgb)
    elif shape == "square":
        half = 0.9 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=rgb)
    elif shape == "triangle":
        corners = [(x + 1.1 * r * math.sin(a), y - 1.1 * r * math.cos(a)) for a in (0.0, 2.1, -2.1)]
        draw.polygon(corners, fill=rgb)
    elif shape == "cross":
        arm = 0.32 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=rgb)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=rgb)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def save_image(image: Image.Image, folder: Path, stem: str, rng: random.Random) -> str:
    """Write `image` in a random format and return the file's name. Lossy formats are near lossless."""
    suffix = rng.choice(FORMATS)
    options: dict[str, Any] = {}
    if suffix == "jpg":
        options = {"quality": rng.randint(92, 98)}
    elif suffix == "webp":
        options = {"lossless": True} if rng.random() < 0.5 else {"quality": 95}
    name = f"{stem}.{suffix}"
    image.save(folder / name, **options)
    return name
