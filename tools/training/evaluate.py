"""How many unseen questions the small checkpoint answers exactly, whole and with parts of its visual rows spoiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen3vl_disagg.assets.scenes import Sample, generate
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from tools.training.lessons import Prompts, decode

MAX_NEW_TOKENS = 40
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
class Report:
    """Shares of exact answers: overall, by kind, and overall with each ablation."""

    seed: int
    count: int
    exact: float
    most_frequent: float
    kinds: dict[str, KindReport]
    ablations: dict[str, float]


@torch.inference_mode()
def answers(
    model: Qwen3VLMoeForConditionalGeneration, prompts: Prompts, samples: Sequence[Sample], spoil: Spoil | None = None
) -> list[str]:
    """Greedy answers, the whole prompt recomputed for each token."""
    images = [image for sample in samples for image in sample.images]
    pictures = prompts.pictures(images)
    features = model.get_image_feature(pictures.pixels, pictures.grids)
    if spoil is not None:
        features = spoil(features, model.config.text.hidden_size)
    owners: list[list[int]] = []
    for sample in samples:
        start = sum(map(len, owners))
        owners.append(list(range(start, start + len(sample.images))))
    turns = [
        prompts.question(sample.question, [pictures.grids[i] for i in owner])
        for sample, owner in zip(samples, owners, strict=True)
    ]
    said: list[list[int]] = [[] for _ in samples]
    running = list(range(len(samples)))
    for _ in range(MAX_NEW_TOKENS):
        packed = prompts.pack(
            [(turns[i][0] + said[i], turns[i][1]) for i in running], [owners[i] for i in running], pictures.grids
        )
        tokens = decode(model, features, packed, None).argmax(-1).tolist()
        for i, token in zip(running, tokens, strict=True):
            said[i].append(token)
        running = [i for i in running if said[i][-1] != prompts.end_id]
        if not running:
            break
    return [prompts.tokenizer.decode([t for t in ids if t != prompts.end_id]) for ids in said]


def evaluate(model: Qwen3VLMoeForConditionalGeneration, folder: Path, seed: int, count: int) -> Report:
    """Measure on `count` scenes of `seed`."""
    prompts = Prompts(folder)
    samples = generate(seed, count)
    wrong_of: dict[str, list[bool]] = {}
    for name, spoil in {"": None, **ABLATIONS}.items():
        wrong_of[name] = []
        for start in range(0, count, BATCH):
            batch = samples[start : start + BATCH]
            given = answers(model, prompts, batch, spoil)
            wrong_of[name] += [text != sample.answer for text, sample in zip(given, batch, strict=True)]
    kinds, frequent = {}, 0
    for kind in dict.fromkeys(sample.kind for sample in samples):
        right = [not wrong for wrong, sample in zip(wrong_of[""], samples, strict=True) if sample.kind == kind]
        top = Counter(sample.answer for sample in samples if sample.kind == kind).most_common(1)[0][1]
        frequent += top
        kinds[kind] = KindReport(len(right), sum(right) / len(right), top / len(right))
    exact = {name: 1 - sum(wrong) / count for name, wrong in wrong_of.items()}
    return Report(seed, count, exact.pop(""), frequent / count, dict(sorted(kinds.items())), exact)
