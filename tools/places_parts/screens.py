"""Drawn screens: a window whose area is a 3 x 3 board of buttons, text boxes, check marks and coloured icons.

Each element has a cell of its own, so boxes do not overlap. The same seed and number draw the same screen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from qwen3vl_disagg.assets.drawing import COLOUR_RGB, NATIVE_SIZES, SHAPE_NAMES, draw_shape
from qwen3vl_disagg.assets.scenes import PLACES

SIZES = (
    *NATIVE_SIZES,
    *((176, 112), (97, 143), (131, 129), (320, 96), (200, 121)),
    *((333, 217), (256, 256), (240, 352), (400, 250)),
    *((640, 400), (512, 768)),  # larger than a folder of `wide_folder` lets them stay
)
"""(width, height) in pixels."""
SCALE = 1000
"""Places are told from 0 to SCALE, whatever the picture's size, as Qwen3-VL does."""
ROLES = {"button": 4, "text box": 2, "check mark": 2, "icon": 5}
"""What is in a cell, and how often of all of them; nothing as often as EMPTY."""
EMPTY = 3
KNOWN = 0.4
"""So many screens have icons alone and a size of those that the small checkpoint was trained on."""
LABELS = (
    *("Save", "Open", "Close", "Cancel", "OK", "Print", "Search", "Send", "Reply", "Undo", "Redo", "Copy"),
    *("Paste", "Help", "Next", "Back", "Name", "E-mail", "Password", "Wrap", "Sound", "Zoom in", "Zoom out", "Log off"),
)
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Element:
    """`label`: what is written on it, of an icon its colour and shape. `cell`: 0 to 8, in reading order. `box`: in
    pixels of the picture, right and bottom not in it."""

    role: str
    label: str
    cell: int
    box: Box

    @property
    def name(self) -> str:
        """As a question calls it, and no other element of its screen."""
        return self.label if self.role == "icon" else f'{self.role} "{self.label}"'

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Screen:
    image: Image.Image
    elements: tuple[Element, ...]

    def at(self, cell: int) -> Element | None:
        return next((element for element in self.elements if element.cell == cell), None)

    def box(self, element: Element) -> tuple[int, int, int, int]:
        """From 0 to SCALE."""
        left, top, right, bottom = element.box
        width, height = self.image.size
        return (
            *(round(left * SCALE / width), round(top * SCALE / height)),
            *(round(right * SCALE / width), round(bottom * SCALE / height)),
        )

    def point(self, element: Element) -> tuple[int, int]:
        """The middle, from 0 to SCALE."""
        left, top, right, bottom = self.box(element)
        return (left + right) // 2, (top + bottom) // 2


def draw_screen(rng: random.Random) -> Screen:
    """An RGB picture with at least one element and one icon."""
    is_known = rng.random() < KNOWN
    size = width, height = rng.choice(NATIVE_SIZES if is_known else SIZES)
    shade = rng.randint(225, 250)
    image = Image.new("RGB", size, (shade, shade, min(255, shade + rng.randint(0, 5))))
    pen = ImageDraw.Draw(image)
    bar = height * rng.uniform(0.04, 0.1)
    pen.rectangle((0, 0, width, bar), fill=(70, 90, rng.randint(100, 160)))
    pen.rectangle((width - 0.9 * bar, 0.1 * bar, width - 0.1 * bar, 0.9 * bar), fill=(200, 60, 60))
    roles = {"icon": sum(ROLES.values())} if is_known else ROLES
    elements = _place_elements(rng, (0.0, bar, float(width), float(height)), roles)
    for element in elements:
        _draw_element(pen, element, rng)
    return Screen(image, tuple(elements))


def _place_elements(rng: random.Random, area: Box, often: dict[str, int]) -> list[Element]:
    left, top, right, bottom = area
    width, height = (right - left) / 3, (bottom - top) / 3
    labels = rng.sample(LABELS, 9)
    icons = rng.sample([f"{colour} {shape}" for colour in COLOUR_RGB for shape in SHAPE_NAMES], 9)
    roles: list[str | None] = rng.choices([*often, None], [*often.values(), EMPTY], k=8)
    roles.insert(rng.randrange(9), "icon")
    found = []
    for cell, role in enumerate(roles):
        if role is None:
            continue
        share = (0.62, 0.62) if role == "icon" else (rng.uniform(0.7, 0.9), rng.uniform(0.35, 0.6))
        wide, high = width * share[0], height * share[1]
        high = min(high, wide if role == "icon" else wide / 2)
        wide = high if role == "icon" else wide
        x = left + width * (cell % 3) + rng.uniform(0.05, 0.95) * (width - wide)
        y = top + height * (cell // 3) + rng.uniform(0.05, 0.95) * (height - high)
        found.append(Element(role, icons[cell] if role == "icon" else labels[cell], cell, (x, y, x + wide, y + high)))
    return found


def _draw_element(pen: ImageDraw.ImageDraw, element: Element, rng: random.Random) -> None:
    left, top, right, bottom = element.box
    inside = (left, top, right - 1, bottom - 1)
    high = bottom - top
    if element.role == "icon":
        colour, shape = element.label.split()
        rgb = tuple(min(255, max(0, value + rng.randint(-18, 18))) for value in COLOUR_RGB[colour])
        # A triangle's corners are the farthest from its middle.
        draw_shape(pen, shape, (left + right) / 2, (top + bottom) / 2, high / 2.25, rgb)
        return
    at = left + 0.15 * high
    if element.role == "button":
        face = rng.randint(185, 215)
        pen.rounded_rectangle(inside, radius=high / 5, fill=(face, face, face), outline=(90, 90, 90))
    elif element.role == "text box":
        pen.rectangle(inside, fill=(255, 255, 255), outline=(120, 120, 120))
    else:
        side = 0.7 * high
        mark = (left, top + 0.15 * high, left + side, top + 0.85 * high)
        pen.rectangle(mark, fill=(255, 255, 255), outline=(60, 60, 60))
        tick = [(left + 0.2 * side, top + 0.5 * high), (left + 0.4 * side, top + 0.7 * high)]
        pen.line([*tick, (left + 0.85 * side, top + 0.25 * high)], fill=(20, 110, 40), width=max(1, round(side / 8)))
        at = left + 1.2 * side
    _write(pen, element.label, (at, top, right, bottom))


def _write(pen: ImageDraw.ImageDraw, text: str, box: Box) -> None:
    """As large as fits; nothing where nothing does."""
    left, top, right, bottom = box
    size = 0.6 * (bottom - top)
    where = (left, (top + bottom) / 2)
    while size >= 1:
        font = ImageFont.load_default(size)
        x0, y0, x1, y1 = pen.textbbox(where, text, font=font, anchor="lm")
        if x0 >= left - 1 and y0 >= top and x1 <= right and y1 <= bottom:
            pen.text(where, text, fill=(20, 20, 20), font=font, anchor="lm")
            return
        size *= 0.9
