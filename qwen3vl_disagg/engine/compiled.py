"""The decoder compiled: its step, which is one layer and the hook, is a graph; the loop over layers is not.

All layers share the graphs of their kind, because weights are inputs. A graph is for a kind of layer (experts or dense)
with or without a DeepStack level, and for a range of token counts: 1 (a size of one is a constant to the compiler), few
(where the CPU kernel reads the weights), and more. How tokens divide into sequences, contexts and pages is in one
tensor whose size no graph looks at. So the number of graphs is known, all are made at the start, and a recompilation
afterwards is an error where `Q3VL_GRAPHS=fail` is set.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from qwen3vl_disagg.kernels.build import cache_folder
from qwen3vl_disagg.kernels.ops import MAX_LINEAR_ROWS
from qwen3vl_disagg.model import ModelConfig, PagedBatch, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.attention import LayerCache

SWITCH = "Q3VL_GRAPHS"
"""Environment variable: `count` prints the graphs on stderr, `fail` also makes a later recompilation an error."""


@dataclass(frozen=True)
class GraphKind:
    """What one graph is for."""

    is_moe: bool
    has_level: bool
    tokens: Literal["one", "few", "many"]


def graph_kinds(config: ModelConfig, *, has_kernels: bool) -> set[GraphKind]:
    """All graphs that the decoder can need: a model with experts in every layer has 6 with kernels and 4 without."""
    text, levels = config.text, config.num_deepstack_levels
    layers = {(text.is_moe_layer(i), False) for i in range(text.num_hidden_layers)}
    layers |= {(text.is_moe_layer(i), True) for i in range(min(levels, text.num_hidden_layers))}
    sizes: tuple[Literal["one", "few", "many"], ...] = ("one", "few", "many") if has_kernels else ("one", "many")
    return {GraphKind(is_moe, has_level, tokens) for is_moe, has_level in layers for tokens in sizes}


@dataclass(frozen=True)
class GraphCounts:
    """What the compiler has made in this process so far."""

    graphs: int
    breaks: int

    @staticmethod
    def now() -> GraphCounts:
        return GraphCounts(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


class CompiledDecoder:
    """Compiles a model's step in place. `warm_up` makes every graph; `counts` says how many there are."""

    def __init__(self, model: Qwen3MoeForCausalLMWithDeepStack) -> None:
        self.model = model
        head = model.lm_head
        self.kinds = graph_kinds(model.config, has_kernels=head.use_kernel)
        self._before = GraphCounts.now()
        decoder = model.model
        decoder._step = torch.compile(decoder._step, fullgraph=True, dynamic=True)  # type: ignore[method-assign]

    @property
    def counts(self) -> GraphCounts:
        now = GraphCounts.now()
        return GraphCounts(now.graphs - self._before.graphs, now.breaks - self._before.breaks)

    @torch.inference_mode()
    def warm_up(self, caches: list[LayerCache], page_size: int, *, progress: bool) -> float:
        """Run one step of every kind; seconds it took. What is in the first pages of the caches is lost.

        One process of a machine compiles at a time: those that come later find what it made.
        """
        started = time.monotonic()
        # Sizes that differ everywhere: what is equal by chance the compiler takes for equal.
        sizes = [1, 7, MAX_LINEAR_ROWS + 5] if self.model.lm_head.use_kernel else [1, 7]
        has_levels = [False, True] if self.model.config.num_deepstack_levels else [False]
        steps = [(size, has_level) for has_level in has_levels for size in sizes]
        room = caches[0][0].shape[0] if caches else 0
        with one_at_a_time(), tqdm(steps, desc="compiling", file=sys.stderr, disable=not progress, leave=False) as bar:
            for size, has_level in bar:
                self._run(min(size, room), has_level, caches, page_size)
        if os.environ.get(SWITCH) in ("count", "fail"):
            print(f"graphs: {self.counts.graphs} of {len(self.kinds)}, breaks: {self.counts.breaks}", file=sys.stderr)
        if os.environ.get(SWITCH) == "fail":
            torch.compiler.set_stance("fail_on_recompile")
        return time.monotonic() - started

    def _run(self, size: int, has_level: bool, caches: list[LayerCache], page_size: int) -> None:
        decoder = self.model.model
        device, dtype = decoder.embed_tokens.weight.device, decoder.embed_tokens.weight.dtype
        ids = torch.zeros(size, dtype=torch.int64, device=device)
        table = torch.arange(-(-size // page_size), device=device)[None]
        deepstack = None
        if has_level:
            width = self.model.config.num_deepstack_levels * self.model.config.text.hidden_size
            deepstack = torch.zeros(size, width, dtype=dtype, device=device)
        batch = PagedBatch([size], [size], table, page_size, caches)
        self.model(ids, ids.expand(3, -1), batch, input_deepstack_embeds=deepstack)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Processes on one machine take turns. The lock goes with the process that holds it."""
    path = cache_folder() / "compile.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
