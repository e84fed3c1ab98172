"""`--dry-run`: which rank would hold what, in bytes, from shapes alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen3vl_disagg.checkpoint import Checkpoint, check_weights, open_checkpoint, read_config
from qwen3vl_disagg.checkpoint.download import hub_id, model_name, resolve_model_folder
from qwen3vl_disagg.checkpoint.fp8 import SCALE_SUFFIX
from qwen3vl_disagg.checkpoint.layouts import HEAD
from qwen3vl_disagg.checkpoint.quantize import make_room
from qwen3vl_disagg.core.devices import resolve_dtype
from qwen3vl_disagg.core.errors import DisaggError, InputError
from qwen3vl_disagg.core.settings import ModelOptions, Quantize
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.model.vl import Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.options import DryRunOptions
from qwen3vl_disagg.parallel.expert_placement import shard_rows
from qwen3vl_disagg.parallel.kv_room import KvRoom
from qwen3vl_disagg.parallel.sizes import SizedModel
from qwen3vl_disagg.plan.hardware import Hardware, Memory
from qwen3vl_disagg.plan.presets import IMAGE_ROWS, PRESETS
from qwen3vl_disagg.processing import ImageProcessor

DEFAULT_WORLD = 8
MAX_WORLD = 65536


def check_dry_run(options: DryRunOptions, model: str | None, size: int = 0) -> None:
    """InputError for what does not go together. `model` is that of `ModelOptions`, `size` the number of ranks where
    there are some."""
    for name in ("preset", "hardware", "json"):
        if not options.dry_run and getattr(options, name):
            raise InputError(f"--{name} goes with --dry-run only", param=name)
    if options.world is not None and not 1 <= options.world <= MAX_WORLD:
        raise InputError(f"--world {options.world}: must be 1 to {MAX_WORLD}", param="world")
    if not options.dry_run and options.world not in (None, size):
        problem = "qwen3vl-disagg serve or torchrun start more" if size == 1 else f"torchrun has started {size}"
        raise InputError(f"--world {options.world}: {problem}", param="world")
    if options.preset is not None:
        if options.preset not in PRESETS:
            raise InputError(f"--preset {options.preset}: must be one of {', '.join(PRESETS)}", param="preset")
        if model is not None:
            raise InputError("--preset and --model: one of both", param="preset")


@dataclass(frozen=True)
class RankPart:
    """What one rank holds. `experts`: None where there are none to spread; a rank may also hold an empty range."""

    rank: int
    role: str
    experts: range | None
    expert_bytes: int
    decoder_bytes: int
    """The rest of the decoder, which every language rank has."""
    vision_bytes: int
    room: KvRoom | None = None
    """For keys and values, on a language rank."""

    @property
    def num_bytes(self) -> int:
        return self.expert_bytes + self.decoder_bytes + self.vision_bytes


@dataclass(frozen=True)
class DryRun:
    """What all ranks hold. `model_bytes` was counted without regard to ranks."""

    model: str
    dtype: str
    quantize: Quantize
    num_experts: int
    ranks: tuple[RankPart, ...]
    model_bytes: int
    counted: str
    """Where `model_bytes` comes from."""
    memory: str
    """Whose memory keys and values are fitted into."""
    image_rows: int
    """Of the largest image that the processor makes."""

    @property
    def sums(self) -> dict[str, int]:
        """Parts that make up one model: what is spread from all ranks, what is on several of them once."""
        return {
            "experts, over all ranks": sum(part.expert_bytes for part in self.ranks),
            "rest of the decoder, once": max(part.decoder_bytes for part in self.ranks),
            "vision tower, once": max(part.vision_bytes for part in self.ranks),
        }

    def check(self) -> None:
        """DisaggError unless the ranks hold the model, and nothing twice that is meant to be spread."""
        total = sum(self.sums.values())
        if total != self.model_bytes:
            raise DisaggError(f"the ranks' parts add up to {total} bytes, {self.counted} to {self.model_bytes}")

    def to_json(self) -> str:
        """One object on one line."""

        def rank(part: RankPart) -> dict[str, Any]:
            held: dict[str, Any] = {}
            if part.experts is not None:
                where = {"first": part.experts.start, "count": len(part.experts), "of": self.num_experts}
                held["experts"] = {**where, "bytes": part.expert_bytes}
            if part.decoder_bytes:
                held["decoder"] = {"bytes": part.decoder_bytes}
            if part.vision_bytes:
                held["vision"] = {"bytes": part.vision_bytes}
            shown = {"rank": part.rank, "role": part.role, "shards": held, "bytes": part.num_bytes}
            if (room := part.room) is not None:
                sizes = {"tokens": room.num_tokens, "pages": room.num_pages, "page_size": room.page_size}
                shown["kv_cache"] = {**sizes, "bytes": room.num_bytes}
            return shown

        return json.dumps(
            {
                "model": self.model,
                "dtype": self.dtype,
                "quantize": self.quantize,
                "world": len(self.ranks),
                "encode_ranks": sum(part.vision_bytes > 0 for part in self.ranks),
                "language_ranks": sum(part.decoder_bytes > 0 for part in self.ranks),
                "model_bytes": self.model_bytes,
                "sum_bytes": sum(self.sums.values()),
                "ranks": [rank(part) for part in self.ranks],
                "memory": self.memory,
                "image_rows": self.image_rows,
                "image_problem": self.image_problem,
            }
        )

    def to_text(self) -> str:
        """A table for people, and the sum."""
        dtype = self.dtype if self.quantize == "none" else f"{self.dtype}, {self.quantize} decoder"
        lines = [
            f"{self.model} ({dtype}), world of {len(self.ranks)}. Weights only: KV pages, buffers and activations "
            "come on top.",
            f"KV tokens: what `serve` would have with the memory of {self.memory}.",
            "",
            f"{'rank':>5}  {'role':<8}  {'experts':<16}  {'expert bytes':>17}  {'replicated bytes':>17}"
            f"  {'total bytes':>17}  {'':>10}  {'KV tokens':>12}",
        ]
        for part in self.ranks:
            lines.append(
                f"{part.rank:>5}  {part.role:<8}  {self._experts(part):<16}  {part.expert_bytes:>17,}"
                f"  {part.decoder_bytes + part.vision_bytes:>17,}  {part.num_bytes:>17,}"
                f"  {_short(part.num_bytes):>10}  {'-' if part.room is None else f'{part.room.num_tokens:,}':>12}"
            )
        fits = "fits" if self.image_problem is None else f"does not fit: {self.image_problem}"
        lines += ["", f"The largest image of the processor, {self.image_rows:,} visual tokens, {fits}.", ""]
        lines += [f"{sign} {name:<26} {size:>17,}" for sign, (name, size) in zip(" ++", self.sums.items(), strict=True)]
        lines.append(f"= {self.counted:<26} {self.model_bytes:>17,}  {_short(self.model_bytes):>10}")
        return "\n".join(lines)

    @property
    def image_problem(self) -> str | None:
        """Why the largest image could not be served; None if it can."""
        rooms = [part.room for part in self.ranks if part.room is not None]
        return min(rooms, key=lambda room: room.num_tokens).why_not(self.image_rows)

    def _experts(self, part: RankPart) -> str:
        if part.experts is None:
            return "-"
        if not part.experts:
            return f"none of {self.num_experts}"
        return f"{part.experts[0]}-{part.experts[-1]} of {self.num_experts}"


def _short(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def dry_run(
    options: ModelOptions,
    preset: str | None,
    encode_ranks: range,
    language_ranks: range,
    hardware: Hardware | None = None,
) -> DryRun:
    """What each rank would hold; a rank in both ranges has both roles. Of a hub's repository the settings are enough.
    `hardware`: what keys and values have their room on, in place of this machine.

    Raises CheckpointError for a folder that could not be loaded, DisaggError if the parts are not the whole.
    """
    num_ranks = len({*encode_ranks, *language_ranks})
    memory = Memory.here(options.device, num_ranks) if hardware is None else Memory.of(hardware, num_ranks)
    roles = encode_ranks, language_ranks
    if preset is not None:
        return _plan(preset, PRESETS[preset], options, *roles, memory, IMAGE_ROWS)
    folder = resolve_model_folder(options.model, weights=False)
    if hub_id(options.model) is not None:
        config = read_config(folder)
        return _plan(model_name(folder), config, options, *roles, memory, _image_rows(folder, config))
    with open_checkpoint(folder) as checkpoint:
        check_weights(checkpoint)
        config = checkpoint.config
        return _plan(str(folder), config, options, *roles, memory, _image_rows(folder, config), checkpoint)


def _image_rows(folder: Path, config: ModelConfig) -> int:
    return ImageProcessor.from_folder(folder, config.vision).max_rows


def _plan(
    model: str,
    config: ModelConfig,
    options: ModelOptions,
    encode: range,
    language: range,
    memory: Memory,
    image_rows: int,
    checkpoint: Checkpoint | None = None,
) -> DryRun:
    dtype, kind = resolve_dtype(options.dtype, config.dtype), options.quantize
    sized = SizedModel(config, dtype.itemsize, kind != "none", memory.is_cuda)
    has_own_head = checkpoint is not None and HEAD in checkpoint.tensors
    replicated = sized.replicated_bytes()
    if has_own_head and config.tie_word_embeddings:  # wins over tying, and is not quantized
        replicated += sized.num_bytes(sized.decoder_parts["embedding"])

    def part(rank: int) -> RankPart:
        is_encode, is_language = rank in encode, rank in language
        experts = None
        if is_language and sized.moe_layers:
            experts = shard_rows(config.text.num_experts, len(language), language.index(rank))
        return RankPart(
            rank,
            "both" if is_encode and is_language else "encode" if is_encode else "language",
            experts,
            int(sized.experts_bytes(len(experts or ()))),
            replicated if is_language else 0,
            sized.tower_bytes() if is_encode else 0,
            memory.room(rank, sized, options, encode, language, image_rows) if is_language else None,
        )

    if checkpoint is not None and kind == "none":
        shapes = [info.shape for name, info in checkpoint.tensors.items() if not name.endswith(SCALE_SUFFIX)]
        model_bytes, counted = sum(map(math.prod, shapes)) * dtype.itemsize, "the checkpoint's tensors"
    else:
        model_bytes, counted = _module_bytes(config, dtype, kind, has_own_head), "the whole model"
    made = DryRun(
        model=model,
        dtype=str(dtype).removeprefix("torch."),
        quantize=kind,
        num_experts=config.text.num_experts,
        ranks=tuple(part(rank) for rank in sorted({*encode, *language})),
        model_bytes=model_bytes,
        counted=counted,
        memory=memory.name,
        image_rows=image_rows,
    )
    made.check()
    return made


def _module_bytes(config: ModelConfig, dtype: torch.dtype, kind: Quantize, has_own_head: bool) -> int:
    """Parameters and scales of the whole model as loading leaves them, on the meta device; a tied head once."""
    with torch.device("meta"):
        module = Qwen3VLMoeForConditionalGeneration(config).to(dtype)
    if kind != "none":
        make_room(module, dtype, kind)
    if has_own_head:
        head = module.get_submodule("language_model.lm_head")
        head.register_parameter("weight", nn.Parameter(head.get_parameter("weight").clone(), requires_grad=False))
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
