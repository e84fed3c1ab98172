"""Drawn scenes and questions about them, each with exactly one right answer.

A scene is a 3 x 3 board of cells, each empty or with one coloured shape. A question is built answer first: the answer
is dealt from a shuffled deck (so none is frequent), then a scene and a wording are made that have it.

    python -m qwen3vl_disagg.assets.scenes --seed 1 --count 20 --out scenes
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from qwen3vl_disagg.assets.drawing import COLOUR_RGB, SHAPE_NAMES, draw_scene, random_size, save_image

COLOURS = tuple(COLOUR_RGB)
SHAPES = SHAPE_NAMES
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
PLACES = (
    *("top left", "top middle", "top right"),
    *("middle left", "centre", "middle right"),
    *("bottom left", "bottom middle", "bottom right"),
)
LINES = {
    **{f"{name} row": (3 * i, 3 * i + 1, 3 * i + 2) for i, name in enumerate(("top", "middle", "bottom"))},
    **{f"{name} column": (i, i + 3, i + 6) for i, name in enumerate(("left", "middle", "right"))},
}
ORDINALS = ("first", "second")
MAX_COUNT = 5


class Thing(NamedTuple):
    """What is in a cell."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


Scene = tuple[Thing | None, ...]  # nine cells in reading order
Args = Mapping[str, str]
THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Question:
    """A question over one or two scenes. `args` fill the wording and decide the answer."""

    kind: str
    scenes: tuple[Scene, ...]
    args: Args
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A question with its scenes drawn."""

    images: list[Image.Image]
    question: str
    answer: str
    kind: str


class Decks:
    """Deals values so that each comes equally often: a shuffled deck per name, shuffled again when it is used up."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.decks: dict[str, list[str]] = {}

    def deal(self, name: str, values: Sequence[str]) -> str:
        deck = self.decks.setdefault(name, [])
        if not deck:
            deck.extend(self.rng.sample(list(values), len(values)))
        return deck.pop()


# Answers.
def _cell(thing: Thing | None) -> str:
    return "nothing" if thing is None else str(thing)


def _only(values: Sequence[str]) -> str | None:
    return values[0] if len(values) == 1 else None


def matches(thing: Thing | None, noun: str) -> bool:
    """Whether `thing` is one of `noun`: "circles", "red things" or "things"."""
    if thing is None:
        return False
    return noun in ("things", f"{thing.colour} things", PLURALS[thing.shape])


def _count(scene: Scene, noun: str) -> int:
    return sum(matches(thing, noun) for thing in scene)


def _colour(scenes: Sequence[Scene], args: Args) -> str | None:
    return _only([t.colour for t in scenes[0] if t and t.shape == args["shape"]])


def _shape(scenes: Sequence[Scene], args: Args) -> str | None:
    return _only([t.shape for t in scenes[0] if t and t.colour == args["colour"]])


def _place(scenes: Sequence[Scene], args: Args) -> str | None:
    return _only([PLACES[i] for i, t in enumerate(scenes[0]) if t and str(t) == args["thing"]])


def _number(scenes: Sequence[Scene], args: Args) -> str | None:
    return str(_count(scenes[0], args["noun"]))


def _larger(a: int, b: int, if_a: str, if_b: str) -> str:
    return "equal" if a == b else if_a if a > b else if_b


def _comparison(scenes: Sequence[Scene], args: Args) -> str | None:
    a, b = args["first"], args["second"]
    return _larger(_count(scenes[0], a), _count(scenes[0], b), a, b)


def _at(scenes: Sequence[Scene], args: Args) -> str | None:
    return _cell(scenes[ORDINALS.index(args.get("image", "first"))][PLACES.index(args["place"])])


def _row(scenes: Sequence[Scene], args: Args) -> str | None:
    return ", ".join(_cell(scenes[0][i]) for i in LINES[args["line"]])


def _list(scenes: Sequence[Scene], args: Args) -> str | None:
    return ", ".join(map(_cell, scenes[ORDINALS.index(args.get("image", "first"))]))


def _pair_more(scenes: Sequence[Scene], args: Args) -> str | None:
    return _larger(_count(scenes[0], "things"), _count(scenes[1], "things"), "the first", "the second")


def _pair_has(scenes: Sequence[Scene], args: Args) -> str | None:
    first, second = (any(t and str(t) == args["thing"] for t in scene) for scene in scenes)
    return {(1, 1): "both", (1, 0): "the first", (0, 1): "the second", (0, 0): "neither"}[first, second]


# Scenes that have a given answer.
def _fill(rng: random.Random, fixed: Mapping[int, Thing], others: Sequence[Thing], total: int = 0) -> Scene:
    """The `fixed` cells, and `others` (any, repeated) in free cells up to `total` things in all (0: random)."""
    cells: list[Thing | None] = [fixed.get(i) for i in range(9)]
    free = rng.sample([i for i in range(9) if i not in fixed], 9 - len(fixed))
    for i in free[: max(0, (total or rng.randint(3, 8)) - len(fixed))]:
        cells[i] = rng.choice(others)
    return tuple(cells)


