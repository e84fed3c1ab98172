"""The model on its device: key-value pools, and batches of sequences turned into tensors.

Dims: T packed tokens, B sequences, h hidden size, n DeepStack levels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qwen3vl_disagg.core.environment import CAPTURE, variable
from qwen3vl_disagg.core.errors import ServerError
from qwen3vl_disagg.core.host import keep_freed_memory
from qwen3vl_disagg.core.tensors import TouchedAhead, lazy_zeros, uploaded
from qwen3vl_disagg.engine.captured import CapturedDecode, record
from qwen3vl_disagg.engine.compiled import CompiledDecoder
from qwen3vl_disagg.engine.graphs import GraphedDecode, capture
from qwen3vl_disagg.engine.page_tables import PageTables
from qwen3vl_disagg.engine.prompt_logprobs import ScoredSlice, score
from qwen3vl_disagg.engine.scheduler import Chunk
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.kernels.ops import HEAD_SIZES
from qwen3vl_disagg.model import PagedBatch, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.attention import LayerCache
from qwen3vl_disagg.model.flex import why_not_flex
from qwen3vl_disagg.model.moe import DispatchPlan
from qwen3vl_disagg.model.paged import PagedImpl

AttentionChoice = Literal["auto", "sdpa", "kernel", "flex"]


class BadRows(ServerError):
    """An item's rows are not what its sequence needs."""

    def __init__(self, sequence: Sequence, message: str, param: str) -> None:
        super().__init__(message, code="engine_error")
        self.sequence, self.param = sequence, param


class Prefilled(NamedTuple):
    """Of chunks, in their order: logits `[L, V]` of those that end a prompt to be answered, final hidden states
    `[P, D]` of those that end one to be pooled, whether each of the others is sound, bool, and the log probabilities of
    their own tokens that are wanted.

    Sound: what the pages hold of it is finite. A number that is not, in the row of a token, stays there through all
    later layers, so the last layer's keys and values show it; what becomes of a row after them is never read.
    Logits show the same, as the last token attends to all keys and values.
    """

    logits: Tensor
    pooled: Tensor
    is_sound: Tensor
    scores: list[ScoredSlice]


def resolve_attention(
    choice: AttentionChoice, device: torch.device, *, compile: bool, page_size: int, head_dim: int
) -> PagedImpl | None:
    """How attention is computed, None where that is decided by dtype. ValueError for what the device cannot do."""
    problem = why_not_flex(device, page_size, head_dim)
    if choice == "auto":
        if device.type != "cuda":
            return None
        return "flex" if compile and problem is None else "sdpa"
    if choice == "flex" and problem is not None:
        raise ValueError(problem)
    if choice == "kernel" and device.type != "cpu":
        raise ValueError(f"the kernels run on CPU, the model is on {device.type}")
    if choice == "kernel" and head_dim not in HEAD_SIZES:
        raise ValueError(f"the attention kernels take heads of {HEAD_SIZES}, not {head_dim}")
    return choice


