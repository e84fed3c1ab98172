"""Requests with the answers that one process gives to them.

    python -m tools.chaos_parts.questions --seed 1 --count 60 --out pool.json

Run as a process of its own: whoever asks afterwards need not hold a model.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qwen3vl_disagg.assets.scenes import COLOURS, SHAPES, Sample, generate

MARGIN = 1e-3
"""Between the logits of the token that was taken and of the next best one, at least. Below it the last bits may
decide, and these depend on what else is in the batch."""
SPARE = 1.5
"""So many times the requests are tried, for those that have no such margin."""
TOP = 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": list(COLOURS)}, "shape": {"enum": list(SHAPES)}},
    "required": ["colour", "shape"],
    "additionalProperties": False,
}


class Asked(msgspec.Struct, frozen=True):
    """`body`: a chat request as it is sent; `expected`: the text of each of its answers."""

    name: str
    kind: str
    body: dict[str, Any]
    expected: list[str]


@dataclass(frozen=True)
class Draft:
    """A request that nobody has answered yet."""

    kind: str
    messages: list[dict[str, Any]]
    fields: dict[str, Any]


def drafts(seed: int, count: int) -> Iterator[Draft]:
    """Kinds in turn; some pictures are in several requests."""
    rng = random.Random(f"questions {seed}")
    samples = generate(seed, 6 * count)
    singles = [sample for sample in samples if len(sample.images) == 1]
    pairs = [sample for sample in samples if len(sample.images) == 2]
    for n in range(count):
        kind = list(KINDS)[n % len(KINDS)]
        form, fields = KINDS[kind]
        sample = (pairs if form == "pair" else singles)[n]
        yield Draft(kind, [{"role": "user", "content": _content(form, sample, singles[n // 3], rng)}], dict(fields))


def _content(form: str, sample: Sample, other: Sample, rng: random.Random) -> list[dict[str, Any]]:
    images = {
        "text": [],
        "image": sample.images,
        "pair": sample.images,
        "repeat": sample.images * 2,
        "shared": [*other.images, *sample.images],
    }[form]
    parts: list[dict[str, Any]] = []
    for image in images:
        out, kind = io.BytesIO(), rng.choice(FORMATS)
        image.save(out, kind)
        url = f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": sample.question}]


_STREAM = {"stream": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "image": ("image", {}),
    "image, streamed": ("image", _STREAM),
    "two images": ("pair", {}),
    "two images, streamed": ("pair", _STREAM),
    "one image twice": ("repeat", {}),
    "an image of others": ("shared", _STREAM),
    "text": ("text", {}),
    "long text, streamed": ("text", {**_STREAM, "max_tokens": 160, "ignore_eos": True}),
    "two answers": ("image", {"n": 2}),
    "two answers, streamed": ("image", {"n": 2, **_STREAM}),
    "schema": (
        "image",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}},
    ),
}
"""Kind of request -> the pictures that it has, and its fields."""


def answered(drafts: Sequence[Draft], count: int) -> list[Asked]:
    """The first `count` of those whose answers have a margin, as `LLM` answers them. RuntimeError if there are less."""
    import torch

    from qwen3vl_disagg import LLM
    from qwen3vl_disagg.core.grammar import Grammar
    from qwen3vl_disagg.core.requests import SamplingParams

    torch.set_num_threads(1)
    llm = LLM(dtype="float32")
    sampling = [
        SamplingParams(
            max_new_tokens=draft.fields.get("max_tokens", 64),
            ignore_eos=draft.fields.get("ignore_eos", False),
            n=draft.fields.get("n", 1),
            logprobs=TOP,
            grammar=Grammar.of_schema(SCHEMA) if "response_format" in draft.fields else None,
        )
        for draft in drafts
    ]
    found = []
    results = llm.chat([draft.messages for draft in drafts], sampling)
    banned = set(llm.processor.generation.eos_token_ids)
    for number, (draft, result) in enumerate(zip(drafts, results, strict=True)):
        rivals = [
            [(i, p) for i, p in entry.top if not (draft.fields.get("ignore_eos") and i in banned)]
            for entry in result.logprobs or []
        ]
        # A grammar forbids tokens that are among the best: of it no margin can be told.
        if "response_format" not in draft.fields and margin(rivals, result.token_ids) < MARGIN:
            continue
        texts = [one.text for one in (result, *(result.others or []))]
        body = {"messages": draft.messages, "temperature": 0, "max_tokens": 64, **draft.fields}
        found.append(Asked(f"{number} {draft.kind}", draft.kind, body, texts))
    if len(found) < count:
        raise RuntimeError(f"{len(found)} of {len(drafts)} requests have an answer with a margin; {count} are wanted")
    return found[:count]


def margin(tops: Sequence[Sequence[tuple[int, float]]], taken: Sequence[int]) -> float:
    """The least distance between the token taken and the best other one, over all tokens of an answer."""
    least = float("inf")
    for top, token_id in zip(tops, taken, strict=True):
        values = dict(top)
        others = [value for i, value in top if i != token_id]
        if others and token_id in values:
            least = min(least, values[token_id] - max(others))
    return least


def make_pool(seed: int, count: int) -> list[Asked]:
    return answered(list(drafts(seed, round(count * SPARE))), count)


def read_pool(path: Path) -> list[Asked]:
    return msgspec.json.decode(path.read_bytes(), type=list[Asked])


def main(seed: int, count: int, out: Path) -> None:
    """Write requests and their answers.

    Args:
        seed: the same seed gives the same requests.
        count: how many.
        out: the file.
    """
    pool = make_pool(seed, count)
    out.write_bytes(msgspec.json.encode(pool))
    print(json.dumps({"requests": len(pool)}))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
