"""From the tensors of a checkpoint to the parameters of the modules: names, shapes, expert layouts.

Expert weights come in three layouts, told apart by name and then by shape:

    hub         experts.gate_up_proj [E, D, 2F], experts.down_proj [E, F, D]     the published files
    v5          experts.gate_up_proj [E, 2F, D], experts.down_proj [E, D, F]     what transformers 5 saves
    per_expert  experts.{e}.gate_proj.weight [F, D], .up_proj [F, D], .down_proj [D, F]

The modules use v5's. Dims: E experts, D hidden, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from qwen3vl_disagg.checkpoint.folder import Checkpoint
from qwen3vl_disagg.checkpoint.headers import TensorInfo

ExpertLayout = Literal["hub", "v5", "per_expert"]
Shape = tuple[int, ...]

_FLOATS = ("F64", "F32", "F16", "BF16")
_FUSED = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<which>gate_up_proj|down_proj)")
_PER_EXPERT = re.compile(r".*\.mlp\.experts\.\d+\..*")


def checkpoint_name(parameter: str) -> str:
    """The published name of a module's parameter.

    >>> checkpoint_name("visual.merger.norm.bias"), checkpoint_name("model.norm.weight")
    ('model.visual.merger.norm.bias', 'model.language_model.norm.weight')
    """
    name = parameter.removeprefix("language_model.")
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in the files, and the index in the wanted rows where they go."""

    source: str
    rows: range
    place: tuple[int | slice, ...]
    is_transposed: bool = False
    """Whether the last two dims change places."""


@dataclass
class Recipe:
    """How one parameter is filled: the tensors it is made of, or what is wrong with them.

    `pieces` says for a range of the parameter's rows (dim 0) what to read for them, and for no rows nothing.
    """

    sources: list[str]
    pieces: Callable[[range], list[Piece]]
    problems: list[str] = field(default_factory=list)

    def fill(self, checkpoint: Checkpoint, rows: range, out: Tensor) -> None:
        """Read the parameter's `rows` into `out`, which has just these."""
        for piece in self.pieces(rows):
            weight, place = checkpoint.read(piece.source, piece.rows), out[piece.place]
            if not piece.is_transposed:
                place.copy_(weight)
                continue
            for matrix, transposed in zip(place, weight, strict=True):  # two dims are transposed in blocks, three not
                matrix.copy_(transposed.T)

    def num_bytes(self, tensors: Mapping[str, TensorInfo], rows: range) -> int:
        """What `fill` reads."""
        return sum(tensors[piece.source].rows_bytes(piece.rows) for piece in self.pieces(rows))


def plan(
    tensors: Mapping[str, TensorInfo], wanted: Mapping[str, Shape], expert_layout: ExpertLayout | None
) -> dict[str, Recipe]:
    """A recipe for each wanted published name (in v5's expert layout) and its shape."""
    has_per_expert = {name.rsplit(".", 3)[0] for name in tensors if _PER_EXPERT.fullmatch(name)}
    recipes = {}
    for name, shape in wanted.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            recipes[name] = _whole(tensors, name, shape)
        elif match["experts"] in has_per_expert:
            recipes[name] = _per_expert(tensors, match["experts"], match["which"], shape, expert_layout)
            if name in tensors:
                recipes[name].problems.append(_at(tensors, name, "there both fused and one tensor for each expert"))
                recipes[name].sources.append(name)
        else:
            recipes[name] = _fused(tensors, name, match["which"], shape, expert_layout)
    return recipes


def quantized_tensor(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The name of a tensor that shows the weights to be quantized, if there is one."""
    for name, info in tensors.items():
        if info.dtype.startswith("F8_") or name.endswith(("_scale_inv", ".weight_scale")):
            return name
    return None


def _whole(tensors: Mapping[str, TensorInfo], name: str, shape: Shape, *, stored: Shape | None = None) -> Recipe:
    """A parameter that is one tensor; `stored` is that one's shape where its last two dims are the other way round."""

    def pieces(rows: range) -> list[Piece]:
        return [Piece(name, rows, (slice(None),), is_transposed=stored is not None)] if rows else []

    return Recipe([name], pieces, _problems(tensors, {name: stored or shape}))


def _fused(
    tensors: Mapping[str, TensorInfo], name: str, which: str, shape: Shape, layout: ExpertLayout | None
) -> Recipe:
    transposed = (shape[0], shape[2], shape[1])
    recipe = _whole(tensors, name, shape)
    if name not in tensors:
        return recipe
    if layout == "per_expert":
        reason = "fused, although expert_layout='per_expert' was asked for"
        return Recipe([name], recipe.pieces, [_at(tensors, name, reason)])
    if layout is None and shape == transposed == tensors[name].shape:
        dims = ("2F, D", "D, 2F") if which == "gate_up_proj" else ("D, F", "F, D")
        reason = f"{list(shape)} is ambiguous: [E, {dims[0]}] (v5) or [E, {dims[1]}] (hub)? name it in expert_layout"
        return Recipe([name], recipe.pieces, [_at(tensors, name, reason)])
    if layout == "v5" or (layout is None and tensors[name].shape != transposed):
        return recipe
    return _whole(tensors, name, shape, stored=transposed)


def _per_expert(
    tensors: Mapping[str, TensorInfo], experts: str, which: str, shape: Shape, layout: ExpertLayout | None
) -> Recipe:
    num_experts, rows, columns = shape
    parts = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
    part_rows = rows // len(parts)
    names = [[f"{experts}.{expert}.{part}.weight" for part in parts] for expert in range(num_experts)]
    problems = _problems(tensors, {name: (part_rows, columns) for each in names for name in each})
    if layout not in (None, "per_expert"):
        problems.append(f"{experts}: one tensor for each expert, although expert_layout={layout!r} was asked for")

    def pieces(experts: range) -> list[Piece]:
        return [
            Piece(name, range(part_rows), (expert - experts.start, slice(part * part_rows, (part + 1) * part_rows)))
            for expert in experts
            for part, name in enumerate(names[expert])
        ]

    return Recipe([name for each in names for name in each], pieces, problems)


def _problems(tensors: Mapping[str, TensorInfo], wanted: Mapping[str, Shape]) -> list[str]:
    """What is wrong with tensors that must be there with these shapes and hold floats."""
    problems = []
    for name, shape in wanted.items():
        info = tensors.get(name)
        if info is None:
            problems.append(f"{name}: missing, expected {list(shape)}")
        elif info.shape != shape:
            problems.append(_at(tensors, name, f"shape {list(info.shape)}, expected {list(shape)}"))
        elif info.dtype not in _FLOATS:
            problems.append(_at(tensors, name, f"dtype {info.dtype}, expected one of {', '.join(_FLOATS)}"))
    return problems


def _at(tensors: Mapping[str, TensorInfo], name: str, reason: str) -> str:
    return f"{tensors[name].file}: {name}: {reason}"
