"""What the steps run: the published model on a GPU, a small random one in the rehearsal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.model import ModelConfig, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.plan.presets import PRESETS
from tools.checkpoints import RANDOM_PRESETS, random_language_model
from tools.gpu_steps.step import Check


@dataclass(frozen=True)
class Sizes:
    """`batches` and `prefills`: decode steps and prompts to time. `sides`: of images, in pixels. `gib`: of keys and
    values. The rehearsal does not compile: that is tested elsewhere, and takes a CPU minutes."""

    config: ModelConfig
    batches: tuple[int, ...]
    captured: tuple[int, ...]
    prefills: tuple[int, ...]
    context: int
    new_tokens: int
    sides: tuple[int, ...]
    page_size: int
    gib: float
    compile: bool
    repeats: int


REAL = Sizes(PRESETS["30b-a3b"], (1, 8, 32), (1, 8, 32, 128), (1024, 4096), 700, 64, (448, 1024), 64, 30.0, True, 20)
SMALL = Sizes(RANDOM_PRESETS["tiny-random"], (1, 4), (1, 4), (24,), 20, 6, (64, 96), 16, 0.01, False, 2)


def sizes_of(check: Check) -> Sizes:
    return SMALL if check.is_dry else REAL


def language_model(check: Check) -> Qwen3MoeForCausalLMWithDeepStack:
    """Random weights, made on the device, in bfloat16."""
    return random_language_model(sizes_of(check).config, torch.bfloat16, check.device, 0)


def make_engine(check: Check, model: Qwen3MoeForCausalLMWithDeepStack, *, compile: bool | None = None) -> Engine:
    """`compile`: where it is not as the sizes have it."""
    sizes = sizes_of(check)
    options = EngineOptions(
        max_running=max(sizes.captured),
        page_size=sizes.page_size,
        kv_cache_gib=sizes.gib,
        compile=sizes.compile if compile is None else compile,
    )
    return Engine(model, eos_ids=frozenset(), options=options)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def least_ms(check: Check, work: Callable[[], Any], repeats: int | None = None) -> float:
    """Milliseconds of the fastest run, after one that does not count; the device is waited for each time."""
    seconds = []
    for _ in range(1 + (repeats or sizes_of(check).repeats)):
        wait(check.device)
        started = time.perf_counter()
        work()
        wait(check.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) * 1e3


def prompt(sizes: Sizes, length: int, number: int) -> list[int]:
    """No two alike."""
    generator = torch.Generator().manual_seed(1000 * length + number)
    return torch.randint(1, sizes.config.vision_start_token_id - 10, (length,), generator=generator).tolist()


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest expected number."""
    expected = expected.float()
    return ((actual.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
