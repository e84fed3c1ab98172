"""A checkpoint's own module, to compare a loaded one with: read from the files once more, a part at a time, in float32
on the CPU, with no kernel, compiler or rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen3vl_disagg.checkpoint.folder import open_checkpoint
from qwen3vl_disagg.checkpoint.load import plan_module, set_tensor
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.model.moe import Experts


class Reference:
    """The module that `build` makes of a folder's config. Its parts have weights while they are used, so no more than
    one of them is in memory. Close it.

    What is read is compared with what `loaded`, a module of the same names, has there: `differing` names the parameters
    that are not, rounded to their dtype, as in the files. Quantized ones, and those that are cut, are not looked at.
    """

    def __init__(self, build: Callable[[ModelConfig], nn.Module], folder: Path | str, loaded: nn.Module) -> None:
        self._checkpoint = open_checkpoint(folder)
        self.config = self._checkpoint.config
        self.module, self._recipes = plan_module(self._checkpoint, build)
        self.module.requires_grad_(False).eval()
        for part in self.module.modules():
            if isinstance(part, Experts):
                part.impl = "loop"
        self._held = {name: weight.data for name, weight in loaded.named_parameters()}
        self.differing: list[str] = []

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpoint.close()

    @property
    def num_bytes(self) -> int:
        """Of all of it in the files."""
        tensors, whole = self._checkpoint.tensors, self.module.get_parameter
        return sum(recipe.num_bytes(tensors, range(len(whole(name)))) for name, recipe in self._recipes.items())

    @contextlib.contextmanager
    def part(self, prefix: str) -> Iterator[Any]:
        """A submodule by its name, with its weights until the block ends. CheckpointError if it cannot be read."""
        self._read(prefix)
        try:
            yield self.module.get_submodule(prefix)
        finally:
            self._drop(prefix)

    def in_parts(self, prefix: str) -> Any:
        """A submodule whose children, and those of its lists, have their weights while they run."""
        whole = self.module.get_submodule(prefix)
        for name, child in whole.named_children():
            parts = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
            for number, part in parts:
                where = ".".join(filter(None, (prefix, name, number)))
                part.register_forward_pre_hook(partial(_call, self._read, where))
                part.register_forward_hook(partial(_call, self._drop, where))
        return whole

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """Some rows of a matrix `[R, D]`, and nothing else of it."""
        rows_RD = torch.empty(len(numbers), *self.module.get_parameter(name).shape[1:])
        for row_D, number in zip(rows_RD, numbers, strict=True):
            self._recipes[name].fill(self._checkpoint, range(number, number + 1), row_D[None])
        held = self._held.get(name)
        self._note(name, None if held is None else held[list(numbers)], rows_RD)
        return rows_RD

    def _names(self, prefix: str) -> list[str]:
        return [name for name in self._recipes if name.startswith(f"{prefix}.")]

    def _read(self, prefix: str) -> None:
        for name in self._names(prefix):
            weight = torch.empty(self.module.get_parameter(name).shape)
            self._recipes[name].fill(self._checkpoint, range(len(weight)), weight)
            set_tensor(self.module, name, weight)
            self._note(name, self._held.get(name), weight)

    def _drop(self, prefix: str) -> None:
        for name in self._names(prefix):
            set_tensor(self.module, name, torch.empty(self.module.get_parameter(name).shape, device="meta"))

    def _note(self, name: str, held: Tensor | None, own: Tensor) -> None:
        is_comparable = type(held) is Tensor and held.shape == own.shape and held.dtype.itemsize > 1
        if held is not None and is_comparable and not torch.equal(held.cpu(), own.to(held.dtype)):
            self.differing.append(name)


def _call(do: Callable[[str], None], prefix: str, *_: object) -> None:
    do(prefix)
