"""Checkpoint folders -> modules, each reading only its own tensors, and of those only its own rows.

A module is built on the meta device, every name and shape it needs is checked against the file headers, and only then
are weights read, cast and put in place. Loaded modules are for inference: `eval()`, no gradients.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from qwen3vl_disagg.checkpoint.download import SMALL_FILES
from qwen3vl_disagg.checkpoint.folder import Checkpoint, file_problem, first_of, open_checkpoint, read_config
from qwen3vl_disagg.checkpoint.fp8 import SCALE_SUFFIX
from qwen3vl_disagg.checkpoint.layouts import HEAD, ExpertLayout, Recipe, Shape, checkpoint_name, plan
from qwen3vl_disagg.checkpoint.quantize import BLOCK, make_room, quantize_into
from qwen3vl_disagg.core.devices import resolve_dtype
from qwen3vl_disagg.core.errors import CheckpointError, attempt
from qwen3vl_disagg.core.settings import Quantize, check_quantize
from qwen3vl_disagg.core.tensors import on_huge_pages
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.model.decoder import Qwen3MoeForCausalLM
from qwen3vl_disagg.model.deepstack import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.kernels import use_kernels
from qwen3vl_disagg.model.vl import Qwen3VLMoeForConditionalGeneration

Device = str | torch.device
ModuleT = TypeVar("ModuleT", bound=nn.Module)
T = TypeVar("T")
OnSize = Callable[[int], None]
BAR_S = 1.0
"""What is read faster has no bar."""


class Shards(Protocol):
    """A rank's part of a model: which rows of each parameter it holds, and how its modules keep them.

    Names are those of the module's parameters, shapes are of the whole parameter.
    """

    def rows(self, name: str, shape: tuple[int, ...]) -> range | None:
        """The rows of dim 0 that this rank holds, also none of them (`range(3, 3)`). None: the parameter is whole."""
        ...

    def hold(self, name: str, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What the module keeps for the rank's rows `local` of a tensor of `shape`.

        Called for each parameter that `rows` cut, and for the scales `<name>_scale` of an int8 one.
        """
        ...

    def finish(self, module: nn.Module) -> None:
        """Called once, when all weights are in place and before anything looks at them."""
        ...


class AllRows:
    """The `Shards` of who holds everything."""

    def rows(self, name: str, shape: tuple[int, ...]) -> range | None:
        return None

    def hold(self, name: str, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        return local

    def finish(self, module: nn.Module) -> None:
        pass


def held_rows(shards: Shards, name: str, shape: tuple[int, ...]) -> range | None:
    """`shards.rows`. ValueError for rows that the parameter has not."""
    rows = shards.rows(name, shape)
    if rows is not None and not (rows.step == 1 and 0 <= rows.start <= rows.stop <= shape[0]):
        raise ValueError(f"{name}: {rows} is no range of the {shape[0]} rows of {list(shape)}")
    return rows


class LoadOptions(TypedDict, total=False):
    """How a module is loaded.

    dtype: None for the checkpoint's own (`dtype` of its config).
    expert_layout: how expert weights are stored; needed only where their shapes fit two layouts.
    quantize: `int8` or `float8` for the decoder's matrices, made while they are read, a block of rows at a time.
    progress: a bar on stderr, over the bytes to read, if that takes more than a second.
    on_size: called with the number of bytes, before they are read.
    shards: which rows to read; None for all. Names and shapes are checked for the whole model in any case.
    """

    dtype: torch.dtype | None
    device: Device
    expert_layout: ExpertLayout | None
    quantize: Quantize
    progress: bool
    on_size: OnSize
    shards: Shards | None


def load_language_model(folder: Path | str, **options: Unpack[LoadOptions]) -> Qwen3MoeForCausalLMWithDeepStack:
    """What a language rank holds: decoder and head, no vision tower. See `load_as`."""
    return load_as(Qwen3MoeForCausalLMWithDeepStack, folder, **options)


def load_vision_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    progress: bool = False,
    on_size: OnSize = lambda _: None,
) -> Qwen3VLMoeForConditionalGeneration:
    """What an encode rank holds: the vision tower, no decoder. See `load_as`."""
    build = functools.partial(Qwen3VLMoeForConditionalGeneration, language_model=False)
    return load_as(build, folder, dtype=dtype, device=device, progress=progress, on_size=on_size)


