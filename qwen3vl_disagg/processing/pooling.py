"""Inputs of embedding models and rerankers -> conversations, in the form that the published checkpoints were made with.

An input is a text, or an object: with `text`, `image` (each one or a list) and `video` (one, or a list of frames), or
with `content`, parts as a message has them.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.core.settings import Task, TaskChoice
from qwen3vl_disagg.processing.json_values import check_text
from qwen3vl_disagg.processing.messages import Placed
from qwen3vl_disagg.processing.prompt_options import MediaOptions, PromptOptions

EMBED_INSTRUCTION = "Represent the user's input."
RERANK_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
ANSWERS = ("yes", "no")
"""Tokens whose logits make the score."""
NOTHING = "NULL"
"""Stands for an input with nothing in it."""
OF_IMAGES = MediaOptions(min_pixels=4096, max_pixels=1_843_200)
OF_CLIPS = MediaOptions(total_pixels=7_864_320, fps=1.0, max_frames=64)
"""Where a request says nothing of sizes and frames."""
MAX_INSTRUCTION_CHARS = 2**14
MAX_PARTS = 1024
"""Of an input."""
MODULES_FILE = "modules.json"
_BY_MODULE: dict[str, Task] = {"Pooling": "embed", "LogitScore": "rerank"}
"""Last word of a module's type in sentence-transformers' list of them."""
_BY_NAME: dict[str, Task] = {"qwen3-vl-embedding": "embed", "qwen3-vl-reranker": "rerank"}
_SAMPLING = ("fps", "max_frames")
_OWN = ("text", "image", "video", *_SAMPLING)
_DOES: dict[Task, str] = {"generate": "answers", "embed": "gives vectors", "rerank": "scores documents"}

Conversation = list[dict[str, Any]]


def find_task(folder: Path, choice: TaskChoice = "auto") -> Task:
    """What a checkpoint is for: as it is said, or as its modules or its name say. CheckpointError for a list of modules
    that cannot be read."""
    if choice != "auto":
        return choice
    path = folder / MODULES_FILE
    if path.is_file():
        try:
            kinds = [str(module["type"]).rpartition(".")[2] for module in json.loads(path.read_bytes())]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(folder, [f"{MODULES_FILE} cannot be read: {error}"]) from error
        for kind, task in _BY_MODULE.items():
            if kind in kinds:
                return task
    real = folder.resolve()
    name = (real.parent.parent if real.parent.name == "snapshots" else real).name.lower()
    return next((task for part, task in _BY_NAME.items() if part in name), "generate")


def check_task(task: Task, wanted: Task, what: str) -> None:
    """InputError for what a model is not for."""
    if task != wanted:
        reason = f"{what} needs a model that {_DOES[wanted]}; this one {_DOES[task]} (see --task)"
        raise InputError(reason, param="model", code="unsupported_task")


def sized(options: PromptOptions) -> PromptOptions:
    """With the sizes and frames of the published checkpoints where a request says nothing."""
    image, clip = options.image.over(OF_IMAGES), options.clip.over(OF_CLIPS)
    return msgspec.structs.replace(options, image=image, clip=clip)


def embed_messages(given: object, instruction: object, where: str) -> Conversation:
    """Of an input that becomes a vector; its own `instruction` goes before that of all. InputError naming the place."""
    own = given.get("instruction") if isinstance(given, Mapping) else None
    said = _instruction(own, f"{where}.instruction") or _instruction(instruction, "instruction")
    return [_system(_sentence(said) or EMBED_INSTRUCTION), _user(where, parts_of(given, where, "instruction"))]


def with_instruction(messages: list[Any], instruction: object) -> Conversation:
    """A conversation that becomes a vector: with a system turn, if it has none."""
    said = _sentence(_instruction(instruction, "instruction")) or EMBED_INSTRUCTION
    roles = [turn.get("role") for turn in messages if isinstance(turn, dict)]
    if "system" in roles or "developer" in roles:
        return messages
    placed = [Placed(f"messages[{n}]", one) if isinstance(one, dict) else one for n, one in enumerate(messages)]
    return [_system(said), *placed]


def pair_messages(query: Sequence[Any], document: Sequence[Any], instruction: object, where: str) -> Conversation:
    """Of the parts of a query and of a document, that stood at `where`, which are scored."""
    said = _instruction(instruction, "instruction") or RERANK_INSTRUCTION
    parts = [f"<Instruct>: {said}", "<Query>:", *query, "\n<Document>:", *document]
    return [_system(_JUDGE), _user(where, parts)]


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def _user(where: str, parts: Sequence[Any]) -> dict[str, Any]:
    return Placed(where, {"role": "user", "content": list(parts)})


def _instruction(given: object, where: str) -> str:
    if given is None:
        return ""
    if not isinstance(given, str) or len(given) > MAX_INSTRUCTION_CHARS:
        raise InputError(f"{where} must be a text of up to {MAX_INSTRUCTION_CHARS} characters", param=where)
    return given


def _sentence(text: str) -> str:
    """Ends with a mark, as those of training did."""
    text = text.strip()
    return f"{text}." if text and not unicodedata.category(text[-1]).startswith("P") else text


def parts_of(given: object, where: str, *more: str) -> list[Any]:
    """The parts of an input: clips, then images, then texts, or as `content` has them. What is Placed is a part itself.
    InputError naming the place."""
    if isinstance(given, str | Placed):
        return [_part(given, where)]
    if not isinstance(given, Mapping):
        reason = f"{where} must be a text, or an object with text, image, video or content"
        raise InputError(reason, param=where)
    said = {name: value for name, value in given.items() if value is not None and name not in more}
    names = ("content",) if "content" in said else _OWN
    for name in said:
        if name not in names:
            reason = f"{where} takes text, image and video, or content alone"
            raise InputError(reason, param=f"{where}.{str(name)[:64]}")
    if "content" in said:
        found = [said["content"]] if isinstance(said["content"], str) else said["content"]
        if not isinstance(found, list):
            raise InputError("content must be a string or a list of parts", param=f"{where}.content")
        _check_num_parts(len(found), f"{where}.content")
        return [_part(one, f"{where}.content[{j}]") for j, one in enumerate(found)] or [NOTHING]
    parts = []
    if "video" in said:
        options = {name: said[name] for name in _SAMPLING if name in said}
        parts.append(Placed(f"{where}.video", {"type": "video", "video": said["video"], **options}))
    for name in ("image", "text"):
        several = said[name] if isinstance(said.get(name), list) else [said[name]] if name in said else []
        place = f"{where}.{name}"
        _check_num_parts(len(several), place)
        if name == "image":
            parts += [Placed(place, {"type": name, name: one}) for one in several]
        elif all(isinstance(one, str) for one in several):
            parts += [_part(one, place) for one in several]
        else:
            raise InputError("text must be a string, or a list of them", param=place)
    return parts or [NOTHING]


def _part(given: object, where: str) -> Any:
    if isinstance(given, str):
        return check_text(given, where)
    if not isinstance(given, dict):
        raise InputError("a part must be a text or an object", param=where)
    return given if isinstance(given, Placed) else Placed(where, given)


def _check_num_parts(count: int, where: str) -> None:
    if count > MAX_PARTS:
        raise InputError(f"{where} has {count} parts, an input may have {MAX_PARTS}", param=where)
