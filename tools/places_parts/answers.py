"""What the oracle answered, in a file: which checkpoint and which questions it was asked, and every answer.

{"checkpoint": .., "questions": .., "seed": .., "answers": {"float32": [..], "bfloat16": [..]}, ..}
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from qwen3vl_disagg.core.errors import InputError
from tools.places_parts.questions import Question, digest

FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
MAX_PIXELS = 131_072


class Answer(msgspec.Struct, frozen=True):
    """`token_ids`: the end token included when it came. `best`: at each of them the best of the float32 oracle's
    logits behind the prompt and the tokens before it, (token id, logit), the best first."""

    text: str
    token_ids: list[int]
    best: list[list[tuple[int, float]]]


class Answers(msgspec.Struct, frozen=True):
    """`checkpoint`, `questions`: digests of what was asked. `answers`: by dtype, in the questions' order."""

    checkpoint: str
    questions: str
    versions: dict[str, str]
    answers: dict[str, list[Answer]]


def wide_folder(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint in which pictures may have more sizes: the small one makes every picture 16 to 21 visual
    tokens, here they are 4 to 128."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    settings = folder / "preprocessor_config.json"
    values = json.loads(settings.read_text())
    values["size"] = {"shortest_edge": 4096, "longest_edge": MAX_PIXELS}
    settings.write_text(json.dumps(values))
    return folder


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 (hex) of all that decides an answer."""
    total = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def write_answers(path: Path, answers: Answers) -> None:
    path.write_bytes(msgspec.json.encode(answers))


def read_answers(path: Path, folder: Path, asked: Sequence[Question], dtypes: Sequence[str]) -> Answers:
    """InputError for a file of another checkpoint, of other questions, or without one of the dtypes."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Answers)
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(f"{path}: {error}", param="answers") from None
    if found.checkpoint != checkpoint_digest(folder):
        raise InputError(f"{path} has answers of another checkpoint", param="answers")
    if found.questions != digest(asked):
        raise InputError(f"{path} has answers to other questions (seed, count, release of Pillow)", param="answers")
    if missing := set(dtypes) - set(found.answers):
        raise InputError(f"{path} has no answers in {', '.join(sorted(missing))}", param="answers")
    return found
