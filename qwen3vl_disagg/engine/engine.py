"""The engine: requests in, visual rows in, tokens out, one step at a time. Single-threaded; it never waits."""

from __future__ import annotations

import secrets
import time
import traceback
from dataclasses import dataclass

import torch

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams, VisualItem
from qwen3vl_disagg.disagg.messages import Finished, NeedItems, RequestFailed, Tokens
from qwen3vl_disagg.engine.pages import PagePool
from qwen3vl_disagg.engine.runner import ModelRunner
from qwen3vl_disagg.engine.sampler import Sampler
from qwen3vl_disagg.engine.scheduler import Scheduler
from qwen3vl_disagg.engine.sequence import ItemRows, Sequence
from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.processing import mrope_positions

EngineEvent = NeedItems | Tokens | Finished | RequestFailed


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes of the engine. `kv_cache_gib`: memory for keys and values; the pool is never larger than the longest
    context for each running request needs."""

    max_running: int = 32
    max_prefill_tokens: int = 4096
    page_size: int = 16
    kv_cache_gib: float = 1.0

    def num_pages(self, model: Qwen3MoeForCausalLMWithDeepStack, kv_itemsize: int) -> int:
        text = model.config.text
        token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * kv_itemsize
        affordable = int(self.kv_cache_gib * 2**30) // (token_bytes * self.page_size)
        useful = self.max_running * -(-text.max_position_embeddings // self.page_size)
        return max(1, min(affordable, useful))


class Engine:
    """Continuous batching of whole prompts over one model.

    `add` a request; when `step` says NeedItems, bring each item's rows with `provide_item`; `step` returns tokens and
    the end of each request. `cancel` at any time. What `step` returns are the messages a language rank sends on.
    """

    def __init__(
        self,
        model: Qwen3MoeForCausalLMWithDeepStack,
        *,
        eos_ids: frozenset[int],
        options: EngineOptions | None = None,
        language_rank: int = 0,
    ) -> None:
        self.config, self.eos_ids, self.language_rank = model.config, eos_ids, language_rank
        self.options = options or EngineOptions()
        on_cpu = model.model.embed_tokens.weight.device.type == "cpu"
        itemsize = 4 if on_cpu else model.model.embed_tokens.weight.itemsize
        pool = PagePool(self.options.num_pages(model, itemsize), self.options.page_size)
        self.runner = ModelRunner(model, num_pages=pool.num_pages, page_size=pool.page_size)
        self.scheduler = Scheduler(
            pool, max_running=self.options.max_running, max_prefill_tokens=self.options.max_prefill_tokens
        )
        banned = (self.config.image_token_id, self.config.video_token_id)
        self.sampler = Sampler(banned_ids=banned, eos_ids=eos_ids)

    @property
    def has_work(self) -> bool:
        """Whether `step` could do something now (not: whether requests wait for their items)."""
        return self.scheduler.has_step

    @property
    def is_empty(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.admitted

    def add(self, request_id: str, token_ids: list[int], items: list[VisualItem], sampling: SamplingParams) -> None:
        """Queue a request. InputError if it can never run."""
        text = self.config.text
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= text.vocab_size:
            raise InputError(f"token ids must be in 0..{text.vocab_size - 1} and at least one", param="messages")
        if len(token_ids) + sampling.max_new_tokens > text.max_position_embeddings:
            raise InputError(
                f"prompt of {len(token_ids)} tokens with {sampling.max_new_tokens} new ones is longer than the "
                f"context of {text.max_position_embeddings}",
                param="messages",
            )
        self._check_placeholders(token_ids, items)
        positions, delta = mrope_positions(len(token_ids), items, self.config.vision.spatial_merge_size)
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        sequence = Sequence(
            request_id=request_id,
            token_ids=token_ids,
            items=items,
            sampling=sampling,
            positions=positions,
            delta=delta,
            generator=torch.Generator().manual_seed(seed),
        )
        self.scheduler.add(sequence)

    def _check_placeholders(self, token_ids: list[int], items: list[VisualItem]) -> None:
        kinds = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        ranges = [(item.offset, item.offset + item.num_rows, kinds[item.modality]) for item in items]
        num_pads = sum(token_ids.count(kind) for kind in kinds.values())
        if num_pads != sum(stop - start for start, stop, _ in ranges) or any(
            token_ids[start:stop].count(kind) != stop - start for start, stop, kind in ranges
        ):
            raise InputError(f"{num_pads} placeholders in the prompt do not match the items at {ranges}")

    def provide_item(self, request_id: str, index: int, rows: ItemRows, timings: ItemTimings) -> None:
        """The rows of one item are here. Unknown requests are ignored: they were cancelled meanwhile."""
        sequence = self.scheduler.admitted.get(request_id)
        if sequence is None or index in sequence.rows:
            return
        sequence.rows[index] = rows
        sequence.item_timings[index] = timings
        if sequence.has_all_items:
            sequence.items_at = time.monotonic()

    def cancel(self, request_id: str) -> None:
        """Forget a request, if it is known."""
        self.scheduler.remove(request_id)

    def step(self) -> list[EngineEvent]:
        """Admit what fits and run one batch. A failure of the batch fails its requests alone."""
        events: list[EngineEvent] = []
        for sequence in self.scheduler.admit():
            sequence.admitted_at = time.monotonic()
            if sequence.items:
                events.append(NeedItems(request_id=sequence.request_id, items=list(range(len(sequence.items)))))
            else:
                sequence.items_at = sequence.admitted_at
        step = self.scheduler.schedule()
        if step is None:
            return events
        batch = step.prefill or step.decode
        try:
            logits = self.runner.prefill(batch) if step.prefill else self.runner.decode(batch)
            token_ids, entries = self.sampler.sample(logits, [s.sampling for s in batch], [s.generator for s in batch])
        except (RuntimeError, ValueError) as error:
            return events + self._fail(batch, error)
        now = time.monotonic()
        for sequence, token_id, entry in zip(batch, token_ids, entries, strict=True):
            if step.prefill:
                sequence.num_cached = sequence.num_prompt
                sequence.first_token_at = now
                sequence.rows.clear()
            else:
                sequence.num_cached += 1
            sequence.generated.append(token_id)
            events.append(
                Tokens(
                    request_id=sequence.request_id,
                    index=len(sequence.generated) - 1,
                    token_ids=[token_id],
                    logprobs=None if entry is None else [entry],
                )
            )
            if token_id in self.eos_ids:
                sequence.finish_reason = "stop"
            elif len(sequence.generated) >= sequence.sampling.max_new_tokens:
                sequence.finish_reason = "length"
            if sequence.finish_reason:
                self.scheduler.remove(sequence.request_id)
                timings = sequence.timings(now, self.language_rank)
                events.append(
                    Finished(request_id=sequence.request_id, finish_reason=sequence.finish_reason, timings=timings)
                )
        return events

    def _fail(self, batch: list[Sequence], error: Exception) -> list[EngineEvent]:
        """End a batch that could not run. The cause goes to the log; clients get no internals."""
        if not isinstance(error, InputError):
            traceback.print_exception(error)
            error = InputError("the language model failed on this request", status=500, code="engine_error")
        for sequence in batch:
            self.scheduler.remove(sequence.request_id)
        return [
            RequestFailed(request_id=s.request_id, code=error.code, status=error.status, message=error.message)
            for s in batch
        ]
