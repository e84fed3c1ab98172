"""Log probabilities of a prompt's own tokens, of rows that prefill computes anyway: its token t gives those of t + 1.

They are of the raw distribution, as those of the answer. The head runs on a few rows at a time, so that no chunk's
logits are ever there as a whole. Tokens found in the prefix cache have no rows: who wants these takes nothing from it.

Dims: T packed tokens, D hidden size, R rows of a slice, V vocabulary, K of the most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3vl_disagg.core.tensors import uploaded
from qwen3vl_disagg.engine.sampler import logprobs
from qwen3vl_disagg.engine.scheduler import Chunk
from qwen3vl_disagg.protocol.messages import PromptLogprobs

MAX_LOGITS = 2**22
"""In a slice, of float32; what is made of them takes five times as much again."""
MAX_ROWS = 1024
"""In a slice, and so in a frame: 170 KiB with 20 alternatives."""


@dataclass(frozen=True)
class ScoredSlice:
    """Of the prompt's tokens from `first` on: their own, their ranks from 1, and of each the K most likely tokens."""

    chunk: Chunk
    first: int
    own_R: Tensor
    ranks_R: Tensor
    top_ids_RK: Tensor
    top_RK: Tensor

    def message(self) -> PromptLogprobs:
        own, top = (part.to(torch.float32).cpu().numpy().astype("<f4").tobytes() for part in (self.own_R, self.top_RK))
        ranks, top_ids = (part.to(torch.int32).cpu().numpy().astype("<i4") for part in (self.ranks_R, self.top_ids_RK))
        return PromptLogprobs(
            request_id=self.chunk.sequence.request_id,
            index=self.first,
            own=own,
            ranks=ranks.tobytes(),
            top_ids=top_ids.tobytes(),
            top=top,
        )


def score(
    x_TD: Tensor, chunks: Sequence[Chunk], head: Callable[[Tensor], Tensor], vocab_size: int
) -> Iterator[ScoredSlice]:
    """Those that the chunks, whose final hidden states stand behind one another in `x`, bring for the first time."""
    start, rows = 0, min(MAX_ROWS, max(1, MAX_LOGITS // vocab_size))
    for chunk in chunks:
        sequence, num_top = chunk.sequence, chunk.sequence.sampling.prompt_logprobs
        due = _due(chunk)
        targets_T = torch.tensor(sequence.token_ids[due.start : due.stop], dtype=torch.int64)
        first = start + due.start - 1 - chunk.start
        start += chunk.stop - chunk.start
        for low in range(0, len(due), rows):
            targets_R = uploaded(targets_T[low : low + rows], x_TD.device)
            logits_RV = head(x_TD[first + low : first + low + len(targets_R)]).float()
            row_numbers_R = torch.arange(len(targets_R), device=x_TD.device)
            own_R, top_ids, top = logprobs(logits_RV, targets_R, row_numbers_R, min(num_top or 0, logits_RV.shape[1]))
            ranks_R = (logits_RV > logits_RV.gather(1, targets_R[:, None])).sum(-1) + 1
            yield ScoredSlice(chunk, due.start + low, own_R, ranks_R, top_ids, top)


def _due(chunk: Chunk) -> range:
    """The prompt's tokens whose log probabilities are wanted, come of this chunk, and have not been told.

    A chunk [0, 64) of a prompt of 100 tokens gives 1 .. 64, and [64, 100) gives 65 .. 99.
    """
    sequence = chunk.sequence
    if not sequence.lacks_scores:
        return range(0)
    start = max(chunk.start + 1, sequence.num_scored)
    return range(start, max(start, min(chunk.stop + 1, sequence.num_prompt)))
