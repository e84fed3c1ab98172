"""Decode steps on CUDA as graphs: each captured once, when the engine is made, for one number of rows, then replayed
for that many and fewer.

A graph reads and writes memory that stays where it is. What differs from step to step goes up in one copy, and all else
(block lists, slots that are zeroed) follows from it on the device. Rows that are not needed are all the same one: a
token that stands alone in a spare page, which no sequence ever gets. Block lists are as wide as the longest context,
for the kernel reads as many entries as a row has pages; of that width only what a step needs goes up.

The model's part and the sampler's are graphs of their own, one behind the other without a wait: what a request asks of
the sampler may be no part of a graph, and then the sampler runs from Python on the same logits.

Dims: R rows of a graph, B of them in a step, W pages of the longest context, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen3vl_disagg.core.tensors import uploaded
from qwen3vl_disagg.engine.captured import StepInputs
from qwen3vl_disagg.engine.sampler import Sampler
from qwen3vl_disagg.engine.sampling import GREEDY_SETTINGS, SamplingRow
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.model import PagedBatch, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.attention import LayerCache
from qwen3vl_disagg.model.moe import Dispatcher, DispatchPlan, Experts, SparseMoe
from qwen3vl_disagg.parallel.sizes import padded_rows, step_sizes

logger = logging.getLogger(__name__)
_NUMBERS = 4
"""Of each row ahead of its pages: id, position, context, slot."""


class Graphs:
    """Of one kind of step, by number of rows, in memory of one `torch.cuda.graph_pool_handle`. Where there is none for
    the largest, the log says so, and there are fewer."""

    def __init__(
        self,
        what: str,
        sizes: Iterable[int],
        pool: Any,
        prepare: Callable[[int], None],
        step: Callable[[int], None],
        *,
        may_lack: bool = True,
    ) -> None:
        """`may_lack`: whether memory that does not suffice costs graphs, and not the process: other ranks that are
        within a step with this one would wait for it."""
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # Kernels of a graph keep the priority of this stream, whatever stream they are replayed on (`SharedGpu`).
        stream = torch.cuda.Stream(priority=-1)
        for size in sorted(sizes, reverse=True):
            try:
                prepare(size)
                step(size)  # what is made once for all steps: kernels, constants
                graph = torch.cuda.CUDAGraph()
                # Of this thread alone: another one may be at the tower's work.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    step(size)
            except torch.OutOfMemoryError:
                if not may_lack:
                    raise
                logger.warning("no memory to capture %s of %d rows: they run from Python", what, size)
                continue
            self._graphs[size] = graph
        self.sizes = sorted(self._graphs)

    def size_for(self, num_rows: int) -> int | None:
        """The least that is enough."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def replay(self, size: int) -> None:
        self._graphs[size].replay()


class RowInputs:
    """Of steps of R rows: `[4 + W, R]` int32 on the device, at one address for all R. Page tables stand in columns, so
    the pages of short contexts are the beginning of it."""

    def __init__(self, max_rows: int, width: int, page_size: int, spare_page: int, device: torch.device) -> None:
        self._host, self._width = StepInputs(max_rows, width, page_size), width
        self._memory = torch.zeros((_NUMBERS + width) * max_rows, dtype=torch.int32, device=device)
        self._spare = torch.zeros(_NUMBERS + width, 1, dtype=torch.int32)
        self._spare[2:5, 0] = torch.tensor([1, spare_page * page_size, spare_page])

    def fill(self, sequences: Seq[Sequence], num_rows: int, *, picked: tuple[Tensor, Seq[int]] | None = None) -> None:
        """Row b becomes the step of `sequences[b]`, those behind them the spare one. Waits for nothing.

        `picked`: it is the step behind the one whose tokens these are, on the device; that of row b stands at the place
        b of the list.
        """
        host, count = self._host, len(sequences)
        host.fill(sequences, ahead=int(picked is not None))
        height = _NUMBERS + max((len(sequence.pages) for sequence in sequences), default=1)
        up = torch.empty(height, num_rows, dtype=torch.int32, pin_memory=True)
        up[:, count:] = self._spare[:height]
        for row, numbers in enumerate((host.ids, host.positions, host.contexts, host.slots)):
            up[row, :count] = numbers[:count]
        up[_NUMBERS:, :count] = host.tables[:count, : height - _NUMBERS].T
        if picked is not None:
            up[0, :count] = torch.tensor(picked[1], dtype=torch.int32)
        self._memory[: up.numel()].copy_(up.view(-1), non_blocking=True)
        if picked is not None:
            ids_R = self._memory[:num_rows]
            ids_R.copy_(picked[0].index_select(0, ids_R))

    def of(self, num_rows: int) -> Tensor:
        """`[4 + W, R]`."""
        return self._memory[: (_NUMBERS + self._width) * num_rows].view(-1, num_rows)


