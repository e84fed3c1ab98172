"""From any checkpoint that can be loaded to a folder in a published layout: `qwen3vl-disagg convert`.

Tensors are read, changed and written a file at a time, experts one by one, so that a model larger than memory can be
converted. The folder appears under its name when it is complete and its headers have been checked.
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.checkpoint.folder import (
    CONFIG_FILE,
    Checkpoint,
    file_problem,
    open_checkpoint,
    read_raw_config,
)
from qwen3vl_disagg.checkpoint.fp8 import DEFAULT_BLOCK, SCALE_SUFFIX, num_scales, quantize_matrix
from qwen3vl_disagg.checkpoint.layouts import HEAD, ExpertLayout, Recipe, Shape
from qwen3vl_disagg.checkpoint.load import whole_model
from qwen3vl_disagg.checkpoint.write import in_layout, respelled, write_json, write_weights
from qwen3vl_disagg.core.devices import DTYPES, resolve_dtype
from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.options import ConvertOptions, Written

EMBEDDING = "model.language_model.embed_tokens.weight"
_QUANTIZED = re.compile(
    r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj\.weight|mlp\.(gate|up|down)_proj\.weight|mlp\.experts\.(gate_up|down)_proj)"
)
_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_ROWS = 4096


def run_convert(options: ConvertOptions) -> int:
    """Run the command; returns the exit status."""
    folder = resolve_model_folder(options.model)
    num_bytes, num_files = convert(
        folder,
        options.out,
        layout=options.layout,
        dtype=DTYPES.get(options.dtype),
        quantize=options.quantize,
        max_shard_bytes=options.max_shard_bytes,
        progress=sys.stderr.isatty(),
    )
    print(f"{options.out}: {num_bytes:,} bytes of weights in {num_files} file{'s' if num_files > 1 else ''}")
    return 0


def convert(
    folder: Path | str,
    out: Path | str,
    *,
    layout: ExpertLayout = "hub",
    dtype: torch.dtype | None = None,
    quantize: Written = "none",
    max_shard_bytes: int = 5_000_000_000,
    expert_layout: ExpertLayout | None = None,
    progress: bool = False,
) -> tuple[int, int]:
    """Write `folder` again as `out`; returns the bytes of its tensors and the number of files that hold them.

    Args:
        layout, dtype, quantize, max_shard_bytes: as on the command line; a dtype of None is the checkpoint's own.
        expert_layout: how `folder` stores its experts; needed only where their shapes fit two layouts.
        progress: a bar on stderr, over the bytes to read.

    Raises CheckpointError for a folder that cannot be read, InputError for what cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if max_shard_bytes < 1:
        raise InputError(f"--max-shard-bytes {max_shard_bytes}: must be positive", param="max-shard-bytes")
    with open_checkpoint(folder) as checkpoint:
        copied = _small_files(folder)
        whole = whole_model(checkpoint, expert_layout)
        if HEAD in whole and _is_tied_copy(checkpoint):
            del whole[HEAD]
        _check_layout(whole, layout)
        source = _Source(checkpoint, layout, dtype or resolve_dtype("auto", checkpoint.config.dtype), quantize)
        files = _files(list(source.parts(whole)), max_shard_bytes)
        num_bytes = sum(part.num_bytes for parts in files for part in parts)
        with _new_folder(out, num_bytes) as new:
            write_json(new / CONFIG_FILE, _config(read_raw_config(folder), source, whole))
            for path in copied:
                with _reading(folder):
                    data = path.read_bytes()
                (new / path.name).write_bytes(data)
            total = sum(recipe.num_bytes(checkpoint.tensors, range(shape[0])) for shape, recipe in whole.values())
            with tqdm(total=total, desc="converting", unit="B", unit_scale=True, disable=not progress) as bar:
                write_weights(new, [functools.partial(source.make, parts, bar) for parts in files])
            with open_checkpoint(new) as written:
                whole_model(written)
                _check_config(folder, checkpoint.config, written.config)
    return num_bytes, len(files)


