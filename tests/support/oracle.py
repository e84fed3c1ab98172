"""The oracle (`transformers`), ours beside it, and prompts to run through both.

Both read the same checkpoint folder, each with its own loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from qwen3vl_disagg.checkpoint import load_model
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.model import ForwardBatch, ModelConfig, Qwen3VLMoeForConditionalGeneration, separate_deepstack
from qwen3vl_disagg.processing.positions import mrope_positions
from qwen3vl_disagg.transport.buffers import VisualRows
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint

logging.set_verbosity_error()
logging.disable_progress_bar()

Grid = tuple[int, int, int]

_TINY = RANDOM_PRESETS["tiny-random"]
ODD = replace(
    _TINY,
    text=replace(
        _TINY.text,
        vocab_size=312,
        hidden_size=72,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=24,
        mrope_section=(4, 4, 4),
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        num_experts=5,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        decoder_sparse_step=2,
    ),
    vision=replace(
        _TINY.vision,
        depth=3,
        hidden_size=40,
        num_heads=2,
        intermediate_size=56,
        out_hidden_size=72,
        num_position_embeddings=25,
        deepstack_visual_indexes=(0, 2),
        patch_size=14,
    ),
)
"""Two levels, dense and sparse layers in turn, another patch size, odd position table, other frequencies."""

FLAT = replace(ODD, vision=replace(ODD.vision, deepstack_visual_indexes=(), rope_theta=500.0))
"""No DeepStack level at all, other frequencies in the tower."""

CONFIGS: dict[str, ModelConfig] = {
    "moe": _TINY,
    "dense": RANDOM_PRESETS["tiny-random-dense"],
    "mixed": RANDOM_PRESETS["tiny-random-mixed"],
    "odd": ODD,
    "flat": FLAT,
}


@dataclass(frozen=True)
class Prompt:
    """Token ids `[T]`, the visual items among them, their pixels `[P, patch_dim]`."""

    ids: Tensor
    items: tuple[VisualItem, ...]
    pixels: Tensor

    @property
    def grids(self) -> list[Grid]:
        return [item.grid for item in self.items]


Part = int | Grid | tuple[str, Grid]
"""A length of text, an image's grid, or ("video", a clip's grid)."""

CASES: dict[str, list[list[Part]]] = {
    "text": [[11]],
    "one image": [[4, (1, 4, 6), 3]],
    "image first, not square": [[0, (1, 2, 10), 5]],
    "two images": [[2, (1, 6, 4), 1, (1, 2, 2), 6]],
    "batch": [[7], [3, (1, 4, 4), 2], [1], [2, (1, 8, 6), 3, (1, 2, 6), 1], [9]],
    "clip": [[4, ("video", (3, 4, 6)), 3]],
    "clips and images": [
        [2, (1, 6, 4), 1, ("video", (2, 2, 6)), 3, (1, 2, 2), 1],
        [1, ("video", (1, 4, 4)), ("video", (4, 2, 2)), 2],
    ],
}
"""Name -> prompts, each a list of text lengths, grids and clips."""


def make_prompt(config: ModelConfig, parts: Sequence[Part], *, seed: int = 0) -> Prompt:
    """Random text tokens and random pixels; each image, and each frame of a clip, between vision start and end, the
    frames behind some tokens of text."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    items = []

    def add_text(length: int) -> None:
        ids.extend(torch.randint(0, config.vision_start_token_id - 9, (length,), generator=generator).tolist())

    for part in parts:
        if isinstance(part, int):
            add_text(part)
            continue
        is_clip = isinstance(part[1], tuple)
        grid = part[1] if is_clip else part
        frame_rows = grid[1] * grid[2] // config.vision.merge_unit
        runs = []
        for frame in range(grid[0]):
            add_text((2 + frame % 3) * is_clip)
            ids.append(config.vision_start_token_id)
            runs.append(len(ids))
            ids += [config.video_token_id if is_clip else config.image_token_id] * frame_rows
            ids.append(config.vision_end_token_id)
        items.append(
            VisualItem(
                modality="video" if is_clip else "image",
                digest="",
                num_bytes=0,
                grid=grid,
                num_rows=grid[0] * frame_rows,
                offset=runs[0],
                param="item",
                run_offsets=tuple(runs) if is_clip else (),
            )
        )
    num_patches = sum(t * h * w for t, h, w in (item.grid for item in items))
    pixels = torch.rand(num_patches, config.vision.patch_dim, generator=generator) * 2 - 1
    return Prompt(torch.tensor(ids), tuple(items), pixels)


def make_case(config: ModelConfig, name: str) -> list[Prompt]:
    return [make_prompt(config, parts, seed=seed) for seed, parts in enumerate(CASES[name])]


@dataclass
class Outputs:
    """What both sides give for a list of prompts, packed behind one another.

    logits `[T, V]`, positions `[3, T]`, layers (each layer's own output `[T, D]`, before DeepStack is added),
    main `[R, D]`, levels n of `[R, D]`.
    """

    logits: Tensor
    positions: Tensor
    layers: list[Tensor]
    main: Tensor
    levels: list[Tensor]


def load_oracle(folder: Path, dtype: torch.dtype = torch.float32, *, attention: str = "eager") -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def image_processor(folder: Path, resize: str) -> Any:
    """The reference's: with torchvision where that is installed, else the test is skipped; or with Pillow."""
    if resize == "pillow":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil.from_pretrained(folder)
    pytest.importorskip("torchvision", reason="it pins torch")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor.from_pretrained(folder)


