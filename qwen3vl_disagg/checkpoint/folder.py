"""A checkpoint folder: its config, which file holds each tensor, and reading rows of single tensors.

Everything is checked on opening, from headers alone, and all problems are reported together.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from qwen3vl_disagg.checkpoint.fp8 import DEFAULT_BLOCK, Block, read_block
from qwen3vl_disagg.checkpoint.headers import TensorInfo, read_header
from qwen3vl_disagg.core.devices import STORED_DTYPES
from qwen3vl_disagg.core.errors import CheckpointError, attempt
from qwen3vl_disagg.core.json_text import parse_json
from qwen3vl_disagg.model.config import ConfigError, ModelConfig

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_JSON_BYTES = 32_000_000
_MAX_PROBLEMS = 100
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_config(folder: Path | str) -> ModelConfig:
    """The model's config. CheckpointError lists every absent or impossible entry."""
    return _read_config(Path(folder))[0]


def read_raw_config(folder: Path | str) -> dict[str, Any]:
    """The parsed `config.json` as it is. CheckpointError if there is no JSON object."""
    raw, problems = _read_json_object(Path(folder), CONFIG_FILE)
    if problems:
        raise CheckpointError(folder, problems)
    return raw


def _read_config(folder: Path) -> tuple[ModelConfig, Block]:
    raw = read_raw_config(folder)
    block, problems = read_block(raw)
    config = None
    try:
        config = ModelConfig.from_dict(raw)
    except ConfigError as error:
        problems = error.problems + problems
    if config is not None and config.dtype not in STORED_DTYPES:
        problems.append(f"dtype {config.dtype!r} is not one of {', '.join(STORED_DTYPES)}")
    if problems or config is None:
        raise CheckpointError(folder, [f"{CONFIG_FILE}: {problem}" for problem in problems])
    return config, block


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Check config and all headers, without reading any weights. CheckpointError lists everything wrong."""
    folder = Path(folder)
    problems: list[str] = []
    read = attempt(problems, lambda: _read_config(folder))
    files, file_problems = _weight_files(folder)
    problems += file_problems
    tensors: dict[str, TensorInfo] = {}
    for name, indexed in files.items():
        held, header_problems = read_header(folder / name, name)
        problems += header_problems
        if indexed is not None and not header_problems:
            problems += [
                f"{name}: {tensor}: in {INDEX_FILE}, not in the file" for tensor in sorted(indexed - held.keys())
            ]
            problems += [
                f"{name}: {tensor}: in the file, not in {INDEX_FILE}" for tensor in sorted(held.keys() - indexed)
            ]
        tensors |= held
    if problems or read is None:
        raise CheckpointError(folder, first_of(problems))
    return Checkpoint(folder, read[0], tensors, read[1])


def first_of(problems: list[str]) -> list[str]:
    """Each problem once, as many as anybody reads, and how many more there are."""
    problems = list(dict.fromkeys(problems))
    num_more = len(problems) - _MAX_PROBLEMS
    return problems if num_more <= 0 else [*problems[:_MAX_PROBLEMS], f"and {num_more:,} more"]


class Checkpoint:
    """Opened files of one folder, as a context manager. `tensors` says what there is, by name; `block` is that of
    float8 weights' scales."""

    def __init__(
        self, folder: Path, config: ModelConfig, tensors: dict[str, TensorInfo], block: Block = DEFAULT_BLOCK
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.block = block
        self.bytes_read = 0
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files. Tensors that were read share their memory: copy them first."""
        self._files.clear()
        self._stack.close()

    def read(self, name: str, rows: range) -> Tensor:
        """Rows of dim 0 of a tensor as stored, a view of the mapped file: nothing else of it is touched."""
        self.bytes_read += self.tensors[name].rows_bytes(rows)
        return self._file(name).get_slice(name)[rows.start : rows.stop]

    def _file(self, name: str) -> Any:
        label = self.tensors[name].file
        if label not in self._files:
            self._files[label] = self._stack.enter_context(safe_open(self.folder / label, framework="pt"))
        return self._files[label]


def _weight_files(folder: Path) -> tuple[dict[str, set[str] | None], list[str]]:
    """File name -> the tensors that the index says it holds (None without an index), and what is wrong."""
    single, index = (folder / SINGLE_FILE).exists(), (folder / INDEX_FILE).exists()
    if single and index:
        return {}, [f"both {SINGLE_FILE} and {INDEX_FILE} are there: remove the one that is out of date"]
    if single:
        problem = file_problem(folder, SINGLE_FILE)
        return ({}, [problem]) if problem else ({SINGLE_FILE: None}, [])
    if index:
        return _indexed_files(folder)
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return {}, [f"{name}: pickled weights are refused, convert them to safetensors" for name in pickles]
    return {}, [f"neither {SINGLE_FILE} nor {INDEX_FILE} is there"]


def _indexed_files(folder: Path) -> tuple[dict[str, set[str] | None], list[str]]:
    raw, problems = _read_json_object(folder, INDEX_FILE)
    if problems:
        return {}, problems
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [f"{INDEX_FILE}: weight_map is missing or empty"]
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            problems.append(f"{INDEX_FILE}: {tensor}: file name {name!r} is not a string")
        else:
            files.setdefault(name, set()).add(tensor)
    good: dict[str, set[str] | None] = {}
    for name, tensors in sorted(files.items()):
        problem = file_problem(folder, name)
        if problem is None and not name.endswith(".safetensors"):
            problem = f"{name}: not a safetensors file"
        if problem:
            problems.append(f"{INDEX_FILE}: {problem}")
        else:
            good[name] = tensors
    return good, problems


def file_problem(folder: Path, name: str) -> str | None:
    """Why `name` may not be read: not inside the folder, not there, or not a regular file."""
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{name!r}: the path leaves the folder"
    try:
        real = (folder / name).resolve()
        is_inside = any(real.is_relative_to(root) for root in _roots(folder))
        exists, is_file = real.exists(), real.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long or in no encoding
        shown = name.encode("ascii", "backslashreplace").decode()[:80]
        return f"{shown}: cannot be resolved: {type(error).__name__}"
    if not is_inside:
        return f"{name}: a link that leaves the folder"
    if not exists:
        return f"{name}: missing"
    if not is_file:
        return f"{name}: not a regular file"
    if not os.access(real, os.R_OK):
        return f"{name}: may not be read"
    return None


def _roots(folder: Path) -> list[Path]:
    """The folder; of a snapshot in a hub cache also where its links lead: its repository's `blobs`, and the `blobs` of
    the whole cache (`models--ORG--NAME/snapshots/<revision>`), which those of a repository may be links into."""
    real = folder.resolve()
    repository = real.parent.parent
    if real.parent.name != "snapshots":
        return [real]
    shared = [repository.parent / "blobs"] if repository.name.startswith("models--") else []
    return [real, repository / "blobs", *shared]


def _read_json_object(folder: Path, name: str) -> tuple[dict[str, Any], list[str]]:
    problem = file_problem(folder, name)
    if problem:
        return {}, [problem]
    path = folder / name
    if path.stat().st_size > MAX_JSON_BYTES:
        return {}, [f"{name}: larger than {MAX_JSON_BYTES} bytes"]
    try:
        raw = parse_json(path.read_bytes())
    except ValueError as error:
        return {}, [f"{name}: not JSON: {error}"]
    if not isinstance(raw, dict):
        return {}, [f"{name}: not a JSON object"]
    return raw, []
