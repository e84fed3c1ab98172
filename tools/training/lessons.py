"""Training batches: scenes, and for each several sequences that share one pass through the vision tower.

A question alone is learned late. Listing the cells of the same picture tells the model where everything is, so most
scenes come with a list, and with a second question besides the balanced one.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from qwen3vl_disagg.assets.drawing import NATIVE_SIZES, draw_scene, random_size
from qwen3vl_disagg.assets.scenes import (
    KINDS,
    LINES,
    ORDINALS,
    PLACES,
    PLURALS,
    THINGS,
    Decks,
    Question,
    Scene,
    ask,
    build_question,
)
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.model import ForwardBatch, Qwen3VLMoeForConditionalGeneration, separate_deepstack, splice_visual
from qwen3vl_disagg.processing.patches import ImageProcessor
from qwen3vl_disagg.processing.positions import Grid, mrope_positions
from tools.training.folder import read_config

_SEARCH = ("place", "number", "comparison", "pair_more", "pair_has")
RESIZED, JPEG = 0.3, 0.15
"""Shares of the pictures that are drawn at another size, and that pass through JPEG."""


@dataclass(frozen=True)
class Mix:
    """What is asked: how often each kind as the balanced question, how often a list comes with it, and which kinds
    are asked besides about one picture and about two."""

    kinds: Mapping[str, int]
    list_share: float
    sides: Mapping[str, int]
    pair_sides: tuple[str, ...]


SEEING = Mix(
    kinds={kind: 2 if kind in ("shape", "colour") else 1 for kind in KINDS},
    list_share=0.6,
    sides={"colour": 3, "shape": 4, "place": 2, "at": 1, "row": 1},
    pair_sides=("pair_at",),
)
"""What is where."""
SEARCHING = Mix(
    kinds={kind: 3 if kind in _SEARCH else 1 for kind in KINDS},
    list_share=0.25,
    sides={"colour": 1, "shape": 1, "place": 3, "number": 2, "comparison": 1},
    pair_sides=("pair_at", "pair_has", "pair_has", "pair_more"),
)
"""Where is what, and how often."""
FINISHING = Mix(
    kinds={kind: {"pair_has": 8, "number": 5, "comparison": 5}.get(kind, 1) for kind in KINDS},
    list_share=0.2,
    sides={"shape": 1, "place": 1, "number": 3, "comparison": 3},
    pair_sides=("pair_at", "pair_has", "pair_has", "pair_more"),
)
"""What is learned last."""


@dataclass(frozen=True)
class Pictures:
    """Patches of several images `[P, patch_dim]` and their grids."""

    pixels: Tensor
    grids: list[Grid]


@dataclass(frozen=True)
class Sequences:
    """Packed prompts. `visual_rows [R]` picks each placeholder's row among the rows of the `Pictures`."""

    ids: Tensor
    positions: Tensor
    seq_lens: list[int]
    visual_rows: Tensor


@dataclass(frozen=True)
class Lesson:
    """A training batch: `logit_rows [A]` predict `targets [A]`, each with a weight."""

    pictures: Pictures
    sequences: Sequences
    logit_rows: Tensor
    targets: Tensor
    weights: Tensor


class Prompts:
    """Prompts as token ids: the same as the processor's, made for many drawn pictures at once."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.processor = ImageProcessor.from_folder(folder, self.config.vision)
        self.end_id = self.tokenizer.get_vocab()["<|im_end|>"]

    def question(self, text: str, grids: Sequence[Grid]) -> tuple[list[int], list[VisualItem]]:
        """Ids of a user turn with images and the opening of the answer, and where the images stand."""
        pictures = "<|vision_start|><|image_pad|><|vision_end|>" * len(grids)
        template = f"<|im_start|>user\n{pictures}{text}<|im_end|>\n<|im_start|>assistant\n"
        left, ids, items = list(grids), list[int](), list[VisualItem]()
        for token in self.tokenizer.encode(template, add_special_tokens=False).ids:
            if token != self.config.image_token_id:
                ids.append(token)
                continue
            grid = left.pop(0)
            num_rows = grid[0] * grid[1] * grid[2] // self.config.vision.merge_unit
            items.append(
                VisualItem(
                    modality="image", digest="", num_bytes=0, grid=grid, num_rows=num_rows, offset=len(ids), param=""
                )
            )
            ids.extend([token] * num_rows)
        return ids, items

    def answer(self, text: str) -> list[int]:
        """Ids of an answer with its end."""
        return [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.end_id]

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        parts = [self.processor.patches(np.asarray(image)) for image in images]
        return Pictures(torch.cat([pixels for pixels, _ in parts]), [grid for _, grid in parts])

    def pack(
        self, prompts: Sequence[tuple[list[int], list[VisualItem]]], owners: Sequence[Sequence[int]], grids: list[Grid]
    ) -> Sequences:
        """Prompts behind one another; `owners[i]` are the pictures of prompt i, by their index in `grids`."""
        merge = self.config.vision.spatial_merge_size
        num_rows = [t * h * w // self.config.vision.merge_unit for t, h, w in grids]
        starts = [sum(num_rows[:i]) for i in range(len(num_rows))]
        positions = [mrope_positions(len(ids), items, merge)[0] for ids, items in prompts]
        rows = [torch.arange(starts[i], starts[i] + num_rows[i]) for owner in owners for i in owner]
        return Sequences(
            torch.tensor([token for ids, _ in prompts for token in ids]),
            torch.cat(positions, dim=1),
            [len(ids) for ids, _ in prompts],
            torch.cat(rows),
        )


def decode(
    model: Qwen3VLMoeForConditionalGeneration, features: Tensor, sequences: Sequences, logit_rows: Tensor | None
) -> Tensor:
    """Logits `[rows, V]` of packed prompts over image features `[R, (1 + n) * h]`.

    `logit_rows` are packed rows; None asks for the last one of each prompt.
    """
    language = model.language_model
    if language is None:
        raise ValueError("the model has no language model")
    config = model.config
    main, deepstack = separate_deepstack(features[sequences.visual_rows], config.text.hidden_size)
    embeds, dense = splice_visual(
        sequences.ids, language.model.embed_tokens(sequences.ids), (config.image_token_id,), main, deepstack
    )
    batch = ForwardBatch.for_prompt(sequences.seq_lens, last_only=True)
    if logit_rows is not None:
        batch.logit_rows = logit_rows
    return language(sequences.ids, sequences.positions, batch, embeds, input_deepstack_embeds=dense)


def lesson_loss(model: Qwen3VLMoeForConditionalGeneration, lesson: Lesson) -> Tensor:
    """Weighted mean cross-entropy of the answers' tokens."""
    features = model.get_image_feature(lesson.pictures.pixels, lesson.pictures.grids)
    logits = decode(model, features, lesson.sequences, lesson.logit_rows)
    losses = F.cross_entropy(logits.float(), lesson.targets, reduction="none")
    return (losses * lesson.weights).sum() / lesson.weights.sum()