class GraphedDecode:
    """One token more for some sequences, by graphs. `logits_BV` are the last step's.

    The last page of `caches` is the spare one. Where experts are spread over ranks, a graph is for the number of rows
    that all have agreed on.
    """

    def __init__(
        self,
        model: Qwen3MoeForCausalLMWithDeepStack,
        caches: Seq[LayerCache],
        page_size: int,
        sizes: Seq[int],
        *,
        is_spread: bool,
    ) -> None:
        weight, text = model.model.embed_tokens.weight, model.config.text
        self._model, self._caches, self._page_size, self._is_spread = model, caches, page_size, is_spread
        spare = len(caches[0][0]) // page_size - 1
        width = max(2, min(spare, -(-text.max_position_embeddings // page_size)))
        self._inputs = RowInputs(max(sizes), width, page_size, spare, weight.device)
        self._logits_RV = torch.zeros(max(sizes), text.vocab_size, dtype=weight.dtype, device=weight.device)
        self.pool = torch.cuda.graph_pool_handle()
        prepare = partial(self._inputs.fill, ())
        self.graphs = Graphs("decode steps", sizes, self.pool, prepare, self._step, may_lack=not is_spread)
        self.logits_BV = self._logits_RV[:0]
        self.num_rows = 0
        self.places: Seq[int] = ()
        """Rows of the last step that are asked for: those of `logits_BV`."""

    @property
    def sizes(self) -> list[int]:
        return self.graphs.sizes

    def logits_of(self, num_rows: int) -> Tensor:
        """`[R, V]`, where all graphs of the model leave them."""
        return self._logits_RV[:num_rows]

    def _step(self, num_rows: int) -> None:
        inputs = self._inputs.of(num_rows)
        # Each in memory of its own, which begins where compiled code wants it.
        ids, positions, contexts, slots = (row.long() for row in inputs[:_NUMBERS].unbind(0))
        batch = PagedBatch.of_tensors(contexts, inputs[_NUMBERS:].T, slots, self._page_size, self._caches)
        batch.dispatch_plan = DispatchPlan(num_rows) if self._is_spread else None
        self._logits_RV[:num_rows].copy_(self._model(ids, positions.expand(3, -1), batch))

    def size_for(self, num_sequences: int, plan: DispatchPlan | None) -> int | None:
        """The rows of the graph for so many sequences; None where there is none."""
        if plan is None:
            return None if self._is_spread else self.graphs.size_for(num_sequences)
        is_there = plan.kind == "gather" and plan.num_rows in self.sizes and num_sequences <= plan.num_rows
        return plan.num_rows if is_there else None

    def run(self, sequences: Seq[Sequence], num_rows: int) -> Tensor:
        """Logits `[B, V]`, which stand until the next run."""
        self._inputs.fill(sequences, num_rows)
        self.graphs.replay(num_rows)
        return self.logits(range(len(sequences)), num_rows)

    def run_behind(self, sequences: Seq[Sequence], num_rows: int, picked_R: Tensor, places: Seq[int]) -> None:
        """The step behind the last one, of some of its rows: `places` among the tokens that were picked for it."""
        self._inputs.fill(sequences, num_rows, picked=(picked_R, places))
        self.graphs.replay(num_rows)

    def logits(self, places: Seq[int], num_rows: int) -> Tensor:
        """Of these rows of the last step, which was one of so many."""
        self.num_rows, self.places = num_rows, places
        is_all = list(places) == list(range(len(places)))
        rows = self._logits_RV[: len(places)]
        self.logits_BV = rows if is_all else self._logits_RV[uploaded(torch.tensor(places), rows.device)]
        return self.logits_BV


class GraphedPick:
    """The sampler behind captured steps, captured too: one graph of each size for rows that are all greedy, another
    where some are drawn."""

    meanwhile: Callable[[], None] | None = None
    """Called when a step's tokens are on their way to the host, which has not waited for them."""

    @torch.inference_mode()
    def __init__(self, sampler: Sampler, decode: GraphedDecode) -> None:
        self._sampler, self._decode = sampler, decode
        most, device = max(decode.sizes), decode.logits_of(1).device
        self._settings = torch.zeros(6 * most, dtype=torch.float64, device=device)
        self._picked = torch.zeros(2 * most, dtype=torch.float64, device=device)
        steps = {draws: partial(self._step, draws=draws) for draws in (True, False)}
        prepare = partial(self._fill, ())
        self._graphs = {
            draws: Graphs("picks of tokens", decode.sizes, decode.pool, prepare, step) for draws, step in steps.items()
        }

    def _step(self, num_rows: int, *, draws: bool) -> None:
        settings_6R = self._settings[: 6 * num_rows].view(6, num_rows)
        picked = self._sampler.run_few(self._decode.logits_of(num_rows), settings_6R, draws=draws)
        self._picked[: 2 * num_rows].copy_(picked)

    def _fill(self, rows: Seq[SamplingRow], num_rows: int) -> None:
        settings: list[tuple[float, ...]] = [GREEDY_SETTINGS] * num_rows
        for place, row in zip(self._decode.places, rows, strict=True):
            settings[place] = row.few_settings
        up = torch.tensor(settings, dtype=torch.float64).T.contiguous().view(-1).pin_memory()
        self._settings[: up.numel()].copy_(up, non_blocking=True)

    @property
    def picked_R(self) -> Tensor:
        """Token ids of the last step's rows, float64."""
        num_rows = self._decode.num_rows
        return self._picked[num_rows : 2 * num_rows]

    def takes(self, logits_BV: Tensor, rows: Seq[SamplingRow]) -> bool:
        is_known = logits_BV is self._decode.logits_BV and all(row.needs_few for row in rows)
        return is_known and self._decode.num_rows in self._graphs[_draws(rows)].sizes

    @torch.inference_mode()
    def ids(self, rows: Seq[SamplingRow]) -> list[int | None]:
        num_rows, places = self._decode.num_rows, self._decode.places
        self._fill(rows, num_rows)
        self._graphs[_draws(rows)].replay(num_rows)
        came = torch.empty(2 * num_rows, dtype=torch.float64, pin_memory=True)
        came.copy_(self._picked[: 2 * num_rows], non_blocking=True)
        is_here = torch.cuda.Event()
        is_here.record()
        if self.meanwhile is not None:
            self.meanwhile()
        is_here.synchronize()  # the step's only wait for the device
        values = came.tolist()
        return [int(values[num_rows + place]) if values[place] else None for place in places]


def _draws(rows: Seq[SamplingRow]) -> bool:
    return not all(row.is_greedy for row in rows)


def why_not_captured(model: Qwen3MoeForCausalLMWithDeepStack) -> str | None:
    """What a graph cannot hold of this model's steps, whatever their size."""
    experts = [part for part in model.modules() if isinstance(part, Experts)]
    if any(not part.dispatcher.can_capture for part in experts):
        return "experts are spread over ranks by Gloo, whose exchanges the host makes"
    return None


@torch.inference_mode()
def capture(
    model: Qwen3MoeForCausalLMWithDeepStack, caches: Seq[LayerCache], page_size: int, *, max_running: int
) -> GraphedDecode | None:
    """Graphs for up to `max_running` sequences, whose last page of `caches` nobody else uses; None, and a line of the
    log that says why, where there are none."""
    problem = why_not_captured(model)
    parts = list(model.modules())
    is_spread = any(isinstance(part, Experts) and type(part.dispatcher) is not Dispatcher for part in parts)
    sizes = step_sizes(max_running)
    if is_spread:
        sizes = sorted({padded_rows(size) for size in range(1, max_running + 1)})
    dtype = model.model.embed_tokens.weight.dtype
    waiting = [size for size in sizes if any(isinstance(part, SparseMoe) and part.waits(size, dtype) for part in parts)]
    sizes = [size for size in sizes if size not in waiting]
    if problem is None and waiting:
        most = max(sizes, default=0)
        logger.info("decode steps of more than %d rows are not captured: experts wait for the device", most)
    if problem is not None or not sizes:
        logger.info("decode steps are not captured: %s", problem or "experts wait for the device")
        return None
    made = GraphedDecode(model, caches, page_size, sizes, is_spread=is_spread)
    return made if made.sizes else None
