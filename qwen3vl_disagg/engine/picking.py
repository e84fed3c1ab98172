"""From a step's logits to what is told of answers: the token of each that comes next, and the end of those it ends."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from qwen3vl_disagg.core.requests import FinishReason, TokenLogprob
from qwen3vl_disagg.engine.failures import NotFinite
from qwen3vl_disagg.engine.grammars import PATIENCE_S
from qwen3vl_disagg.engine.masks import Mask
from qwen3vl_disagg.engine.sampler import Sampler
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.protocol.messages import Finished, Tokens

Pick = tuple[Sequence, int, TokenLogprob | None]
"""The token that comes next, and its logprobs where they are asked for."""
Broken = tuple[Sequence, Exception]
"""A request that cannot go on, and why."""


class Picker:
    """First `pick`, then `accept`. It changes sequences and their masks alone: pages and queues are the scheduler's."""

    def __init__(self, sampler: Sampler, *, eos_ids: frozenset[int], language_rank: int) -> None:
        self._sampler, self._eos_ids, self._language_rank = sampler, eos_ids, language_rank

    def pick(
        self, logits_BV: Tensor, batch: list[Sequence], on_late: Callable[[], None], *, is_alone: bool
    ) -> tuple[list[Pick], list[Broken]]:
        """The next token of each sequence, and those that have none because logits are not finite, a grammar cannot go
        on, or nothing may come. One whose mask is not there in time has none yet, and is in neither; `on_late` is
        called when it is there. `is_alone`: nobody else waits, neither a request nor a rank, so there is all time."""
        if not batch:
            return [], []
        deadline = None if is_alone else time.monotonic() + PATIENCE_S
        masks: list[Mask | None] = []
        broken: list[Broken] = []
        skipped: set[str] = set()
        for sequence in batch:
            mask = None
            try:
                if sequence.masks is not None and (mask := sequence.masks.take(deadline, on_late)) is None:
                    skipped.add(sequence.name)
                else:
                    mask = self._sampler.narrowed(sequence.sampling_row, mask, logits_BV.shape[1])
            except Exception as error:  # one request's grammar is not the batch's
                broken.append((sequence, error))
                skipped.add(sequence.name)
            masks.append(mask)
        token_ids, entries = self._sampler.sample(logits_BV, [s.sampling_row for s in batch], masks)
        rows = [row for row in zip(batch, token_ids, entries, strict=True) if row[0].name not in skipped]
        picks = [(sequence, token_id, entry) for sequence, token_id, entry in rows if token_id is not None]
        return picks, broken + [(sequence, NotFinite()) for sequence, token_id, _ in rows if token_id is None]

    def accept(self, picks: list[Pick]) -> list[Tokens | Finished]:
        """One more token for each sequence; the end of those that are done, which have a `finish_reason` then."""
        now = time.monotonic()
        events: list[Tokens | Finished] = []
        for sequence, token_id, entry in picks:
            if not sequence.generated:
                sequence.first_token_at = now
            sequence.generated.append(token_id)
            sequence.samples.begun()
            events.append(
                Tokens(
                    request_id=sequence.request_id,
                    sample=sequence.sample,
                    index=len(sequence.generated) - 1,
                    token_ids=[token_id],
                    logprobs=None if entry is None else [entry],
                    timings=sequence.timings(now, self._language_rank) if len(sequence.generated) == 1 else None,
                )
            )
            if token_id in self._eos_ids or token_id in sequence.sampling.stop_token_ids:
                sequence.finish_reason = "stop"
            elif len(sequence.generated) >= sequence.sampling.max_new_tokens:
                sequence.finish_reason = "length"
            if sequence.finish_reason:
                events.append(self.finished(sequence, sequence.finish_reason, now))
            elif sequence.masks is not None:
                sequence.masks.advance(token_id)
        return events

    def finished(self, sequence: Sequence, reason: FinishReason, now: float, vector: bytes = b"") -> Finished:
        return Finished(
            request_id=sequence.request_id,
            sample=sequence.sample,
            finish_reason=reason,
            timings=sequence.timings(now, self._language_rank),
            vector=vector,
        )