class Lessons(IterableDataset[Lesson]):
    """An endless, seeded stream of batches of `num_scenes` balanced questions and what else is asked about them."""

    def __init__(self, folder: Path, seed: int, num_scenes: int, mix: Mix) -> None:
        self.folder, self.seed, self.num_scenes, self.mix = folder, seed, num_scenes, mix

    def __iter__(self) -> Iterator[Lesson]:
        prompts = Prompts(self.folder)
        rng = random.Random(f"lessons {self.seed}")
        decks = Decks(rng)
        deck = [kind for kind, weight in self.mix.kinds.items() for _ in range(weight)]
        while True:
            yield self.lesson(
                prompts, rng, [build_question(decks.deal("kind", deck), rng, decks) for _ in range(self.num_scenes)]
            )

    def lesson(self, prompts: Prompts, rng: random.Random, questions: Sequence[Question]) -> Lesson:
        images: list[Image.Image] = []
        asked: list[tuple[Question, list[int]]] = []
        for question in questions:
            owners = list(range(len(images), len(images) + len(question.scenes)))
            images += [training_picture(scene, rng) for scene in question.scenes]
            asked += [(each, owners) for each in [question, *self.side_questions(question, rng)]]
        pictures = prompts.pictures(images)
        turns, targets, weights, logit_rows, total = [], list[int](), list[float](), list[int](), 0
        for question, owners in asked:
            ids, items = prompts.question(question.text, [pictures.grids[i] for i in owners])
            answer = prompts.answer(question.answer)
            turns.append((ids + answer[:-1], items))
            logit_rows += range(total + len(ids) - 1, total + len(ids) + len(answer) - 1)
            targets += answer
            weights += [len(answer) ** -0.5] * len(answer)
            total += len(ids) + len(answer) - 1
        return Lesson(
            pictures,
            prompts.pack(turns, [owners for _, owners in asked], pictures.grids),
            torch.tensor(logit_rows),
            torch.tensor(targets),
            torch.tensor(weights),
        )

    def side_questions(self, question: Question, rng: random.Random) -> list[Question]:
        """Sometimes a list, and one more question about the same scenes."""
        pair = len(question.scenes) == 2
        more: list[Question | None] = []
        if rng.random() < self.mix.list_share and not question.kind.endswith("list"):
            args = {"image": rng.choice(ORDINALS)} if pair else {}
            more.append(ask("pair_list" if pair else "list", question.scenes, args, rng))
        if pair:
            kinds = self.mix.pair_sides
            kind = kinds[0] if len(kinds) == 1 else rng.choice(kinds)
            args = {"place": rng.choice(PLACES), "image": rng.choice(ORDINALS)}
            if kind == "pair_has":
                args["thing"] = str(rng.choice([thing for scene in question.scenes for thing in scene if thing]))
            more.append(ask(kind, question.scenes, args, rng))
        else:
            candidates = [
                ask(kind, question.scenes, side_args(kind, question.scenes[0], rng), rng)
                for kind in rng.choices(list(self.mix.sides), weights=list(self.mix.sides.values()), k=4)
            ]
            more += [each for each in candidates if each is not None][:1]
        return [each for each in more if each is not None]


def side_args(kind: str, scene: Scene, rng: random.Random) -> dict[str, str]:
    """Args for a question of `kind` about something that is there."""
    thing = rng.choice([thing for thing in scene if thing] or [rng.choice(THINGS)])
    if kind == "number":
        return {"noun": rng.choice((PLURALS[thing.shape], f"{thing.colour} things"))}
    if kind == "comparison":
        other = rng.choice([shape for shape in PLURALS if shape != thing.shape])
        return dict(zip(("first", "second"), rng.sample([PLURALS[thing.shape], PLURALS[other]], 2), strict=True))
    return {
        "colour": {"shape": thing.shape},
        "shape": {"colour": thing.colour},
        "place": {"thing": str(thing)},
        "at": {"place": rng.choice(PLACES)},
        "row": {"line": rng.choice(list(LINES))},
    }[kind]


def training_picture(scene: Scene, rng: random.Random) -> Image.Image:
    """A drawn scene, mostly at native size; some of another size, some through a JPEG file."""
    native = rng.random() >= RESIZED
    size = rng.choices(NATIVE_SIZES, weights=(6, 1, 1))[0] if native else random_size(rng)
    image = draw_scene(scene, size, rng)
    if rng.random() < JPEG:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(90, 98))
        image = Image.open(buffer).convert("RGB")
    return image
