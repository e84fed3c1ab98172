"""From logits to tokens. Each request brings its own generator, so its tokens do not depend on its neighbours.

Dims: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qwen3vl_disagg.core.requests import SamplingParams, TokenLogprob


def filter_logits(logits_V: Tensor, sampling: SamplingParams) -> Tensor:
    """Temperature, then top-k, then top-p, in float32; removed tokens get -inf.

    Top-p keeps the smallest set of most likely tokens whose probability reaches p, at least one.
    """
    logits_V = logits_V.float() / sampling.temperature
    if 0 < sampling.top_k < logits_V.shape[-1]:
        kth = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, float("-inf"))
    if sampling.top_p < 1.0:
        sorted_V, order_V = logits_V.sort(descending=True)
        probs_V = sorted_V.softmax(-1)
        mass_before_V = probs_V.cumsum(-1) - probs_V
        drop_V = torch.zeros_like(order_V, dtype=torch.bool).scatter(0, order_V, mass_before_V >= sampling.top_p)
        logits_V = logits_V.masked_fill(drop_V, float("-inf"))
    return logits_V


class Sampler:
    """Picks one token for each sequence.

    `banned_ids` are never picked (placeholders a model may not write), `eos_ids` not by requests that ignore them.
    """

    def __init__(self, *, banned_ids: Iterable[int], eos_ids: Iterable[int]) -> None:
        self.banned_ids, self.eos_ids = sorted(set(banned_ids)), sorted(set(eos_ids))

    def sample(
        self, logits_BV: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """Token ids and, where asked for, logprobs of the raw distribution.

        One transfer to the host for the whole batch: the next step's input and the answer both need the ids there.
        """
        logits_BV = logits_BV.float().cpu()
        logprobs_BV = logits_BV.log_softmax(-1) if any(p.logprobs is not None for p in params) else None
        if not torch.isfinite(logits_BV).all():
            raise ValueError("the model's logits are not finite")
        ids: list[int] = []
        entries: list[TokenLogprob | None] = []
        for b, (sampling, generator) in enumerate(zip(params, generators, strict=True)):
            masked_V = logits_BV[b].clone()
            masked_V[self.banned_ids + (self.eos_ids if sampling.ignore_eos else [])] = float("-inf")
            if sampling.temperature == 0:
                token_id = int(masked_V.argmax())
            else:
                probs_V = filter_logits(masked_V, sampling).softmax(-1)
                token_id = int(torch.multinomial(probs_V, 1, generator=generator))
            ids.append(token_id)
            entries.append(None)
            if sampling.logprobs is not None and logprobs_BV is not None:
                values, indexes = logprobs_BV[b].topk(min(sampling.logprobs, logprobs_BV.shape[1]))
                top = list(zip(indexes.tolist(), values.tolist(), strict=True))
                entries[b] = TokenLogprob(token_id, float(logprobs_BV[b, token_id]), top)
        return ids, entries
