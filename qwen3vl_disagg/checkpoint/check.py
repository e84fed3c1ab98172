"""Whether a folder can be used, from headers and small files alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qwen3vl_disagg.checkpoint.folder import file_problem, open_checkpoint, read_config
from qwen3vl_disagg.checkpoint.hub import SMALL_FILES
from qwen3vl_disagg.checkpoint.load import check_weights
from qwen3vl_disagg.core.devices import resolve_dtype
from qwen3vl_disagg.core.errors import CheckpointError, attempt
from qwen3vl_disagg.model.config import ModelConfig

T = TypeVar("T")


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