class ModelRunner:
    """Runs prefill and decode of packed sequences over a page pool. Keys and values have the model's dtype.

    `max_running`: sequences in a decode step; graphs are made for so many at the start.
    """

    def __init__(
        self,
        model: Qwen3MoeForCausalLMWithDeepStack,
        *,
        num_pages: int,
        page_size: int,
        attention: AttentionChoice = "auto",
        max_running: int = 1,
        compile: bool = False,
        progress: bool = False,
    ) -> None:
        self.model = model
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.page_size, self.num_pages, self.max_running = page_size, num_pages, max(max_running, 1)
        text = model.config.text
        self.impl = resolve_attention(
            attention, self.device, compile=compile, page_size=page_size, head_dim=text.head_dim
        )
        may_capture = variable(CAPTURE) != "off"
        has_graphs = may_capture and compile and self.impl == "flex" and self.device.type == "cuda"
        # Behind those that are handed out, one page for the rows of graphs that a step does not need.
        shape = ((num_pages + has_graphs) * page_size, text.num_key_value_heads, text.head_dim)
        self._tables = PageTables(self.max_running, num_pages)
        self._pools = [lazy_zeros(shape, self.dtype, self.device) for _ in range(2 * text.num_hidden_layers)]
        self.caches: list[LayerCache] = list(zip(self._pools[::2], self._pools[1::2], strict=True))
        self._ahead = TouchedAhead(self._pools)
        self.compiled = CompiledDecoder(model) if compile else None
        if self.compiled is not None:
            self.compiled.warm_up(self.caches, page_size, impl=self.impl, max_sequences=max_running, progress=progress)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.captured: CapturedDecode | GraphedDecode | None = None
        if has_graphs:
            self.captured = capture(model, self.caches, page_size, max_running=self.max_running)
        elif may_capture and not compile and self.impl in (None, "kernel"):
            self.captured = record(model, self.caches, page_size, max_running=max_running)

    @torch.inference_mode()
    def take_part(self, plan: DispatchPlan) -> None:
        """A step of other ranks, in which this one has nothing to run."""
        self.model.model.take_part(plan)

    @torch.inference_mode()
    def prefill(self, chunks: Seq[Chunk], plan: DispatchPlan | None = None) -> Prefilled:
        """Pieces of prompts. `plan`: where experts are spread."""
        sequences = [chunk.sequence for chunk in chunks]
        ids = [i for chunk in chunks for i in chunk.sequence.tokens(chunk.start, chunk.stop)]
        ids_T = self._upload(ids)
        positions = torch.cat([c.sequence.positions_of(c.start, c.stop) for c in chunks], dim=1)
        positions = uploaded(positions, self.device)
        embeds, deepstack = self._splice(ids_T, chunks)
        batch = self._batch(sequences, [c.stop - c.start for c in chunks], [c.stop for c in chunks], plan)
        self._ahead.reached(max(c.sequence.pages[(c.stop - 1) // self.page_size] + 1 for c in chunks) * self.page_size)
        x_TD = self.model.model(ids_T, positions, batch, embeds, input_deepstack_embeds=deepstack)
        x_BD = batch.select(x_TD)
        scores = list(score(x_TD, chunks, self.model.lm_head, self.model.config.text.vocab_size))
        slots_B = uploaded(batch.new_slots_T, self.device).split(batch.seq_lens)
        is_sound = [
            torch.stack([pool[slots].isfinite().all() for pool in self.caches[-1]]).all()
            for slots, chunk in zip(slots_B, chunks, strict=True)
            if not chunk.is_last
        ]
        ends = [number for number, chunk in enumerate(chunks) if chunk.is_last]
        answered = [number for number in ends if sequences[number].sampling.pooling is None]
        pooled = [number for number in ends if sequences[number].sampling.pooling is not None]
        logits = self.model.lm_head(x_BD if len(answered) == len(chunks) else x_BD[self._upload(answered)])
        sound = torch.stack(is_sound) if is_sound else ids_T.new_empty(0, dtype=torch.bool)
        return Prefilled(logits, x_BD[self._upload(pooled)], sound, scores)

    @torch.inference_mode()
    def clear(self, pages: Seq[int]) -> None:
        """Forget the keys and values of these pages."""
        pages_P = self._upload(pages)
        for pool in self._pools:
            pool.unflatten(0, (-1, self.page_size)).index_fill_(0, pages_P, 0)

    @torch.inference_mode()
    def copy(self, source: int, target: int, count: int) -> None:
        """The first `count` tokens of a page, to the beginning of another."""
        for pool in self._pools:
            pages = pool.unflatten(0, (-1, self.page_size))
            pages[target, :count] = pages[source, :count]

    @torch.inference_mode()
    def decode(self, sequences: Seq[Sequence], plan: DispatchPlan | None = None) -> Tensor:
        """The last token of each sequence -> logits `[B, V]`, which stand until the next step."""
        if self.captured is not None:
            num_rows = self.captured.size_for(len(sequences), plan)
            if num_rows is not None:
                return self.captured.run(sequences, num_rows)
        contexts = [s.num_cached + 1 for s in sequences]
        ids_T = self._upload([s.generated[-1] for s in sequences])
        next_position = self._upload([s.num_cached + s.delta for s in sequences])
        batch = self._batch(sequences, [1] * len(sequences), contexts, plan)
        return self.model(ids_T, next_position.expand(3, -1), batch)

    def _upload(self, numbers: Seq[int]) -> Tensor:
        return uploaded(torch.tensor(numbers, dtype=torch.int64), self.device)

    def _batch(
        self, sequences: Seq[Sequence], seq_lens: list[int], context_lens: list[int], plan: DispatchPlan | None
    ) -> PagedBatch:
        batch = PagedBatch(
            seq_lens,
            context_lens,
            self._tables.of(sequences),
            self.page_size,
            self.caches,
            impl=self.impl,
            is_compiled=self.compiled is not None,
        )
        batch.dispatch_plan = plan
        return batch

    def _splice(self, ids_T: Tensor, chunks: Seq[Chunk]) -> tuple[Tensor | None, Tensor | None]:
        """input_embeds `[T, h]` and input_deepstack_embeds `[T, n * h]`; None, None for text alone."""
        touched = [chunk.sequence.touched(chunk.start, chunk.stop) for chunk in chunks]
        if not any(touched):
            return None, None
        embeds = self.model.model.embed_tokens(ids_T)
        width = self.model.model.num_deepstack_levels * embeds.shape[1]
        deepstack = embeds.new_zeros(len(ids_T), width)
        start = 0
        for chunk, items in zip(chunks, touched, strict=True):
            for index, low, high in items:
                item, rows = chunk.sequence.items[index], chunk.sequence.rows.get(index)
                try:
                    if rows is None:
                        raise ValueError("no rows are here")
                    for first, stop, token in item.stretches(low, high):
                        where = slice(start + token - chunk.start, start + token - chunk.start + stop - first)
                        rows.write(first, stop, embeds[where], deepstack[where])
                except (ValueError, RuntimeError) as error:
                    problem = f"item {index}, rows {low} to {high}: {error}"
                    raise BadRows(chunk.sequence, problem, item.param) from error
            start += chunk.stop - chunk.start
        return embeds, deepstack