def _except(**unwanted: str) -> list[Thing]:
    return [t for t in THINGS if not any(getattr(t, key) == value for key, value in unwanted.items())]


def random_scene(rng: random.Random) -> Scene:
    """A scene with 3 to 8 things."""
    return _fill(rng, {}, THINGS)


Built = tuple[tuple[Scene, ...], dict[str, str], str]


def _build_colour(rng: random.Random, decks: Decks) -> Built:
    colour, shape = decks.deal("colour", COLOURS), rng.choice(SHAPES)
    scene = _fill(rng, {rng.randrange(9): Thing(colour, shape)}, _except(shape=shape))
    return (scene,), {"shape": shape}, colour


def _build_shape(rng: random.Random, decks: Decks) -> Built:
    colour, shape = rng.choice(COLOURS), decks.deal("shape", SHAPES)
    scene = _fill(rng, {rng.randrange(9): Thing(colour, shape)}, _except(colour=colour))
    return (scene,), {"colour": colour}, shape


def _build_place(rng: random.Random, decks: Decks) -> Built:
    place, thing = decks.deal("place", PLACES), rng.choice(THINGS)
    scene = _fill(rng, {PLACES.index(place): thing}, [t for t in THINGS if t != thing])
    return (scene,), {"thing": str(thing)}, place


def _build_number(rng: random.Random, decks: Decks) -> Built:
    number = decks.deal("number", [str(n) for n in range(MAX_COUNT + 1)])
    noun = rng.choice([PLURALS[rng.choice(SHAPES)], f"{rng.choice(COLOURS)} things"])
    inside = [t for t in THINGS if matches(t, noun)]
    fixed = {i: rng.choice(inside) for i in rng.sample(range(9), int(number))}
    total = rng.randint(max(3, len(fixed)), 8)
    return (_fill(rng, fixed, [t for t in THINGS if not matches(t, noun)], total),), {"noun": noun}, number


def _build_comparison(rng: random.Random, decks: Decks) -> Built:
    answer = decks.deal("comparison", [*PLURALS.values(), "equal"])
    if answer == "equal":
        more, less = rng.sample(SHAPES, 2)
        num_more = num_less = rng.randint(1, 3)
    else:
        more = next(shape for shape in SHAPES if PLURALS[shape] == answer)
        less = rng.choice([shape for shape in SHAPES if shape != more])
        num_more = rng.randint(1, 4)
        num_less = rng.randint(max(0, num_more - 2), num_more - 1)
    places = rng.sample(range(9), num_more + num_less)
    fixed = {i: Thing(rng.choice(COLOURS), more if j < num_more else less) for j, i in enumerate(places)}
    scene = _fill(rng, fixed, [t for t in THINGS if t.shape not in (more, less)])
    first, second = rng.sample([PLURALS[more], PLURALS[less]], 2)
    return (scene,), {"first": first, "second": second}, answer


def _deal_cell(rng: random.Random, decks: Decks, name: str) -> tuple[Scene, str, str]:
    """A scene, a place and what is there: nothing a fifth of the time."""
    colour, place = decks.deal(name, [*COLOURS, "nothing"]), rng.choice(PLACES)
    scene = list(random_scene(rng))
    scene[PLACES.index(place)] = None if colour == "nothing" else Thing(colour, rng.choice(SHAPES))
    return tuple(scene), place, _cell(scene[PLACES.index(place)])


def _build_at(rng: random.Random, decks: Decks) -> Built:
    scene, place, answer = _deal_cell(rng, decks, "at")
    return (scene,), {"place": place}, answer


def _build_row(rng: random.Random, decks: Decks) -> Built:
    scenes, args = (random_scene(rng),), {"line": decks.deal("row", list(LINES))}
    return scenes, args, str(_row(scenes, args))


def _build_list(rng: random.Random, decks: Decks) -> Built:
    scenes = (random_scene(rng),)
    return scenes, {}, str(_list(scenes, {}))


def _build_pair_more(rng: random.Random, decks: Decks) -> Built:
    answer = decks.deal("pair_more", ["the first", "the second", "equal"])
    low = rng.randint(1, 6)
    high = low if answer == "equal" else rng.randint(low + 1, min(8, low + 3))
    counts = (high, low) if answer == "the first" else (low, high)
    return tuple(_fill(rng, {}, THINGS, n) for n in counts), {}, answer


def _build_pair_has(rng: random.Random, decks: Decks) -> Built:
    answer, thing = decks.deal("pair_has", ["the first", "the second", "both", "neither"]), rng.choice(THINGS)
    has = (answer in ("the first", "both"), answer in ("the second", "both"))
    others = [t for t in THINGS if t != thing]
    scenes = tuple(_fill(rng, {rng.randrange(9): thing} if here else {}, others) for here in has)
    return scenes, {"thing": str(thing)}, answer


