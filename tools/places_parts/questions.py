"""Questions that ask for places on drawn screens.

Forms of two kinds: those in which Qwen3-VL is asked for points and boxes, and those that the small checkpoint knows
from its training (docs/tiny.md), so that answers differ from screen to screen.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3vl_disagg.assets.scenes import LINES, ORDINALS, PLACES
from tools.places_parts.screens import SCALE, Element, Screen, draw_screen

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_TOKENS = 48


@dataclass(frozen=True)
class Question:
    """`parts`: text, and files' bytes, in the order in which they are sent. `truth`: the right answer."""

    name: str
    kind: str
    parts: tuple[str | bytes, ...]
    truth: str

    @property
    def media(self) -> list[bytes]:
        return [part for part in self.parts if isinstance(part, bytes)]

    def messages(self) -> list[dict[str, Any]]:
        """One user turn, its images as `data:` URIs."""
        content: list[dict[str, Any]] = []
        for part in self.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                url = f"data:image/png;base64,{base64.b64encode(part).decode()}"
                content.append({"type": "image_url", "image_url": {"url": url}})
        return [{"role": "user", "content": content}]


Asked = tuple[str, str]
"""Text and truth."""
_RANGE = f"coordinates from 0 to {SCALE}"


def _json_of(screen: Screen, element: Element, key: str) -> str:
    values = screen.point(element) if key == "point_2d" else screen.box(element)
    return json.dumps([{key: list(values), "label": element.name}])


def _any(screens: Sequence[Screen], rng: random.Random) -> Element:
    return rng.choice(screens[0].elements)


def _icon(screens: Sequence[Screen], rng: random.Random) -> Element:
    return rng.choice([element for element in screens[0].elements if element.role == "icon"])


def _point(screens: Sequence[Screen], rng: random.Random) -> Asked:
    element = _any(screens, rng)
    text = f'Where is the {element.name}? Answer as JSON with the key "point_2d", {_RANGE}.'
    return text, _json_of(screens[0], element, "point_2d")


def _box(screens: Sequence[Screen], rng: random.Random) -> Asked:
    element = _any(screens, rng)
    text = f'Locate the {element.name}, output its bbox coordinates as JSON with the key "bbox_2d", {_RANGE}.'
    return text, _json_of(screens[0], element, "bbox_2d")


def _place(screens: Sequence[Screen], rng: random.Random) -> Asked:
    element = _any(screens, rng)
    return f"Where is the {element.name}?", element.place


def _icons_place(screens: Sequence[Screen], rng: random.Random) -> Asked:
    element = _icon(screens, rng)
    return f"Where is the {element.name}?", element.place


def _icons_place_json(screens: Sequence[Screen], rng: random.Random) -> Asked:
    element = _icon(screens, rng)
    text = f'Where is the {element.name}? Answer as JSON with the key "place".'
    return text, json.dumps({"place": element.place})


def _what(screen: Screen, cell: int) -> str:
    element = screen.at(cell)
    return "nothing" if element is None else element.name


def _at(screens: Sequence[Screen], rng: random.Random) -> Asked:
    cell = rng.randrange(9)
    return f"What is at the {PLACES[cell]}?", _what(screens[0], cell)


def _some(screen: Screen, cells: Sequence[int]) -> str:
    return ", ".join(_what(screen, cell) for cell in cells)


def _row(screens: Sequence[Screen], rng: random.Random) -> Asked:
    line = rng.choice(list(LINES))
    return f"List the {line}.", _some(screens[0], LINES[line])


def _all(screens: Sequence[Screen], rng: random.Random) -> Asked:
    return "List all cells.", _some(screens[0], range(9))


def _pair_at(screens: Sequence[Screen], rng: random.Random) -> Asked:
    cell, number = rng.randrange(9), rng.randrange(2)
    return f"What is at the {PLACES[cell]} of the {ORDINALS[number]} image?", _what(screens[number], cell)


def _pair_all(screens: Sequence[Screen], rng: random.Random) -> Asked:
    number = rng.randrange(2)
    return f"List all cells of the {ORDINALS[number]} image.", _some(screens[number], range(9))


@dataclass(frozen=True)
class Kind:
    ask: Callable[[Sequence[Screen], random.Random], Asked]
    num_screens: int = 1


KINDS = {
    "point": Kind(_point),
    "box": Kind(_box),
    "place": Kind(_place),
    "icon": Kind(_icons_place),
    "icon, JSON": Kind(_icons_place_json),
    "at": Kind(_at),
    "row": Kind(_row),
    "all": Kind(_all),
    "pair, at": Kind(_pair_at, 2),
    "pair, all": Kind(_pair_all, 2),
}


def make_question(seed: int, number: int) -> Question:
    """Kinds in turn; text first, last, or between two images."""
    rng = random.Random(f"places {seed} {number}")
    name = list(KINDS)[number % len(KINDS)]
    kind = KINDS[name]
    screens = [draw_screen(rng) for _ in range(kind.num_screens)]
    text, truth = kind.ask(screens, rng)
    parts: list[str | bytes] = [_file(screen, rng) for screen in screens]
    parts.insert(rng.randrange(len(parts) + 1), text)
    return Question(f"{number} {name}", name, tuple(parts), truth)


def _file(screen: Screen, rng: random.Random) -> bytes:
    file = io.BytesIO()
    screen.image.save(file, rng.choice(FORMATS))
    return file.getvalue()


def questions(seed: int, count: int) -> Iterator[Question]:
    """The same for the same seed; a longer list begins like a shorter one."""
    return (make_question(seed, number) for number in range(count))


def digest(asked: Sequence[Question]) -> str:
    """SHA-256 (hex) of all that is sent: another release of Pillow may draw otherwise."""
    total = hashlib.sha256()
    for question in asked:
        for part in question.parts:
            data = part.encode() if isinstance(part, str) else part
            total.update(f"{type(part).__name__} {len(data)} ".encode() + data)
    return total.hexdigest()