def load_model(folder: Path | str, **options: Unpack[LoadOptions]) -> Qwen3VLMoeForConditionalGeneration:
    """Tower and decoder in one module. See `load_as`."""
    return load_as(Qwen3VLMoeForConditionalGeneration, folder, **options)


def check_weights(checkpoint: Checkpoint) -> None:
    """Everything that loading checks, from the headers: the same errors, and no weights are read."""
    whole_model(checkpoint)


def check_folder(folder: Path | str, make: Callable[[ModelConfig], T], *, dtype: str = "auto") -> tuple[ModelConfig, T]:
    """A folder's config, and what `make` makes of it and of the small files (tokenizer, templates, ..). `dtype`: what
    it is to be run in.

    Reads no weights. CheckpointError lists everything that is wrong with config, weights and small files, InputError
    says that the dtype has to be named.
    """
    folder = Path(folder)
    names = [name for name in SMALL_FILES if os.path.lexists(folder / name)]
    problems = [problem for name in names if (problem := file_problem(folder, name))]
    config = attempt(problems, lambda: read_config(folder))
    checkpoint = attempt(problems, lambda: open_checkpoint(folder))
    if checkpoint is not None:
        with checkpoint:
            attempt(problems, lambda: check_weights(checkpoint))
    made = None if config is None else attempt(problems, lambda: make(config))
    if config is None or made is None or problems:
        raise CheckpointError(folder, list(dict.fromkeys(problems)))
    resolve_dtype(dtype, config.dtype)
    return config, made


def whole_model(checkpoint: Checkpoint, expert_layout: ExpertLayout | None = None) -> dict[str, tuple[Shape, Recipe]]:
    """Published name (experts as the modules hold them) -> shape, and how to read it, of all that a checkpoint holds.

    Raises as loading does.
    """
    module, recipes = plan_module(checkpoint, Qwen3VLMoeForConditionalGeneration, expert_layout)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    return {checkpoint_name(name): (shapes[name], recipe) for name, recipe in recipes.items()}


def load_as(
    build: Callable[[ModelConfig], ModuleT],
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    expert_layout: ExpertLayout | None = None,
    quantize: Quantize = "none",
    progress: bool = False,
    on_size: OnSize = lambda _: None,
    shards: Shards | None = None,
) -> ModuleT:
    """The module that `build` makes of the config, filled; `LoadOptions` says how.

    Raises CheckpointError listing everything wrong. float8 weights are dequantized as they are read.
    """
    check_quantize(quantize)
    shards = shards or AllRows()
    with open_checkpoint(folder) as checkpoint:
        module, recipes = plan_module(checkpoint, build, expert_layout)
        dtype = dtype or resolve_dtype("auto", checkpoint.config.dtype)
        quantized = frozenset() if quantize == "none" else make_room(module, dtype, quantize)
        _fill(module, recipes, checkpoint, dtype, torch.device(device), quantized, progress, on_size, shards)
    left = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if left:
        raise CheckpointError(checkpoint.folder, [f"{name}: not filled" for name in left])
    shards.finish(module.requires_grad_(False).eval())
    return use_kernels(module)


class _Unfilled(TorchFunctionMode):
    """Parameters are not initialised: they are filled from files, and `normal_` on the meta device imports the whole of
    torch's compiler, a third of a rank's time to start."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def plan_module(
    checkpoint: Checkpoint, build: Callable[[ModelConfig], ModuleT], expert_layout: ExpertLayout | None = None
) -> tuple[ModuleT, dict[str, Recipe]]:
    """The module on the meta device, and how its parameters are filled."""
    try:
        with torch.device("meta"), _Unfilled():
            module, whole = build(checkpoint.config), Qwen3VLMoeForConditionalGeneration(checkpoint.config)
    except (RuntimeError, OverflowError) as error:  # sizes whose product no tensor can have
        raise CheckpointError(checkpoint.folder, [f"config.json: impossible sizes: {error}"]) from error
    return module, _check(checkpoint, module, whole, expert_layout)


def _check(
    checkpoint: Checkpoint, module: nn.Module, whole: nn.Module, expert_layout: ExpertLayout | None
) -> dict[str, Recipe]:
    """Recipes of the module's parameters. Tensors that no part of the whole model knows are problems too."""
    wanted = {checkpoint_name(name): shape for name, shape in _wanted(whole, checkpoint)}
    known = plan(checkpoint.tensors, wanted, expert_layout, checkpoint.block)
    recipes = {name: known[checkpoint_name(name)] for name, _ in _wanted(module, checkpoint)}
    problems = [problem for recipe in recipes.values() for problem in recipe.problems]
    used = {source for recipe in known.values() for source in recipe.sources}
    for name, info in checkpoint.tensors.items():
        if name not in used:
            is_orphan = name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) not in checkpoint.tensors
            what = "scales without their tensor" if is_orphan else "unknown tensor"
            problems.append(f"{info.file}: {name}: {what} {info}")
    if problems:
        raise CheckpointError(checkpoint.folder, first_of(problems))
    return recipes