@torch.no_grad()
def run_oracle(oracle: Any, config: ModelConfig, prompts: Sequence[Prompt]) -> Outputs:
    """Each prompt by itself."""
    logits, positions, layers, main, levels = [], [], [], [], []
    for prompt in prompts:
        types = ((prompt.ids == config.image_token_id).int() + 2 * (prompt.ids == config.video_token_id).int())[None]
        visual = {}
        oracle.model.rope_deltas = None
        pixels = prompt.pixels.split([t * h * w for t, h, w in prompt.grids])
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            mine = [n for n, item in enumerate(prompt.items) if item.modality == kind]
            if mine:
                visual[name] = torch.cat([pixels[n] for n in mine])
                visual[f"{kind}_grid_thw"] = torch.tensor([prompt.grids[n] for n in mine])
        for part, item in zip(pixels, prompt.items, strict=True):
            kind = oracle.model.get_image_features if item.modality == "image" else oracle.model.get_video_features
            features = kind(part, torch.tensor([item.grid]), return_dict=True)
            main.append(torch.cat(features.pooler_output))
            if features.deepstack_features:
                levels.append(torch.stack([torch.cat(level) for level in features.deepstack_features]))
        grids = {name: value for name, value in visual.items() if name.endswith("grid_thw")}
        index, _ = oracle.model.get_rope_index(prompt.ids[None], types, **grids)
        out = oracle(
            input_ids=prompt.ids[None], mm_token_type_ids=types, output_hidden_states=True, use_cache=False, **visual
        )
        logits.append(out.logits[0])
        positions.append(index[:, 0])
        # The last recorded hidden state is after the final norm, so the last layer's output is not among them.
        layers.append(torch.stack([hidden[0] for hidden in out.hidden_states[1:-1]]))
    return Outputs(
        torch.cat(logits),
        torch.cat(positions, dim=1),
        list(torch.cat(layers, dim=1)),
        torch.cat(main) if main else torch.empty(0, config.text.hidden_size),
        list(torch.cat(levels, dim=1)) if levels else [],
    )


def engine_requests(model: Qwen3VLMoeForConditionalGeneration, prompts: dict[str, Prompt]) -> dict[str, Any]:
    """name -> (token ids, items, rows), as the engine's tests have them."""
    made = {}
    for name, prompt in prompts.items():
        rows = []
        for item, pixels in zip(
            prompt.items, prompt.pixels.split([t * h * w for t, h, w in prompt.grids]), strict=True
        ):
            with torch.no_grad():
                features = model.get_image_feature(pixels, [item.grid])
            main, deepstack = separate_deepstack(features, model.config.text.hidden_size)
            rows.append(VisualRows(1, 0, item.num_rows, ((0, main),), ((0, deepstack),)))
        made[name] = (prompt.ids.tolist(), list(prompt.items), rows)
    return made


@torch.no_grad()
def run_ours(model: Qwen3VLMoeForConditionalGeneration, prompts: Sequence[Prompt]) -> Outputs:
    """All prompts in one packed batch."""
    config = model.config
    merge = config.vision.spatial_merge_size
    ids = torch.cat([prompt.ids for prompt in prompts])
    positions = torch.cat([mrope_positions(len(p.ids), p.items, merge)[0] for p in prompts], dim=1)
    pixels, grids = torch.cat([p.pixels for p in prompts]), [grid for p in prompts for grid in p.grids]
    visual = {"pixel_values": pixels, "image_grid_thw": grids} if grids else {}
    layers: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output: layers.append(output))
        for layer in model.language_model.model.layers[:-1]
    ]
    try:
        batch = ForwardBatch.for_prompt([len(p.ids) for p in prompts], last_only=False)
        logits = model(ids, positions, batch, **visual)
    finally:
        for handle in handles:
            handle.remove()
    main, levels = torch.empty(0, config.text.hidden_size), []
    if grids:
        main, deepstack = separate_deepstack(model.get_image_feature(pixels, grids), config.text.hidden_size)
        levels = list(deepstack.chunk(config.num_deepstack_levels, dim=1)) if config.num_deepstack_levels else []
    return Outputs(logits, positions, layers, main, levels)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """norm(difference) / norm(theirs), in float64; 0 for two empty tensors."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ")
    if theirs.numel() == 0:
        return 0.0
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


class OraclePool:
    """Checkpoints, oracles and models, each made once a session."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._cache: dict[tuple[object, ...], Any] = {}

    def _once(self, key: tuple[object, ...], make: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def folder(self, name: str) -> Path:
        def make() -> Path:
            write_random_checkpoint(self.root / name, CONFIGS[name], seed=len(name))
            return self.root / name

        return self._once(("folder", name), make)

    def oracle(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        return self._once(("oracle", name, dtype), lambda: load_oracle(self.folder(name), dtype))

    def ours(self, name: str, dtype: torch.dtype = torch.float32) -> Qwen3VLMoeForConditionalGeneration:
        """Shared: a test that changes it loads its own with `load_model(pool.folder(name))`."""
        return self._once(("ours", name, dtype), lambda: load_model(self.folder(name), dtype=dtype))

    def expected(self, name: str, case: str, dtype: torch.dtype = torch.float32) -> Outputs:
        """The oracle's outputs for a case."""

        def make() -> Outputs:
            return run_oracle(self.oracle(name, dtype), CONFIGS[name], make_case(CONFIGS[name], case))

        return self._once(("expected", name, case, dtype), make)
