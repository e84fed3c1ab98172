"""A decode step over buffers that stay where they are: captured once, then replayed for any number of rows.

What differs from step to step (tokens, positions, page tables, contexts, slots) are contents of buffers, so nothing is
captured again. On a CPU it is a tape of kernel calls; the eager step is its reference, and takes what it does not.

Dims: R rows at most, B of them in a step, W pages of the longest context, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import torch
from torch import Tensor

from qwen3vl_disagg.engine.page_tables import PageTables
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.kernels.calls import NotRecordable, Tape
from qwen3vl_disagg.kernels.ops import MAX_LINEAR_ROWS, has_kernels
from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.attention import LayerCache
from qwen3vl_disagg.model.moe import DispatchPlan
from qwen3vl_disagg.model.paged import DecodeBatch, PagedPlaces

logger = logging.getLogger(__name__)


class StepInputs:
    """Of decode steps: ids, positions, contexts and slots `[R]`, page tables `[R, W]`, int64 on the host."""

    def __init__(self, max_rows: int, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.ids, self.positions, self.contexts, self.slots = torch.zeros(4, max_rows, dtype=torch.int64).unbind(0)
        # The same memory: writing a few numbers costs a tenth.
        self._arrays = [x.numpy() for x in (self.ids, self.positions, self.contexts, self.slots)]
        self._tables = PageTables(max_rows, num_pages)
        self.tables = self._tables.table

    def fill(self, sequences: Seq[Sequence], *, ahead: int = 0) -> None:
        """Row b becomes the step of `sequences[b]`: its last token comes behind what is in the cache, and behind
        `ahead` tokens more."""
        size, num_rows = self.page_size, len(sequences)
        places = [s.num_cached + ahead for s in sequences]
        columns = (
            [s.generated[-1] for s in sequences],
            [place + s.delta for place, s in zip(places, sequences, strict=True)],
            [place + 1 for place in places],
            [s.pages[place // size] * size + place % size for place, s in zip(places, sequences, strict=True)],
        )
        for array, column in zip(self._arrays, columns, strict=True):
            array[:num_rows] = column
        self._tables.fill(sequences)


class CapturedDecode:
    """One token more for up to `max_rows` sequences. `replay(B)` computes the logits of B rows of `inputs`."""

    def __init__(self, max_rows: int, inputs: StepInputs, logits_RV: Tensor, replay: Callable[[int], None]) -> None:
        self.max_rows, self.inputs, self.logits_RV, self.replay = max_rows, inputs, logits_RV, replay

    def size_for(self, num_sequences: int, plan: DispatchPlan | None) -> int | None:
        """The rows to run for so many sequences; None where there are too many, or experts of other ranks."""
        return num_sequences if plan is None and num_sequences <= self.max_rows else None

    def run(self, sequences: Seq[Sequence], num_rows: int) -> Tensor:
        """Logits `[B, V]`, which stand until the next run."""
        self.inputs.fill(sequences)
        self.replay(num_rows)
        return self.logits_RV[: len(sequences)]


@torch.inference_mode()
def record(
    model: Qwen3MoeForCausalLMWithDeepStack, caches: Seq[LayerCache], page_size: int, *, max_running: int
) -> CapturedDecode | None:
    """A tape of the model's step, for as many rows as the kernels of few rows take; None where the step has parts that
    no kernel computes. What is in the first slots of the caches is lost."""
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not has_kernels():
        return None
    num_slots = len(caches[0][0])
    max_rows = min(max_running, MAX_LINEAR_ROWS, num_slots)
    inputs = StepInputs(max_rows, num_slots // page_size, page_size)
    inputs.contexts.fill_(1)
    torch.arange(max_rows, out=inputs.slots)

    def prepare(num_rows: int) -> Callable[[], Tensor]:
        parts = (inputs.contexts, inputs.tables, inputs.slots, inputs.ids, inputs.positions)
        contexts, tables, slots, ids, positions = (part[:num_rows] for part in parts)
        ones = torch.ones(num_rows, dtype=torch.int64)
        batch = DecodeBatch(PagedPlaces(ones, contexts, tables, slots, page_size, weight.device), caches)
        return partial(model, ids, positions.expand(3, -1), batch)

    tape = Tape(max_rows)
    step = prepare(max_rows)
    try:
        prepare(1)()  # what is computed once for all steps
        with tape.record():
            logits_RV = step()
    except (NotRecordable, ValueError) as error:
        logger.info("decode steps are not captured: %s", error)
        return None
    return CapturedDecode(max_rows, inputs, logits_RV, tape.run)
