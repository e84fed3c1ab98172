"""Write a checkpoint of random weights, with a small tokenizer.

    python tools/make_checkpoint.py --out /tmp/random --preset tiny-random --seed 1 --text.num-experts 12
    python tools/make_checkpoint.py --out /tmp/mid --preset mid

Every size of the preset can be overridden as `--text.NAME` and `--vision.NAME`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen3vl_disagg.model.config import ModelConfig, check_config
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint
from tools.training.make_tokenizer import (
    SPECIAL_TOKENS,
    build_syllable_tokenizer,
    build_tokenizer,
    write_template,
)

Preset = Literal["tiny-random", "tiny-random-dense", "tiny-random-mixed", "mid", "mid-dense", "30b-a3b"]
ON_DEVICE = ("30b-a3b",)
LARGE_VOCAB = 1024
"""A tokenizer as large as this is not learned from a short text."""


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path
    """Folder to write."""
    preset: Preset = "tiny-random"
    """`mid` is what `recipes/bench.py engine` measures, `mid-dense` what `pooling` does; 30b-a3b is made by the former
    on a GPU and never written."""
    seed: int = 0
    std: float = 0.04
    """Standard deviation of the weights."""
    layout: Literal["hub", "v5", "per_expert"] = "hub"
    """How expert weights are stored."""
    spelling: Literal["hub", "v5"] = "hub"
    """Which of the two spellings of config.json."""
    num_shards: int = 1
    max_pixels: int | None = None
    """Largest area of a resized image. Default: 65536, of `mid` and `mid-dense` 1048576."""
    tokenizer: bool = True
    """Write tokenizer and chat template too; the vision token ids must then leave room for 256 bytes and the merges."""
    thinking: bool = False
    """The chat template is that of a Thinking checkpoint: the answer begins with reasoning."""


def write_small_tokenizer(folder: Path, config: ModelConfig) -> None:
    """A tokenizer whose special tokens get the ids that the config names."""
    first_special = config.vision_start_token_id - SPECIAL_TOKENS.index("<|vision_start|>")
    if first_special > LARGE_VOCAB:
        build_syllable_tokenizer(first_special, folder)
    else:
        build_tokenizer([Path(__file__).read_text()], first_special, folder)


def main() -> None:
    options, rest = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    if options.preset in ON_DEVICE:
        raise SystemExit(f"{options.preset} is made on the device: recipes/bench.py engine --preset {options.preset}")
    config = tyro.cli(ModelConfig, default=RANDOM_PRESETS[options.preset], args=rest)
    problems = check_config(config)
    if problems:
        raise SystemExit("\n".join(problems))
    config = write_random_checkpoint(
        options.out,
        config,
        seed=options.seed,
        std=options.std,
        layout=options.layout,
        num_shards=options.num_shards,
        max_pixels=options.max_pixels or (1 << 20 if options.preset.startswith("mid") else 1 << 16),
        spelling=options.spelling,
    )
    if options.tokenizer:
        write_small_tokenizer(options.out, config)
        write_template(options.out, thinking=options.thinking)
    print(options.out)


if __name__ == "__main__":
    main()
