"""The decoder compiled: its step, which is one layer and the hook, is a graph; the loop over layers is not.

All layers share the graphs of their kind, because weights are inputs. A graph is for a kind of layer (experts or dense)
with or without a DeepStack level, and for a range of token counts: 1 (a size of one is a constant to the compiler), few
(where the CPU kernel reads the weights, or on CUDA that of the experts), and more. How tokens divide into sequences,
contexts and pages is in tensors whose sizes no graph looks at. FlexAttention has graphs of its own, which all layers
share. So the number of graphs is known, all are made at the start, and a recompilation afterwards is an error where
`Q3VL_GRAPHS=fail` is set.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from qwen3vl_disagg.core.environment import GRAPHS, variable
from qwen3vl_disagg.kernels import gpu
from qwen3vl_disagg.kernels.compiling import GraphCounts, compile_options, first_alone
from qwen3vl_disagg.kernels.ops import MAX_LINEAR_ROWS
from qwen3vl_disagg.model import ModelConfig, PagedBatch, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.attention import LayerCache
from qwen3vl_disagg.model.flex import FlexKind, flex_kinds
from qwen3vl_disagg.model.layers import Linear
from qwen3vl_disagg.model.moe import Dispatcher, DispatchPlan, Experts
from qwen3vl_disagg.model.paged import PagedImpl
from qwen3vl_disagg.parallel.sizes import padded_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphKind:
    """What one graph is for."""

    is_moe: bool
    has_level: bool
    tokens: Literal["one", "few", "many"]


def graph_kinds(config: ModelConfig, *, has_kernels: bool, has_few_rows: bool = False) -> set[GraphKind]:
    """All graphs that the decoder can need: a model with experts in every layer has 6 with kernels and 4 without.
    `has_few_rows`: layers with experts have a kernel for few rows."""
    text, levels = config.text, config.num_deepstack_levels
    layers = {(text.is_moe_layer(i), False) for i in range(text.num_hidden_layers)}
    layers |= {(text.is_moe_layer(i), True) for i in range(min(levels, text.num_hidden_layers))}
    sizes: tuple[Literal["one", "few", "many"], ...] = ("one", "few", "many")
    return {
        GraphKind(is_moe, has_level, tokens)
        for is_moe, has_level in layers
        for tokens in sizes
        if tokens != "few" or has_kernels or (is_moe and has_few_rows)
    }


class CompiledDecoder:
    """Compiles a model's step in place. `warm_up` makes every graph; `counts` says how many there are."""

    def __init__(self, model: Qwen3MoeForCausalLMWithDeepStack) -> None:
        self.model = model
        decoder = model.model
        # Of float8 weights only the router has a kernel.
        self._has_kernels = any(isinstance(part, Linear) and part.use_kernel for part in decoder.modules())
        weight = decoder.norm.weight
        has_few_rows = any(type(part) is Experts and part.takes_few_rows(weight) for part in decoder.modules())
        self._few = MAX_LINEAR_ROWS if self._has_kernels else gpu.MAX_FEW_ROWS if has_few_rows else 0
        kinds = graph_kinds(model.config, has_kernels=self._has_kernels, has_few_rows=has_few_rows)
        self.kinds: set[GraphKind | FlexKind] = {*kinds}
        self._before = GraphCounts.now()
        decoder.step = torch.compile(  # type: ignore[method-assign]
            decoder.step, fullgraph=True, dynamic=True, options=compile_options()
        )

    @property
    def _is_spread(self) -> bool:
        return any(isinstance(m, Experts) and type(m.dispatcher) is not Dispatcher for m in self.model.modules())

    @property
    def counts(self) -> GraphCounts:
        return GraphCounts.now().since(self._before)

    @torch.inference_mode()
    def warm_up(
        self,
        caches: list[LayerCache],
        page_size: int,
        *,
        impl: PagedImpl | None = None,
        max_sequences: int = 1,
        progress: bool = False,
    ) -> float:
        """Run one step of every kind; seconds it took. What is in the first pages of the caches is lost.

        `impl`: of `PagedBatch`. `max_sequences`: in a decode step; FlexAttention on CUDA has a graph per power of two.
        """
        started = time.monotonic()
        # Sizes that differ everywhere: what is equal by chance the compiler takes for equal.
        sizes = [1, 7, self._few + 5] if self._few else [1, 7]
        has_levels = [False, True] if self.model.config.num_deepstack_levels else [False]
        room = caches[0][0].shape[0] if caches else 0
        steps = [([min(size, room)], has_level) for has_level in has_levels for size in sizes]
        if impl == "flex":
            kinds = flex_kinds(caches[0][0].device.type, page_size, max_sequences)
            self.kinds |= kinds
            steps += [([1] * kind.num_blocks, False) for kind in kinds if kind.num_blocks > 1]
        weight = next(self.model.model.layers.parameters())
        dtypes = sorted({str(parameter.dtype) for parameter in self.model.parameters()})
        parts = sorted({type(module).__name__ for module in self.model.modules()})  # quantized ones have other names
        where = f"{dtypes} {weight.device} {impl} {page_size} {max_sequences}"
        what = f"decoder {self.model.config.text} {where} {parts}"
        bar = tqdm(steps, desc="compiling", file=sys.stderr, disable=not progress, leave=False)
        # Where experts are spread, a first run needs the other ranks: all of them compile at the same time.
        with nullcontext() if self._is_spread else first_alone(what), bar:
            for seq_lens, has_level in bar:
                self._run(seq_lens, has_level, caches, page_size, impl)
        if variable(GRAPHS) is not None:
            counts = self.counts
            logger.warning("graphs: %d of %d, breaks: %d", counts.graphs, len(self.kinds), counts.breaks)
        if variable(GRAPHS) == "fail":
            torch.compiler.set_stance("fail_on_recompile")
        return time.monotonic() - started

    def _run(
        self, seq_lens: list[int], has_level: bool, caches: list[LayerCache], page_size: int, impl: PagedImpl | None
    ) -> None:
        decoder, size = self.model.model, sum(seq_lens)
        device, dtype = decoder.embed_tokens.weight.device, decoder.embed_tokens.weight.dtype
        ids = torch.zeros(size, dtype=torch.int64, device=device)
        table = torch.arange(-(-max(seq_lens) // page_size)).expand(len(seq_lens), -1)
        deepstack = None
        if has_level:
            width = self.model.config.num_deepstack_levels * self.model.config.text.hidden_size
            deepstack = torch.zeros(size, width, dtype=dtype, device=device)
        batch = PagedBatch(seq_lens, seq_lens, table, page_size, caches, impl=impl)
        batch.dispatch_plan = DispatchPlan(padded_rows(size)) if self._is_spread else None
        self.model(ids, ids.expand(3, -1), batch, input_deepstack_embeds=deepstack)
