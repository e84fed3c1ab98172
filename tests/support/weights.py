"""Small checkpoint folders and tools to damage them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3vl_disagg.checkpoint import load_as
from qwen3vl_disagg.model import ModelConfig, Qwen3MoeForCausalLM
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint

_TINY = RANDOM_PRESETS["tiny-random"]
SMALLEST = replace(
    _TINY,
    text=replace(_TINY.text, num_hidden_layers=2, num_experts=3),
    vision=replace(_TINY.vision, depth=2, deepstack_visual_indexes=(0, 1)),
)


def write_smallest(folder: Path, config: ModelConfig = SMALLEST, **options: Any) -> Path:
    write_random_checkpoint(folder, config, seed=1, **options)
    return folder


def load_text_model(folder: Path, **options: Any) -> Qwen3MoeForCausalLM:
    """The decoder without DeepStack."""
    return load_as(Qwen3MoeForCausalLM, folder, **options)


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors") -> None:
    """Rewrite one weights file after `edit` changed its tensors in place."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def edit_json(folder: Path, edit: Callable[[dict[str, Any]], object], file: str = "config.json") -> None:
    values = json.loads((folder / file).read_text())
    edit(values)
    (folder / file).write_text(json.dumps(values))


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_header(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data
