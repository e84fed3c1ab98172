"""From the tensors of a checkpoint to the parameters of the modules: names, shapes, expert layouts.

Expert weights come in three layouts, told apart by name and then by shape:

    hub         experts.gate_up_proj [E, D, 2F], experts.down_proj [E, F, D]     the published files
    v5          experts.gate_up_proj [E, 2F, D], experts.down_proj [E, D, F]     what transformers 5 saves
    per_expert  experts.{e}.gate_proj.weight [F, D], .up_proj [F, D], .down_proj [D, F]

The modules use v5's. Dims: E experts, D hidden, F expert width.

Any matrix, and any expert tensor in each of the layouts, may be float8 with scales beside it (`fp8.py`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from qwen3vl_disagg.checkpoint.folder import Checkpoint
from qwen3vl_disagg.checkpoint.fp8 import (
    FLOAT8,
    SCALE_DTYPES,
    SCALE_SUFFIX,
    Block,
    dequantize,
    dequantize_into,
    scale_rows,
    scale_shape,
)
from qwen3vl_disagg.checkpoint.headers import TensorInfo
from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.core.settings import ExpertLayout
from qwen3vl_disagg.core.tensors import all_finite

HEAD = "lm_head.weight"
Shape = tuple[int, ...]

_FLOATS = ("F64", "F32", "F16", "BF16")
_FUSED = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<which>gate_up_proj|down_proj)")
_PER_EXPERT = re.compile(r"(?P<experts>.*\.mlp\.experts)\.\d+\.[^.]+\.[^.]+")


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
class Scales:
    """The scales of a piece in float8: rows of their tensor, and the block that shares one, as the files hold it."""

    source: str
    rows: range
    block: Block


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in the files, and the index in the wanted rows where they go."""

    source: str
    rows: range
    place: tuple[int | slice, ...]
    is_transposed: bool = False
    """Whether the last two dims change places."""
    scales: Scales | None = None

    def put(self, weight: Tensor, scale: Tensor | None, place: Tensor) -> None:
        """What was read of it -> `place`."""
        if self.scales is None and not self.is_transposed:
            place.copy_(weight)
            return
        # Two dims are transposed in blocks, three not; and experts one by one keep what is made on the way small.
        matrices = [(place, weight, scale)] if weight.dim() == 2 else zip(place, weight, _each(scale), strict=False)
        for matrix, stored, scales in matrices:
            if self.scales is None or scales is None:
                matrix.copy_(stored.T)
            elif self.is_transposed:
                matrix.copy_(dequantize(stored, scales, self.scales.block, matrix.dtype, matrix.device).T)
            else:
                first = self.rows.start % self.scales.block[0] if weight.dim() == 2 else 0
                dequantize_into(stored, scales, self.scales.block, matrix, first)


def _each(scale: Tensor | None) -> Iterable[Tensor | None]:
    return itertools.repeat(None) if scale is None else scale


@dataclass
class Recipe:
    """How one parameter is filled: the tensors it is made of, or what is wrong with them.

    `pieces` says for a range of the parameter's rows (dim 0) what to read for them, and for no rows nothing.
    `step`: that many rows, counted from the first, share scales. Read them together, or scales are read twice.
    """

    sources: list[str]
    pieces: Callable[[range], list[Piece]]
    problems: list[str] = field(default_factory=list)
    step: int = 1

    def fill(self, checkpoint: Checkpoint, rows: range, out: Tensor) -> None:
        """Read the parameter's `rows` into `out`, which has just these. CheckpointError for numbers that are not finite
        there, naming the tensor that brings them."""
        for piece in self.pieces(rows):
            weight = checkpoint.read(piece.source, piece.rows)
            scale = None if piece.scales is None else checkpoint.read(piece.scales.source, piece.scales.rows)
            place = out[piece.place]
            piece.put(weight, scale, place)
            if not all_finite(place):
                raise CheckpointError(checkpoint.folder, [_not_finite(checkpoint, piece, weight, scale, place)])

    def num_bytes(self, tensors: Mapping[str, TensorInfo], rows: range) -> int:
        """What `fill` reads."""
        pieces = self.pieces(rows)
        parts: list[Piece | Scales] = [*pieces, *(piece.scales for piece in pieces if piece.scales is not None)]
        return sum(tensors[part.source].rows_bytes(part.rows) for part in parts)


