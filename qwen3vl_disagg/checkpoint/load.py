"""Checkpoint folders -> modules, each reading only its own tensors.

A module is built on the meta device, every name and shape it needs is checked against the file headers, and only then
are weights read, cast and put in place. Loaded modules are for inference: `eval()`, no gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from qwen3vl_disagg.checkpoint.folder import Checkpoint, open_checkpoint
from qwen3vl_disagg.checkpoint.layouts import ExpertLayout, Recipe, Shape, checkpoint_name, plan, quantized_tensor
from qwen3vl_disagg.checkpoint.quantize import make_room, put
from qwen3vl_disagg.core.errors import CheckpointError, NotBuiltYet
from qwen3vl_disagg.core.settings import DTYPES, Quantize, check_quantize
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.model.decoder import Qwen3MoeForCausalLM
from qwen3vl_disagg.model.deepstack import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.kernels import use_kernels
from qwen3vl_disagg.model.vl import Qwen3VLMoeForConditionalGeneration

_HEAD = "lm_head.weight"
Device = str | torch.device
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_language_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    expert_layout: ExpertLayout | None = None,
    quantize: Quantize = "none",
    progress: bool = False,
) -> Qwen3MoeForCausalLMWithDeepStack:
    """What a language rank holds: decoder and head, no vision tower.

    Args:
        dtype: None for the checkpoint's own (`dtype` of its config).
        expert_layout: how expert weights are stored; needed only where their shapes fit two layouts.
        quantize: `int8` for the decoder's matrices; each is quantized as soon as it is read.
        progress: a bar on stderr.

    Raises CheckpointError listing everything wrong, NotBuiltYet for quantized weights.
    """
    return _load(Qwen3MoeForCausalLMWithDeepStack, folder, dtype, device, expert_layout, quantize, progress)


def load_text_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    expert_layout: ExpertLayout | None = None,
    quantize: Quantize = "none",
    progress: bool = False,
) -> Qwen3MoeForCausalLM:
    """The decoder without DeepStack, for text alone. Arguments as for `load_language_model`."""
    return _load(Qwen3MoeForCausalLM, folder, dtype, device, expert_layout, quantize, progress)


def load_vision_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    progress: bool = False,
) -> Qwen3VLMoeForConditionalGeneration:
    """What an encode rank holds: the vision tower, no decoder. Arguments as for `load_language_model`."""

    def build(config: ModelConfig) -> Qwen3VLMoeForConditionalGeneration:
        return Qwen3VLMoeForConditionalGeneration(config, language_model=False)

    return _load(build, folder, dtype, device, None, "none", progress)


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    expert_layout: ExpertLayout | None = None,
    quantize: Quantize = "none",
    progress: bool = False,
) -> Qwen3VLMoeForConditionalGeneration:
    """Tower and decoder in one module. Arguments as for `load_language_model`."""
    return _load(Qwen3VLMoeForConditionalGeneration, folder, dtype, device, expert_layout, quantize, progress)


def _load(
    build: Callable[[ModelConfig], ModuleT],
    folder: Path | str,
    dtype: torch.dtype | None,
    device: Device,
    expert_layout: ExpertLayout | None,
    quantize: Quantize,
    progress: bool,
) -> ModuleT:
    check_quantize(quantize)
    with open_checkpoint(folder) as checkpoint:
        name = quantized_tensor(checkpoint.tensors)
        if name is not None:
            raise NotBuiltYet(f"loading quantized weights ({checkpoint.tensors[name].file}: {name})", param="model")
        try:
            with torch.device("meta"):
                module, whole = build(checkpoint.config), Qwen3VLMoeForConditionalGeneration(checkpoint.config)
        except (RuntimeError, OverflowError) as error:  # sizes whose product no tensor can have
            raise CheckpointError(checkpoint.folder, [f"config.json: impossible sizes: {error}"]) from error
        recipes = _check(checkpoint, module, whole, expert_layout)
        dtype = dtype or DTYPES[checkpoint.config.dtype]
        quantized = make_room(module, dtype) if quantize == "int8" else frozenset()
        _fill(module, recipes, checkpoint, dtype, torch.device(device), quantized, progress)
    left = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if left:
        raise CheckpointError(checkpoint.folder, [f"{name}: not filled" for name in left])
    return use_kernels(module.requires_grad_(False).eval())


def _check(
    checkpoint: Checkpoint, module: nn.Module, whole: nn.Module, expert_layout: ExpertLayout | None
) -> dict[str, Recipe]:
    """Recipes of the module's parameters. Tensors that no part of the whole model knows are problems too."""
    known = plan(checkpoint.tensors, {checkpoint_name(n): s for n, s in _wanted(whole, checkpoint)}, expert_layout)
    recipes = {name: known[checkpoint_name(name)] for name, _ in _wanted(module, checkpoint)}
    problems = [problem for recipe in recipes.values() for problem in recipe.problems]
    used = {source for recipe in known.values() for source in recipe.sources}
    problems += [
        f"{info.file}: {name}: unknown tensor {info}" for name, info in checkpoint.tensors.items() if name not in used
    ]
    if problems:
        raise CheckpointError(checkpoint.folder, problems)
    return recipes


def _wanted(module: nn.Module, checkpoint: Checkpoint) -> list[tuple[str, Shape]]:
    """Parameters to fill. A tied head is filled by tying, unless the checkpoint brings one of its own."""
    tied = checkpoint.config.tie_word_embeddings and _HEAD not in checkpoint.tensors
    parameters = module.named_parameters(remove_duplicate=False)
    return [(name, tuple(p.shape)) for name, p in parameters if not (tied and checkpoint_name(name) == _HEAD)]


def _fill(
    module: nn.Module,
    recipes: dict[str, Recipe],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    quantized: AbstractSet[str],
    progress: bool,
) -> None:
    shapes = {name: p.shape for name, p in module.named_parameters(remove_duplicate=False)}
    total = sum(checkpoint.tensors[source].num_bytes for recipe in recipes.values() for source in recipe.sources)
    bar = tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, file=sys.stderr, disable=not progress)
    with bar, torch.no_grad():
        for name, recipe in recipes.items():
            before = checkpoint.bytes_read
            weight = torch.empty(shapes[name], dtype=dtype, device=device)
            recipe.fill(checkpoint, weight)
            if name in quantized:
                put(module, name, weight)
            else:
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
            bar.update(checkpoint.bytes_read - before)
    for part in module.modules():
        if isinstance(part, Qwen3MoeForCausalLM) and part.lm_head.weight.is_meta:
            part.tie_weights()
