"""Training batches: scenes, and for each several sequences that share one pass through the vision tower.

A question alone is learned late. Listing the cells of the same picture tells the model where everything is, so most
scenes come with a list, and with a second question besides the balanced one. Questions stand before or behind their
pictures, some ask for JSON, and a few pictures are talked about with tools (`forms.py`).
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from qwen3vl_disagg.assets.drawing import NATIVE_SIZES, draw_scene, random_size
from qwen3vl_disagg.assets.scenes import (
    COLOURS,
    KINDS,
    LINES,
    ORDINALS,
    PLACES,
    PLURALS,
    SHAPES,
    THINGS,
    Decks,
    Question,
    Scene,
    ask,
    build_question,
)
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.model import ForwardBatch, Qwen3VLMoeForConditionalGeneration, separate_deepstack, splice_visual
from qwen3vl_disagg.model.attention import LayerCache
from qwen3vl_disagg.processing.patches import ImageProcessor
from qwen3vl_disagg.processing.positions import Grid, mrope_positions
from tools.training.folder import read_config
from tools.training.forms import (
    FORMS,
    PLAIN_KINDS,
    TASKS,
    TOOL_FORM,
    Conversation,
    Exchange,
    Reply,
    in_json,
    offer_tools,
    plain,
    random_order,
    request,
    result,
)

_SEARCH = ("place", "number", "comparison", "pair_more", "pair_has")
RESIZED, JPEG = 0.3, 0.15
"""Shares of the pictures that are drawn at another size, and that pass through JPEG."""
JSON_SHARE = 0.15
"""Of all questions."""
TOOL_CONVERSATIONS = 3
"""In a batch; few, because a prompt with a tool has over 400 tokens."""
TOOL_DECK = ("point", "pick", "report", "report")
"""What is wanted; numbers are learned last."""
PADDING = 1.4
"""Sequences that are padded to one length are at most this much longer than one another."""


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
"""What needs many examples."""
COUNTING = Mix(
    kinds={kind: {"number": 6, "comparison": 5, "pair_more": 5}.get(kind, 1) for kind in KINDS},
    list_share=0.2,
    sides={"shape": 1, "place": 1, "number": 4, "comparison": 3},
    pair_sides=("pair_at", "pair_has", "pair_more", "pair_more"),
)
"""What is learned last, also for tools."""


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
    """A training batch: `logit_rows [A]` predict `targets [A]`, each with a weight and the index of its form."""

    pictures: Pictures
    sequences: Sequences
    logit_rows: Tensor
    targets: Tensor
    weights: Tensor
    forms: Tensor


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as `ids`, images as `items`; the end of its last answer is a target and no id.

    `rows` (of `ids`) predict `targets`, each with a weight. `last` is where the last answer begins, in `ids`.
    """

    ids: list[int]
    items: list[VisualItem]
    rows: list[int]
    targets: list[int]
    weights: list[float]
    last: int


class Prompts:
    """Prompts as token ids: the same as the processor's, made for many drawn pictures at once."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.processor = ImageProcessor.from_folder(folder, self.config.vision)
        self.end_id = self.tokenizer.get_vocab()["<|im_end|>"]

    def encode(self, conversation: Conversation, grids: Sequence[Grid]) -> EncodedConversation:
        """A conversation with images of these grids."""
        left, ids, items = list(grids), list[int](), list[VisualItem]()
        rows, targets, weights, last = list[int](), list[int](), list[float](), 0
        for text, exchange in zip(conversation.prompts(), conversation.exchanges, strict=True):
            for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
                if token != self.config.image_token_id:
                    ids.append(token)
                    continue
                items.append(self._item(left.pop(0), len(ids)))
                ids += [token] * items[-1].num_rows
            answer, their_weights = self.answer(exchange.answer)
            last = len(ids)
            rows += range(last - 1, last - 1 + len(answer))
            targets += answer
            weights += their_weights
            ids += answer
        return EncodedConversation(ids[:-1], items, rows, targets, weights, last)

    def _item(self, grid: Grid, offset: int) -> VisualItem:
        num_rows = grid[0] * grid[1] * grid[2] // self.config.vision.merge_unit
        return VisualItem(
            modality="image", digest="", num_bytes=0, grid=grid, num_rows=num_rows, offset=offset, param=""
        )

    def answer(self, answer: Reply) -> tuple[list[int], list[float]]:
        """Ids of an answer with its end, and their weights: 1 / sqrt(n) for n tokens.

        What only gives the form does not thin out what is told: the latter counts as if it stood alone.
        """
        encoded = self.tokenizer.encode(answer.text, add_special_tokens=False)
        spans, at = [], 0
        for text, tells in answer.pieces:
            spans += [(at, at + len(text))] if tells else []
            at += len(text)
        telling = [any(a < end and b > start for start, end in spans) for a, b in encoded.offsets]
        telling.append(len(answer.pieces) == 1)
        strong, weak = sum(telling) ** -0.5, len(telling) ** -0.5
        return [*encoded.ids, self.end_id], [strong if tells else weak for tells in telling]

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


class GroupedBatch(ForwardBatch):
    """Whole sequences, causal, no cache. Neighbours of about one length are padded together: attention to a prompt of
    800 tokens does not pad 80 of 50 to its length.

    `logit_rows` are packed rows; None asks for the last one of each sequence.
    """

    def __init__(self, seq_lens: Sequence[int], logit_rows: Tensor | None) -> None:
        self.seq_lens = list(seq_lens)
        self.logit_rows = torch.tensor(self.seq_lens).cumsum(0) - 1 if logit_rows is None else logit_rows
        groups: list[list[int]] = []
        for length in self.seq_lens:
            if groups and max(length, *groups[-1]) <= PADDING * min(length, *groups[-1]):
                groups[-1].append(length)
            else:
                groups.append([length])
        self.groups = [ForwardBatch.for_prompt(group) for group in groups]
        self.group_tokens = [sum(group) for group in groups]

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, cache: LayerCache | None) -> Tensor:
        parts = (x.split(self.group_tokens) for x in (q_TNH, k_TGH, v_TGH))
        return torch.cat([group.attend(*each, None) for group, *each in zip(self.groups, *parts, strict=True)])


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
    batch = GroupedBatch(sequences.seq_lens, logit_rows)
    return language(sequences.ids, sequences.positions, batch, embeds, input_deepstack_embeds=dense)


def lesson_loss(model: Qwen3VLMoeForConditionalGeneration, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy of the answers' tokens.

    And its parts `[len(FORMS), 2]`, the sums of losses and of weights for each form, without gradients.
    """
    features = model.get_image_feature(lesson.pictures.pixels, lesson.pictures.grids)
    logits = decode(model, features, lesson.sequences, lesson.logit_rows)
    losses = F.cross_entropy(logits.float(), lesson.targets, reduction="none")
    losses = losses * lesson.weights
    parts = torch.zeros(len(FORMS), 2)
    parts.index_add_(0, lesson.forms, torch.stack((losses.detach(), lesson.weights), dim=1))
    return losses.sum() / lesson.weights.sum(), parts