def _not_finite(checkpoint: Checkpoint, piece: Piece, weight: Tensor, scale: Tensor | None, made: Tensor) -> str:
    """Why what was made of a piece is not finite."""
    source = piece.source
    if piece.scales is not None and scale is not None and not scale.float().isfinite().all():
        source = piece.scales.source
    elif weight.float().isfinite().all():
        dtype = str(made.dtype).removeprefix("torch.")
        return f"{checkpoint.tensors[source].file}: {source}: numbers too large for {dtype}"
    return f"{checkpoint.tensors[source].file}: {source}: numbers that are not finite"


def plan(
    tensors: Mapping[str, TensorInfo],
    wanted: Mapping[str, Shape],
    expert_layout: ExpertLayout | None,
    block: Block,
) -> dict[str, Recipe]:
    """A recipe for each wanted published name (in v5's expert layout) and its shape.

    `block` is that of a linear layer's `[out, in]`.
    """
    files = _Files(tensors, block)
    held: dict[str, list[str]] = {}  # of each layer with one tensor for each expert, their names
    for name in tensors:
        if match := _PER_EXPERT.fullmatch(name):
            held.setdefault(match["experts"], []).append(name)
    recipes = {}
    for name, shape in wanted.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            recipes[name] = files.whole(name, shape)
        elif match["experts"] in held:
            experts = match["experts"]
            recipes[name] = files.per_expert(experts, match["which"], shape, expert_layout, held[experts])
            if name in tensors:
                recipes[name].problems.append(_at(tensors, name, "there both fused and one tensor for each expert"))
                recipes[name].sources += files.with_scales([name])
        else:
            recipes[name] = files.fused(name, match["which"], shape, expert_layout)
    return recipes