@dataclass(frozen=True)
class _Part:
    """What is read and written together: a parameter (published name, experts as in the modules), or one expert's."""

    name: str
    shape: Shape
    recipe: Recipe
    rows: range
    is_quantized: bool
    num_bytes: int


@dataclass(frozen=True)
class _Source:
    """An open checkpoint, and what is to become of its tensors."""

    checkpoint: Checkpoint
    layout: ExpertLayout
    dtype: torch.dtype
    quantize: Written

    def parts(self, whole: Mapping[str, tuple[Shape, Recipe]]) -> Iterator[_Part]:
        for name, (shape, recipe) in whole.items():
            is_quantized = self.quantize == "fp8" and _QUANTIZED.fullmatch(name) is not None
            is_split = self.layout == "per_expert" and len(shape) == 3
            for rows in [range(i, i + 1) for i in range(shape[0])] if is_split else [range(shape[0])]:
                num_bytes = self.num_bytes(name, (len(rows), *shape[1:]), is_quantized)
                yield _Part(name, shape, recipe, rows, is_quantized, num_bytes)

    def num_bytes(self, name: str, shape: Shape, is_quantized: bool) -> int:
        """What will be stored for a tensor."""
        stored = in_layout(name, torch.empty(shape, device="meta"), self.layout)
        if not is_quantized:
            return sum(tensor.numel() * self.dtype.itemsize for tensor in stored.values())
        scales = sum(num_scales(tuple(tensor.shape), DEFAULT_BLOCK) for tensor in stored.values())
        return sum(tensor.numel() for tensor in stored.values()) + scales * torch.bfloat16.itemsize

    def make(self, parts: list[_Part], bar: tqdm) -> dict[str, Tensor]:
        """The tensors of a file."""
        made: dict[str, Tensor] = {}
        for part in parts:
            before = self.checkpoint.bytes_read
            made |= self.experts(part) if len(part.shape) == 3 else self.read(part, part.rows)
            bar.update(self.checkpoint.bytes_read - before)
        return made

    def experts(self, part: _Part) -> dict[str, Tensor]:
        """Read one by one, so that what is made on the way is small."""
        made: dict[str, Tensor] = {}
        for i, expert in enumerate(part.rows):
            for name, tensor in self.read(part, range(expert, expert + 1)).items():
                if self.layout == "per_expert":
                    made[name] = tensor
                    continue
                if i == 0:
                    made[name] = tensor.new_empty(len(part.rows), *tensor.shape[1:])
                made[name][i] = tensor[0]
        return made

    def read(self, part: _Part, rows: range) -> dict[str, Tensor]:
        """What is stored for some rows of a parameter."""
        weight = torch.empty(len(rows), *part.shape[1:], dtype=torch.float32 if part.is_quantized else self.dtype)
        with _reading(self.checkpoint.folder):
            part.recipe.fill(self.checkpoint, rows, weight)
        stored = in_layout(part.name, weight, self.layout, rows.start)
        if not part.is_quantized:
            return stored
        made: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            try:
                values, scale = quantize_matrix(tensor if tensor.dim() == 2 else tensor[0], DEFAULT_BLOCK)
            except ValueError as error:
                sources = [source for source in part.recipe.sources if not source.endswith(SCALE_SUFFIX)]
                file = self.checkpoint.tensors[sources[0]].file
                raise CheckpointError(self.checkpoint.folder, [f"{file}: {name}: {error}"]) from error
            lead = tensor.shape[:-2]
            made |= {name: values.view(*lead, *values.shape), name + SCALE_SUFFIX: scale.view(*lead, *scale.shape)}
        return made


def _files(parts: list[_Part], max_bytes: int) -> list[list[_Part]]:
    """Which parts go into which file, in order."""
    files: list[list[_Part]] = []
    room = 0
    for part in parts:
        if not files or part.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(part)
        room -= part.num_bytes
    return files


