"""Each question's answer is computed again from its text and its scenes, by other means than the builder's."""

import json
import random
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen3vl_disagg.assets import scenes
from qwen3vl_disagg.assets.scenes import (
    COLOURS,
    KINDS,
    PLACES,
    SHAPES,
    Decks,
    ask,
    build_question,
    generate,
    questions,
    random_scene,
    write,
)
from tools.training.lessons import side_args

ROWS = {"top": 0, "middle": 1, "bottom": 2}
COLUMNS = {"left": 0, "middle": 1, "right": 2}


def cell(grid, row, column):
    thing = grid[row * 3 + column]
    return "nothing" if thing is None else f"{thing[0]} {thing[1]}"


def place_words(row, column):
    if (row, column) == (1, 1):
        return "centre"
    return f"{list(ROWS)[row]} {list(COLUMNS)[column]}"


def cells_of(grid):
    return [(row, column, *grid[row * 3 + column]) for row in range(3) for column in range(3) if grid[row * 3 + column]]


def count(grid, noun):
    word = noun.split()[0]
    return sum(word == colour or word in (shape + "s", shape + "es") for _, _, colour, shape in cells_of(grid))


def right_answers(kind, text, grids):
    """Every answer that could be called right, from the wording alone."""
    grid = grids[0]
    words = text.rstrip("?.").split()
    if kind.startswith("pair"):
        grid = grids[1] if "second" in words else grids[0]
    if kind == "colour":
        shape = next(word for word in words if word in SHAPES)
        return [c for _, _, c, s in cells_of(grid) if s == shape]
    if kind == "shape":
        colour = next(word for word in words if word in COLOURS)
        return [s for _, _, c, s in cells_of(grid) if c == colour]
    if kind == "place":
        return [place_words(row, column) for row, column, c, s in cells_of(grid) if [c, s] == words[-2:]]
    if kind == "number":
        noun = re.search(r"(\w+ things|\w+s)\b(?= are|\.)", text).group(1)
        return [str(count(grid, noun))]
    if kind == "comparison":
        first, second = words[3], words[5]
        a, b = count(grid, first), count(grid, second)
        return [first] if a > b else [second] if b > a else ["equal"]
    if kind in ("at", "pair_at"):
        named = re.search(r"at the (.+?)(?: of the \w+ image)?\?", text).group(1)
        return [cell(grid, r, c) for r in range(3) for c in range(3) if place_words(r, c) == named]
    if kind == "row":
        name, line = words[2:4]
        if line == "row":
            return [", ".join(cell(grid, ROWS[name], column) for column in range(3))]
        return [", ".join(cell(grid, row, COLUMNS[name]) for row in range(3))]
    if kind in ("list", "pair_list"):
        return [", ".join(cell(grid, row, column) for row in range(3) for column in range(3))]
    if kind == "pair_more":
        a, b = len(cells_of(grids[0])), len(cells_of(grids[1]))
        return ["the first"] if a > b else ["the second"] if b > a else ["equal"]
    if kind == "pair_has":
        here = [any([c, s] == words[-2:] for _, _, c, s in cells_of(grid)) for grid in grids]
        return ["both" if all(here) else "neither" if not any(here) else "the first" if here[0] else "the second"]
    raise AssertionError(kind)


@given(st.sampled_from(list(KINDS)), st.integers(0, 2**32))
def test_each_question_has_exactly_one_answer(kind, seed):
    rng = random.Random(seed)
    question = build_question(kind, rng, Decks(rng))
    assert len(question.scenes) == (2 if kind.startswith("pair") else 1)
    assert right_answers(kind, question.text, question.scenes) == [question.answer]


@given(st.sampled_from(["colour", "shape", "place", "number", "comparison"]), st.integers(0, 2**32))
def test_ambiguous_questions_are_not_asked(kind, seed):
    rng = random.Random(seed)
    scene = random_scene(rng)
    args = side_args(kind, scene, rng)
    right = right_answers(kind, KINDS[kind].wordings[0].format(**args), (scene,))
    asked = ask(kind, (scene,), args, rng)
    assert (None if asked is None else [asked.answer]) == (right if len(right) == 1 else None)


@pytest.mark.parametrize("seed", [0, 7, 1_000_003])
def test_no_answer_is_frequent(seed):
    seen = defaultdict(Counter)
    for question in questions(seed, 500):
        seen[question.kind][question.answer] += 1
    assert set(seen) == set(KINDS)
    for kind, counter in seen.items():
        assert counter.total() >= 40
        assert len(counter) > 2, kind
        assert max(counter.values()) <= 0.4 * counter.total(), kind


def test_same_seed_same_scenes():
    first, again, other = generate(3, 24), generate(3, 24), generate(4, 24)
    assert [(s.question, s.answer) for s in first] == [(s.question, s.answer) for s in again]
    assert [i.tobytes() for s in first for i in s.images] == [i.tobytes() for s in again for i in s.images]
    assert [s.answer for s in first] != [s.answer for s in other]


def test_places_are_named_in_reading_order():
    assert [place_words(row, column) for row in range(3) for column in range(3)] == list(PLACES)


def test_command_writes_files(tmp_path):
    write(5, 60, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    formats, sizes = set(), set()
    for line, sample in zip(lines, generate(5, 60), strict=True):
        assert set(line) == {"images", "question", "answer", "kind"}
        assert (line["question"], line["answer"], line["kind"]) == (sample.question, sample.answer, sample.kind)
        assert len(line["images"]) == len(sample.images)
        for name, drawn in zip(line["images"], sample.images, strict=True):
            with Image.open(tmp_path / "out" / name) as image:
                assert image.size == drawn.size
                formats.add(image.format)
                sizes.add(image.size)
    assert formats == {"JPEG", "PNG", "WEBP", "GIF", "BMP"}
    assert any(width == height > 128 for width, height in sizes)
    assert any(width * 3 == height * 4 for width, height in sizes)


def test_builder_refuses_a_question_without_its_answer(monkeypatch):
    kind = scenes.KINDS["colour"]
    monkeypatch.setitem(scenes.KINDS, "colour", scenes.Kind(kind.build, lambda *_: None, kind.wordings))
    rng = random.Random(0)
    with pytest.raises(RuntimeError, match="was built for"):
        build_question("colour", rng, Decks(rng))