class Lessons(IterableDataset[Lesson]):
    """An endless stream of batches of `num_scenes` balanced questions and what else is asked about them.

    The same for the same `seed`, any text or number.
    """

    def __init__(self, folder: Path, seed: int | str, num_scenes: int, mix: Mix) -> None:
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
        asked: list[tuple[Conversation, list[int]]] = []
        single: list[tuple[Scene, list[int]]] = []
        for question in questions:
            owners = list(range(len(images), len(images) + len(question.scenes)))
            images += [training_picture(scene, rng) for scene in question.scenes]
            single += [(question.scenes[0], owners)] if len(owners) == 1 else []
            for each in [question, *self.side_questions(question, rng)]:
                order = random_order(len(owners), rng)
                asked.append((in_json(each, order, rng) if rng.random() < JSON_SHARE else plain(each, order), owners))
        for scene, owners in rng.sample(single, min(TOOL_CONVERSATIONS, len(single))):
            asked.append((tool_conversation(scene, rng), owners))
        pictures = prompts.pictures(images)
        encoded = [
            (prompts.encode(conversation, [pictures.grids[i] for i in owners]), conversation.form_index, owners)
            for conversation, owners in asked
        ]
        encoded.sort(key=lambda each: len(each[0].ids))
        starts = accumulate((len(each.ids) for each, _, _ in encoded), initial=0)
        return Lesson(
            pictures,
            prompts.pack([(e.ids, e.items) for e, _, _ in encoded], [o for _, _, o in encoded], pictures.grids),
            torch.tensor(
                [start + row for (each, _, _), start in zip(encoded, starts, strict=False) for row in each.rows]
            ),
            torch.tensor([target for each, _, _ in encoded for target in each.targets]),
            torch.tensor([weight for each, _, _ in encoded for weight in each.weights]),
            torch.tensor([form for each, form, _ in encoded for _ in each.targets]),
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


def tool_conversation(scene: Scene, rng: random.Random) -> Conversation:
    """Tools are offered, and what they are for is wanted or a question is asked, thrice; calls have results."""
    wanted = rng.choice([name for name in TOOL_DECK if _task_question(TASKS[name].kind, scene, rng)])
    tools = offer_tools(wanted, rng)
    others = rng.choices([*tools, ""], k=2)
    plan = rng.choice(((wanted, *others), (wanted, *others), ("", wanted, *others[:1])))
    exchanges = [exchange for name in plan for exchange in tool_exchanges(name, tools, scene, rng)]
    return Conversation(tuple(exchanges), 1, random_order(1, rng), tuple(tools.values()), TOOL_FORM)


def tool_exchanges(
    name: str, tools: Mapping[str, Mapping[str, Any]], scene: Scene, rng: random.Random
) -> list[Exchange]:
    """A demand for the tool for the task `name`, and its result; a question where there is none, or nothing fits."""
    question = _task_question(TASKS[name].kind, scene, rng) if name else None
    if question is None:
        return [_plain_exchange(scene, rng)]
    return [request(TASKS[name], question, tools[name], rng), result(rng)]


def _task_question(kind: str, scene: Scene, rng: random.Random) -> Question | None:
    """A question whose answer a tool's arguments can be. None where nothing stands once, or nothing at all."""
    if kind == "number":
        noun = rng.choice((PLURALS[rng.choice(SHAPES)], f"{rng.choice(COLOURS)} things"))
        return ask(kind, (scene,), {"noun": noun} if rng.random() < 0.3 else side_args(kind, scene, rng), rng)
    if kind == "place":
        found = [str(thing) for thing in scene if thing and scene.count(thing) == 1]
        return ask(kind, (scene,), {"thing": rng.choice(found)}, rng) if found else None
    found = [place for place, thing in zip(PLACES, scene, strict=True) if thing]
    return ask(kind, (scene,), {"place": rng.choice(found)}, rng) if found else None


def _plain_exchange(scene: Scene, rng: random.Random) -> Exchange:
    """A question that no tool is for."""
    while True:  # not every question has exactly one answer; that for what is at a place has
        kind = rng.choice(PLAIN_KINDS)
        question = ask(kind, (scene,), side_args(kind, scene, rng), rng)
        if question is not None:
            return Exchange(question.text, Reply.plain(question.answer))


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
