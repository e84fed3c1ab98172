"""How many unseen questions the small checkpoint answers exactly, in each form, whole and with visual rows spoiled."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen3vl_disagg.assets.drawing import draw_scene, random_size
from qwen3vl_disagg.assets.scenes import Decks, Question, build_question, generate, questions
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from tools.training.forms import (
    BETWEEN,
    IMAGE_FIRST,
    PLAIN_KINDS,
    TASKS,
    TEXT_FIRST,
    TOOL_FORM,
    Conversation,
    Exchange,
    Reply,
    in_json,
    offer_tools,
    plain,
    read_call,
    request,
    result,
)
from tools.training.lessons import EncodedConversation, Prompts, decode, tool_exchanges

MARGIN = 16
"""Tokens an answer may have more than the right one; it is cut there, and wrong."""
BATCH = 50
Spoil = Callable[[Tensor, int], Tensor]
"""(features `[R, (1 + n) * h]`, h) -> features of the same shape."""


def _zero_deepstack(features: Tensor, hidden: int) -> Tensor:
    return torch.cat((features[:, :hidden], torch.zeros_like(features[:, hidden:])), dim=1)


def _zero_main(features: Tensor, hidden: int) -> Tensor:
    return torch.cat((torch.zeros_like(features[:, :hidden]), features[:, hidden:]), dim=1)


def _shift_deepstack(features: Tensor, hidden: int) -> Tensor:
    return torch.cat((features[:, :hidden], features[:, hidden:].roll(1, dims=0)), dim=1)


ABLATIONS: dict[str, Spoil] = {
    "deepstack_zeroed": _zero_deepstack,
    "main_rows_zeroed": _zero_main,
    "deepstack_shifted_by_one": _shift_deepstack,
}


@dataclass(frozen=True)
class KindReport:
    """Shares of a kind's questions: answered exactly, and answered by the kind's most frequent answer."""

    count: int
    exact: float
    most_frequent: float


@dataclass(frozen=True)
class FormReport:
    """Shares of what is asked in one form: answered rightly, and at least in that form (JSON, or a call)."""

    count: int
    right: float
    formed: float


@dataclass(frozen=True)
class Report:
    """Shares of exact answers: overall, by kind, and overall with each ablation, all with the images first.

    `text_first`: the same questions with the text first, by kind, with `all`; `between`: those about two images with
    the text between them. `forms`: JSON, calls, and what is said beside offered tools.
    """

    seed: int
    count: int
    exact: float
    most_frequent: float
    kinds: dict[str, KindReport]
    ablations: dict[str, float]
    text_first: dict[str, float]
    between: float
    forms: dict[str, FormReport]


@dataclass(frozen=True)
class Asked:
    """A conversation whose last answer is wanted, over these images."""

    conversation: Conversation
    images: list[Image.Image]

    @property
    def expected(self) -> str:
        return self.conversation.exchanges[-1].answer.text


@torch.inference_mode()
def answers(
    model: Qwen3VLMoeForConditionalGeneration, prompts: Prompts, asked: Sequence[Asked], spoil: Spoil | None = None
) -> list[str]:
    """Greedy last answers.

    One pass over the right answers finds those whose every token would be chosen; only the others are generated, the
    whole prompt recomputed for each token.
    """
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].conversation.prompts()[0]))
    texts = [""] * len(asked)
    for start in range(0, len(asked), BATCH):
        indices = order[start : start + BATCH]
        batch = [asked[i] for i in indices]
        for i, text in zip(indices, _batch_answers(model, prompts, batch, spoil), strict=True):
            texts[i] = text
    return texts


def _batch_answers(
    model: Qwen3VLMoeForConditionalGeneration, prompts: Prompts, asked: Sequence[Asked], spoil: Spoil | None
) -> list[str]:
    pictures = prompts.pictures([image for each in asked for image in each.images])
    features = model.get_image_feature(pictures.pixels, pictures.grids)
    if spoil is not None:
        features = spoil(features, model.config.text.hidden_size)
    owners: list[list[int]] = []
    for each in asked:
        start = sum(map(len, owners))
        owners.append(list(range(start, start + len(each.images))))
    encoded = [
        prompts.encode(each.conversation, [pictures.grids[i] for i in owner])
        for each, owner in zip(asked, owners, strict=True)
    ]

    def tokens(which: Sequence[int], said: Sequence[Sequence[int]], rows: Tensor | None) -> list[int]:
        turns = [(encoded[i].ids[: encoded[i].last] + list(said[i]), encoded[i].items) for i in which]
        packed = prompts.pack(turns, [owners[i] for i in which], pictures.grids)
        return decode(model, features, packed, rows).argmax(-1).tolist()

    wanted = [_last_targets(each) for each in encoded]
    chosen = tokens(range(len(asked)), [targets[:-1] for targets in wanted], _last_rows(encoded))
    said: list[list[int]] = [[] for _ in asked]
    wrong, at = [], 0
    for i, targets in enumerate(wanted):
        if chosen[at : at + len(targets)] == targets:
            said[i] = targets
        else:
            wrong.append(i)
        at += len(targets)
    while wrong:
        for i, token in zip(wrong, tokens(wrong, said, None), strict=True):
            said[i].append(token)
        wrong = [i for i in wrong if said[i][-1] != prompts.end_id and len(said[i]) < len(wanted[i]) + MARGIN]
    return [prompts.tokenizer.decode([t for t in ids if t != prompts.end_id]) for ids in said]


def _last_targets(encoded: EncodedConversation) -> list[int]:
    return encoded.targets[-(len(encoded.ids) - encoded.last + 1) :]


def _last_rows(encoded: Sequence[EncodedConversation]) -> Tensor:
    """Packed rows that predict the last answers."""
    rows, start = list[int](), 0
    for each in encoded:
        rows += range(start + each.last - 1, start + len(each.ids))
        start += len(each.ids)
    return torch.tensor(rows)


def evaluate(
    model: Qwen3VLMoeForConditionalGeneration, folder: Path, seed: int, count: int, *, forms: bool = True
) -> Report:
    """Measure on `count` scenes of `seed` in each order and in JSON, and on as many with tools.

    Without `forms` with the images first only: `text_first` and `forms` are empty, `between` is nan. What a model never
    learned is dear to measure, because every wrong answer is generated.
    """
    prompts = Prompts(folder)
    asked = list(questions(seed, count))
    images = [sample.images for sample in generate(seed, count)]

    def exact(order: str, spoil: Spoil | None = None) -> list[tuple[str, bool]]:
        """(kind, whether the answer is exact) of each question that can be put in this order."""
        fit = [(q, i) for q, i in zip(asked, images, strict=True) if order != BETWEEN or len(i) == 2]
        given = answers(model, prompts, [Asked(plain(q, order), i) for q, i in fit], spoil)
        return [(q.kind, text == q.answer) for (q, _), text in zip(fit, given, strict=True)]

    found = exact(IMAGE_FIRST)
    kinds, frequent = {}, 0
    for kind, share in _shares(found).items():
        of_kind = [question.answer for question in asked if question.kind == kind]
        top = Counter(of_kind).most_common(1)[0][1]
        frequent += top
        kinds[kind] = KindReport(len(of_kind), share, top / len(of_kind))
    text_first = exact(TEXT_FIRST) if forms else []
    return Report(
        seed,
        count,
        _share(found),
        frequent / count,
        kinds,
        {name: _share(exact(IMAGE_FIRST, spoil)) for name, spoil in ABLATIONS.items()},
        {"all": _share(text_first), **_shares(text_first)} if forms else {},
        _share(exact(BETWEEN)) if forms else math.nan,
        {**_json_report(model, prompts, asked, images, seed), **_tools_report(model, prompts, seed, count)}
        if forms
        else {},
    )


def _share(found: Sequence[tuple[str, bool]]) -> float:
    return sum(right for _, right in found) / max(1, len(found))


def _shares(found: Sequence[tuple[str, bool]]) -> dict[str, float]:
    return {kind: _share([each for each in found if each[0] == kind]) for kind in sorted({kind for kind, _ in found})}


def _json_report(
    model: Qwen3VLMoeForConditionalGeneration,
    prompts: Prompts,
    asked: Sequence[Question],
    images: Sequence[list[Image.Image]],
    seed: int,
) -> dict[str, FormReport]:
    """The same questions with a demand for JSON, in both orders by turns, without and with a key that is named."""
    rng = random.Random(f"json {seed}")
    reports = {}
    for name, with_key in (("json", False), ("json, key named", True)):
        conversations = [
            Asked(in_json(q, (IMAGE_FIRST, TEXT_FIRST)[i % 2], rng, with_key=with_key), images[i])
            for i, q in enumerate(asked)
        ]
        given = [_json_object(text) for text in answers(model, prompts, conversations)]
        right = [value == json.loads(each.expected) for value, each in zip(given, conversations, strict=True)]
        reports[name] = FormReport(len(right), sum(right) / len(right), sum(v is not None for v in given) / len(right))
    return reports


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def tool_questions(seed: int, count: int) -> list[tuple[str, Asked]]:
    """`count` balanced demands for tools or questions beside them, each with what it is called in the report.

    Of nine, three stand alone, three behind another demand and its result, two ask what no tool is for, and one is the
    result of a call.
    """
    rng = random.Random(f"tools {seed}")
    decks = Decks(rng)
    made = []
    for i in range(count):
        wanted = decks.deal("task", list(TASKS))
        tools = offer_tools(wanted, rng)
        part = decks.deal(
            "part", ["call"] * 3 + ["call, second"] * 3 + ["answer beside tools"] * 2 + ["after a result"]
        )
        kind = rng.choice(PLAIN_KINDS) if part == "answer beside tools" else TASKS[wanted].kind
        question = build_question(kind, rng, decks)
        while part != "answer beside tools" and question.answer == "nothing":
            question = build_question(kind, rng, decks)
        if part == "answer beside tools":
            exchanges = [Exchange(question.text, Reply.plain(question.answer))]
        else:
            exchanges = [request(TASKS[wanted], question, tools[wanted], rng)]
        if part == "call, second":
            exchanges = [*tool_exchanges(rng.choice(list(tools)), tools, question.scenes[0], rng), *exchanges]
        elif part == "after a result":
            exchanges.append(result(rng))
        conversation = Conversation(
            tuple(exchanges), 1, (IMAGE_FIRST, TEXT_FIRST)[i % 2], tuple(tools.values()), TOOL_FORM
        )
        made.append((part, Asked(conversation, [draw_scene(question.scenes[0], random_size(rng), rng)])))
    return made


def _tools_report(
    model: Qwen3VLMoeForConditionalGeneration, prompts: Prompts, seed: int, count: int
) -> dict[str, FormReport]:
    made = tool_questions(seed, count)
    given = answers(model, prompts, [asked for _, asked in made])
    reports = {}
    for part in sorted({part for part, _ in made}):
        results = [
            (text == asked.expected or _is_same_call(text, asked.expected), _is_formed(text, asked.expected))
            for (name, asked), text in zip(made, given, strict=True)
            if name == part
        ]
        right, formed = (sum(each) / len(results) for each in zip(*results, strict=True))
        reports[part] = FormReport(len(results), right, formed)
    return reports


def _is_same_call(text: str, expected: str) -> bool:
    return read_call(expected) is not None and read_call(text) == read_call(expected)


def _is_formed(text: str, expected: str) -> bool:
    """A call where one is expected, and none where none is."""
    return (read_call(text) is None) == (read_call(expected) is None)