def _wanted(module: nn.Module, checkpoint: Checkpoint) -> list[tuple[str, Shape]]:
    """Parameters to fill. A tied head is filled by tying, unless the checkpoint brings one of its own."""
    tied = checkpoint.config.tie_word_embeddings and HEAD not in checkpoint.tensors
    parameters = module.named_parameters(remove_duplicate=False)
    return [(name, tuple(p.shape)) for name, p in parameters if not (tied and checkpoint_name(name) == HEAD)]


def _fill(
    module: nn.Module,
    recipes: dict[str, Recipe],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    quantized: AbstractSet[str],
    progress: bool,
    on_size: OnSize,
    shards: Shards,
) -> None:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    cuts = {name: held_rows(shards, name, shapes[name]) for name in recipes}
    held = {name: range(shapes[name][0]) if cut is None else cut for name, cut in cuts.items()}
    total = sum(recipe.num_bytes(checkpoint.tensors, held[name]) for name, recipe in recipes.items())
    on_size(total)
    look: dict[str, Any] = {"desc": "loading weights", "unit": "B", "unit_scale": True, "file": sys.stderr}
    bar = tqdm(total=total, delay=BAR_S, disable=not progress, **look)
    with bar, torch.no_grad():
        for name, recipe in recipes.items():
            before = checkpoint.bytes_read
            stored_as = module.get_parameter(name).dtype if name in quantized else dtype
            weight = on_huge_pages(torch.empty(len(held[name]), *shapes[name][1:], dtype=stored_as, device=device))
            if name in quantized:
                scale = _read_quantized(checkpoint, recipe, held[name], weight, dtype)
                made = {name: weight, f"{name}_scale": scale}
            else:
                recipe.fill(checkpoint, held[name], weight)
                made = {name: weight}
            for key, local in made.items():
                whole = (shapes[name][0], *local.shape[1:])
                set_tensor(module, key, local if cuts[name] is None else shards.hold(key, local, whole))
            bar.update(checkpoint.bytes_read - before)
    for part in module.modules():
        if isinstance(part, Qwen3MoeForCausalLM) and part.lm_head.weight.is_meta:
            part.tie_weights()


def _read_quantized(
    checkpoint: Checkpoint,
    recipe: Recipe,
    rows: range,
    weight: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Fill a parameter's rows, `weight` in int8 or float8. Returns their float32 scales.

    No more than a block of them is there in `dtype` at a time.
    """
    row_shape, device = weight.shape[1:], weight.device
    scale = torch.empty(weight.shape[:-1], device=device)
    size = max(1, BLOCK // math.prod(row_shape) // recipe.step) * recipe.step
    room = torch.empty(min(size, len(rows)), *row_shape, dtype=dtype, device=device)
    # Blocks end at multiples of their size, counted from the parameter's first row: no scales are read twice.
    stops = [*range((rows.start // size + 1) * size, rows.stop, size), rows.stop] if rows else []
    for start, stop in itertools.pairwise([rows.start, *stops]):
        plain, done = room[: stop - start], slice(start - rows.start, stop - rows.start)
        recipe.fill(checkpoint, range(start, stop), plain)
        quantize_into(plain, weight[done], scale[done])
    return scale


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Exchange a parameter, or the buffer of a scale."""
    owner, _, leaf = name.rpartition(".")
    part = module.get_submodule(owner)
    is_parameter = leaf in dict(part.named_parameters(recurse=False))
    setattr(part, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