@dataclass(frozen=True)
class _Files:
    """What the files hold, and how parameters are made of it."""

    tensors: Mapping[str, TensorInfo]
    block: Block

    def whole(self, name: str, shape: Shape, *, stored: Shape | None = None) -> Recipe:
        """A parameter that is one tensor; `stored` is that one's shape where its last two dims are the other way
        round."""
        block = self.block if stored is None else (self.block[1], self.block[0])
        is_matrix_in_blocks = len(shape) == 2 and self.has_scale(name)

        def pieces(rows: range) -> list[Piece]:
            return [self.piece(name, rows, (slice(None),), block, is_transposed=stored is not None)] if rows else []

        problems = self.problems({name: stored or shape}, block)
        return Recipe(self.with_scales([name]), pieces, problems, block[0] if is_matrix_in_blocks else 1)

    def fused(self, name: str, which: str, shape: Shape, layout: ExpertLayout | None) -> Recipe:
        transposed = (shape[0], shape[2], shape[1])
        recipe = self.whole(name, shape)
        if name not in self.tensors:
            return recipe
        is_stored_so = self.tensors[name].shape == transposed
        if layout == "per_expert":
            reason = "fused, although expert_layout='per_expert' was asked for"
            return replace(recipe, problems=[_at(self.tensors, name, reason)])
        if layout is None and shape == transposed and is_stored_so:
            dims = ("2F, D", "D, 2F") if which == "gate_up_proj" else ("D, F", "F, D")
            reason = (
                f"{list(shape)} is ambiguous: [E, {dims[0]}] (v5) or [E, {dims[1]}] (hub)? name it in expert_layout"
            )
            return replace(recipe, problems=[_at(self.tensors, name, reason)])
        if layout == "v5" or (layout is None and not is_stored_so):
            return recipe
        return self.whole(name, shape, stored=transposed)

    def per_expert(
        self, experts: str, which: str, shape: Shape, layout: ExpertLayout | None, held: list[str]
    ) -> Recipe:
        """`held`: the tensors of this layer's experts."""
        num_experts, rows, columns = shape
        if num_experts > len(held):  # so that a wrong config does not make many more names than there are tensors
            reason = f"the files hold {len(held)} tensors, expected one or more for each of {num_experts} experts"
            return Recipe(list(held), lambda _: [], [f"{experts}: {reason}"])
        parts = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
        part_rows = rows // len(parts)
        names = [[f"{experts}.{expert}.{part}.weight" for part in parts] for expert in range(num_experts)]
        problems = self.problems({name: (part_rows, columns) for each in names for name in each}, self.block)
        if layout not in (None, "per_expert"):
            problems.append(f"{experts}: one tensor for each expert, although expert_layout={layout!r} was asked for")

        def pieces(experts: range) -> list[Piece]:
            return [
                self.piece(name, range(part_rows), (expert - experts.start, _rows_of(part, part_rows)), self.block)
                for expert in experts
                for part, name in enumerate(names[expert])
            ]

        return Recipe(self.with_scales([name for each in names for name in each]), pieces, problems)

    def piece(
        self, name: str, rows: range, place: tuple[int | slice, ...], block: Block, *, is_transposed: bool = False
    ) -> Piece:
        scales = None
        if self.has_scale(name):
            num_dims = len(self.tensors[name].shape)
            scales = Scales(name + SCALE_SUFFIX, scale_rows(rows, num_dims, block), block)
        return Piece(name, rows, place, is_transposed, scales)

    def has_scale(self, name: str) -> bool:
        return name in self.tensors and name + SCALE_SUFFIX in self.tensors

    def with_scales(self, names: list[str]) -> list[str]:
        return names + [name + SCALE_SUFFIX for name in names if self.has_scale(name)]

    def problems(self, wanted: Mapping[str, Shape], block: Block) -> list[str]:
        """What is wrong with tensors that must be there with these shapes, and with their scales."""
        problems = []
        for name, shape in wanted.items():
            info = self.tensors.get(name)
            if info is None:
                problems.append(f"{name}: missing, expected {list(shape)}")
            elif info.shape != shape:
                problems.append(_at(self.tensors, name, f"shape {list(info.shape)}, expected {list(shape)}"))
            elif info.dtype not in (*_FLOATS, FLOAT8):
                reason = f"dtype {info.dtype}, expected one of {', '.join(_FLOATS)}"
                problems.append(_at(self.tensors, name, reason))
            elif self.has_scale(name):
                problems += self.scale_problems(name, info, block)
            elif info.dtype == FLOAT8:
                problems.append(_at(self.tensors, name, f"dtype {FLOAT8}, but there is no {name}{SCALE_SUFFIX}"))
        return problems

    def scale_problems(self, name: str, info: TensorInfo, block: Block) -> list[str]:
        """What is wrong with the scales of a tensor that itself is as it should be."""
        if info.dtype != FLOAT8:
            return [_at(self.tensors, name, f"dtype {info.dtype} with scales beside it, expected {FLOAT8}")]
        if len(info.shape) not in (2, 3):
            return [_at(self.tensors, name, f"{info}: only matrices and experts may be float8")]
        key = name + SCALE_SUFFIX
        scale, shape = self.tensors[key], scale_shape(info.shape, block)
        problems = []
        if scale.shape != shape:
            reason = (
                f"shape {list(scale.shape)}, expected {list(shape)} for {list(info.shape)} in blocks of {list(block)}"
            )
            problems.append(_at(self.tensors, key, reason))
        if scale.dtype not in SCALE_DTYPES:
            problems.append(_at(self.tensors, key, f"dtype {scale.dtype}, expected one of {', '.join(SCALE_DTYPES)}"))
        return problems


def _rows_of(part: int, num_rows: int) -> slice:
    return slice(part * num_rows, (part + 1) * num_rows)


def _at(tensors: Mapping[str, TensorInfo], name: str, reason: str) -> str:
    return f"{tensors[name].file}: {name}: {reason}"