def _is_tied_copy(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding once more, in a checkpoint that ties them anyway."""
    head, embedding = checkpoint.tensors[HEAD], checkpoint.tensors[EMBEDDING]
    scaled = {HEAD + SCALE_SUFFIX, EMBEDDING + SCALE_SUFFIX} & checkpoint.tensors.keys()
    if (
        not checkpoint.config.tie_word_embeddings
        or scaled
        or (head.dtype, head.shape) != (embedding.dtype, embedding.shape)
    ):
        return False
    blocks = (range(i, min(i + _ROWS, head.shape[0])) for i in range(0, head.shape[0], _ROWS))
    with _reading(checkpoint.folder):
        return all(torch.equal(checkpoint.read(HEAD, rows), checkpoint.read(EMBEDDING, rows)) for rows in blocks)


def _check_layout(whole: Mapping[str, tuple[Shape, Recipe]], layout: ExpertLayout) -> None:
    """InputError for what could not be read back."""
    for name, (shape, _) in whole.items():
        if layout != "per_expert" and len(shape) == 3 and shape[1] == shape[2]:
            reason = f"{name} of {list(shape)} would look the same in the layouts hub and v5"
            raise InputError(f"--layout {layout}: {reason}: take per_expert", param="layout")


def _small_files(folder: Path) -> list[Path]:
    """What is copied as it is: tokenizer, templates, processors, sampling defaults. CheckpointError for links out."""
    names = sorted(
        path.name
        for path in folder.iterdir()
        if (path.suffix in _COPIED_SUFFIXES or path.name in _COPIED_NAMES)
        and path.name != CONFIG_FILE
        and not path.name.endswith(".index.json")
    )
    problems = [problem for name in names if (problem := file_problem(folder, name))]
    if problems:
        raise CheckpointError(folder, problems)
    return [folder / name for name in names]


def _config(raw: dict[str, Any], source: _Source, whole: Mapping[str, tuple[Shape, Recipe]]) -> dict[str, Any]:
    """The parsed config.json to write: the one read, with what the conversion changes."""
    raw = respelled(raw, "v5" if source.layout == "v5" else "hub")
    dtype = next(name for name, value in DTYPES.items() if value == source.dtype)
    for place in (raw, raw["text_config"], raw["vision_config"]):
        for key in ("quantization_config", "compression_config"):
            place.pop(key, None)
        place |= {key: dtype for key in ("dtype", "torch_dtype") if key in place}
    if "torch_dtype" not in raw:
        raw["dtype"] = dtype
    if source.quantize == "fp8":
        kept = [name.removesuffix(".weight") for name in whole if name.endswith(".mlp.gate.weight")]
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(DEFAULT_BLOCK),
            "modules_to_not_convert": ["lm_head", "model.visual", EMBEDDING.removesuffix(".weight"), *kept],
        }
    return raw


def _check_config(folder: Path, read: ModelConfig, written: ModelConfig) -> None:
    """CheckpointError unless the new config says what the old one does, but for the dtype."""
    expected = replace(read, dtype=written.dtype)
    if written != expected:
        raise CheckpointError(folder, [f"{CONFIG_FILE}: would be another model as written: {written}, not {expected}"])


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """What goes wrong with the folder that is read is not the new one's fault."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        name = Path(error.filename).name if isinstance(error, OSError) and error.filename else "weights"
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(folder, [f"{name}: cannot be read: {reason}"]) from error


@contextmanager
def _new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, and is gone after an error. InputError if it cannot be."""
    try:
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise InputError(f"--out {out}: is there already and is no empty folder", param="out")
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < num_bytes:
            raise InputError(f"--out {out}: needs {num_bytes:,} bytes, {free:,} are free", param="out")
        new = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            yield new
            new.chmod(0o755)
            new.rename(out)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--out {out}: {reason}", param="out") from error