def _build_pair_at(rng: random.Random, decks: Decks) -> Built:
    scene, place, answer = _deal_cell(rng, decks, "pair_at")
    image = decks.deal("pair_at_image", ORDINALS)
    scenes = (scene, random_scene(rng)) if image == "first" else (random_scene(rng), scene)
    return scenes, {"place": place, "image": image}, answer


def _build_pair_list(rng: random.Random, decks: Decks) -> Built:
    scenes, args = (random_scene(rng), random_scene(rng)), {"image": decks.deal("pair_list_image", ORDINALS)}
    return scenes, args, str(_list(scenes, args))


@dataclass(frozen=True)
class Kind:
    """How a kind of question is built, answered and worded. `answer` gives None where there is not exactly one."""

    build: Callable[[random.Random, Decks], Built]
    answer: Callable[[Sequence[Scene], Args], str | None]
    wordings: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "colour": Kind(_build_colour, _colour, ("What colour is the {shape}?", "Which colour does the {shape} have?")),
    "shape": Kind(_build_shape, _shape, ("What shape is the {colour} thing?", "Which shape is {colour}?")),
    "place": Kind(_build_place, _place, ("Where is the {thing}?",)),
    "number": Kind(_build_number, _number, ("How many {noun} are there?", "Count the {noun}.")),
    "comparison": Kind(_build_comparison, _comparison, ("Are there more {first} or {second}?",)),
    "at": Kind(_build_at, _at, ("What is at the {place}?",)),
    "row": Kind(_build_row, _row, ("List the {line}.",)),
    "list": Kind(_build_list, _list, ("List all cells.",)),
    "pair_more": Kind(_build_pair_more, _pair_more, ("Which image has more things?",)),
    "pair_has": Kind(_build_pair_has, _pair_has, ("Which image has a {thing}?",)),
    "pair_at": Kind(_build_pair_at, _at, ("What is at the {place} of the {image} image?",)),
    "pair_list": Kind(_build_pair_list, _list, ("List all cells of the {image} image.",)),
}


def build_question(kind: str, rng: random.Random, decks: Decks) -> Question:
    """A question of `kind` whose answer is dealt from `decks`."""
    spec = KINDS[kind]
    scenes, args, answer = spec.build(rng, decks)
    found = spec.answer(scenes, args)
    if found != answer:
        raise RuntimeError(f"a {kind} question was built for {answer!r} but its answer is {found!r}")
    return Question(kind, scenes, args, rng.choice(spec.wordings).format(**args), answer)


def ask(kind: str, scenes: tuple[Scene, ...], args: Args, rng: random.Random) -> Question | None:
    """A question about given scenes, or None where it would not have exactly one answer."""
    answer = KINDS[kind].answer(scenes, args)
    if answer is None:
        return None
    return Question(kind, scenes, args, rng.choice(KINDS[kind].wordings).format(**args), answer)


def questions(seed: int, count: int) -> Iterator[Question]:
    """`count` questions, kinds in turn."""
    rng = random.Random(seed)
    decks = Decks(rng)
    for _ in range(count):
        yield build_question(decks.deal("kind", list(KINDS)), rng, decks)


def generate(seed: int, count: int) -> list[Sample]:
    """`count` questions with their images, drawn in several sizes. The same for the same seed."""
    rng = random.Random(f"draw {seed}")
    samples = []
    for question in questions(seed, count):
        images = [draw_scene(scene, random_size(rng), rng) for scene in question.scenes]
        samples.append(Sample(images, question.text, question.answer, question.kind))
    return samples


def all_words() -> list[str]:
    """Texts that hold every word of every question and answer, for the tokenizer."""
    parts = [*map(str, THINGS), *PLACES, *LINES, *ORDINALS, *PLURALS.values()]
    parts += [f"{colour} things" for colour in COLOURS]
    parts += [w.format_map(_Blank()) for kind in KINDS.values() for w in kind.wordings]
    parts += ["things", "nothing", "equal", "the first", "the second", "both", "neither", *"0123456789"]
    return [*parts, *(f"{part}, {part}." for part in parts), *(f"{part}?" for part in parts)]


class _Blank(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return ""


def write(seed: int, count: int, out: Path) -> None:
    """Image files and `questions.jsonl` (`images`, `question`, `answer`, `kind`) into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"files {seed}")
    with (out / "questions.jsonl").open("w") as file:
        for i, sample in enumerate(generate(seed, count)):
            names = [save_image(image, out, f"{i:05d}_{j}", rng) for j, image in enumerate(sample.images)]
            line = {"images": names, "question": sample.question, "answer": sample.answer, "kind": sample.kind}
            file.write(json.dumps(line) + "\n")


def main(seed: int, count: int, out: Path) -> None:
    """Write drawn scenes and questions about them.

    Args:
        seed: the same seed gives the same files.
        count: how many questions.
        out: the folder for image files and questions.jsonl; made if it is not there.
    """
    if count < 0:
        raise SystemExit(f"--count must not be negative, got {count}")
    write(seed, count, out)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
