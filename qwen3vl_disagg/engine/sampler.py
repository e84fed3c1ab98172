"""From logits to tokens, all rows of a batch at once, on the logits' device.

The steps, in the order of vLLM's sampler (v1/sample/sampler.py), whose filters come in transformers' order:

1. logprobs, for those who want them, from the raw logits
2. logit bias, then the penalties: repetition, frequency, presence
3. bans: placeholders always, end tokens where they are ignored or come too early, and what a grammar or the request
   itself does not let come
4. greedy rows: the largest logit
5. the others: temperature, top-k, top-p, min-p; then the request's one random number picks from what is left

A row's result does not depend on the other rows, not by a bit. Elementwise operations have no neighbours; sums do,
where their order follows the batch's shape. So there are no sums of floats here: a probability is its ratio to the
largest one in units of 2**-40, a whole number, and whole numbers can be added up in any order. (The model's own logits
may differ in their last bits between batches of different sizes; that is not the sampler's to mend.)

Dims: B rows, S sampled rows, R rows with logprobs, V vocabulary, K sorted logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from qwen3vl_disagg.core.requests import SamplingParams, TokenLogprob
from qwen3vl_disagg.core.tensors import uploaded
from qwen3vl_disagg.engine.allowed import AllowedTokens
from qwen3vl_disagg.engine.masks import Mask
from qwen3vl_disagg.engine.penalties import Penalties, upload
from qwen3vl_disagg.engine.sampling import FEW, SamplingPlan, SamplingRow, SortedRows
from qwen3vl_disagg.kernels.ops import can_take_largest, largest

ONE = 2**40
"""Weight of the most likely token. 2**22 of these fit into 62 bits."""
_SORT_ALL_FROM = 0.25
"""Share of the vocabulary from which on a whole sort is cheaper than a search for the largest."""


class CapturedPick(Protocol):
    """Picks from the logits of a captured step, itself captured."""

    def takes(self, logits_BV: Tensor, rows: Sequence[SamplingRow]) -> bool:
        """Whether these are the logits, and it can do what the rows ask for."""
        ...

    def ids(self, rows: Sequence[SamplingRow]) -> list[int | None]:
        """As `Sampler.sample`. Waits for the device, once."""
        ...


class Sampler:
    """Picks one token for each row.

    `banned_ids` are never picked (placeholders a model may not write), `eos_ids` not by requests that ignore them or
    must be longer.
    """

    def __init__(self, *, banned_ids: Iterable[int], eos_ids: Iterable[int]) -> None:
        self.banned_ids, self.eos_ids = sorted(set(banned_ids)), sorted(set(eos_ids))
        self._banned, self._eos = (torch.tensor(ids, dtype=torch.long) for ids in (self.banned_ids, self.eos_ids))
        self.captured: CapturedPick | None = None
        self._penalties = Penalties()
        self._allowed: WeakKeyDictionary[object, AllowedTokens] = WeakKeyDictionary()

    def narrowed(self, row: SamplingRow, grammar: Mask | None, vocab_size: int) -> Mask | None:
        """Which tokens may come in this row, None for all; `grammar`: those that its grammar lets come. InputError
        where that leaves none."""
        if not row.is_narrowed:
            return grammar
        whose = row.request or row
        allowed = self._allowed.get(whose)
        if allowed is None:
            ids = {"banned_ids": self.banned_ids, "eos_ids": self.eos_ids}
            self._allowed[whose] = allowed = AllowedTokens(row.params, vocab_size=vocab_size, **ids)
        return allowed.mask(row.generated, grammar)

    def sample(
        self, logits_BV: Tensor, rows: Sequence[SamplingRow], masks: Sequence[Mask | None] | None = None
    ) -> tuple[list[int | None], list[TokenLogprob | None]]:
        """Token ids, None where a logit of the row is not finite, and, where asked for, logprobs of the raw
        distribution. `masks`: what `narrowed` says of each row, if that is known."""
        if len(rows) != len(logits_BV):
            raise ValueError(f"{len(logits_BV)} rows of logits for {len(rows)} requests")
        vocab_size = logits_BV.shape[1]
        masks = [self.narrowed(row, None, vocab_size) for row in rows] if masks is None else masks
        is_free = all(mask is None for mask in masks)
        if self.captured is not None and is_free and self.captured.takes(logits_BV, rows):
            return self.captured.ids(rows), [None] * len(rows)
        if is_free and all(row.is_plain for row in rows) and can_take_largest(logits_BV):
            ids = largest(logits_BV, self.banned_ids, self.eos_ids, [row.bans_end for row in rows])
            return [None if token_id < 0 else token_id for token_id in ids], [None] * len(rows)
        plan = SamplingPlan.of(rows, vocab_size=vocab_size, eos_ids=self.eos_ids, masks=masks)
        # The step's only wait for the device, after all of its work is queued: the next step's input and the answer
        # both need the ids on the host.
        return unpack(self.run(logits_BV, plan).tolist(), plan)

    @torch.inference_mode()
    def run(self, logits_BV: Tensor, plan: SamplingPlan) -> Tensor:
        """All of the work on the device, none of it waited for: everything the host wants in one float64 vector (token
        ids are exact in it), as `unpack` reads it. The logits are left as they are."""
        logits_BV = logits_BV.float()
        masked_BV = self._masked(logits_BV, plan)
        ids_B = masked_BV.argmax(-1) if len(plan.picked) < plan.num_rows else None
        if plan.picked:
            rows_S, uniform_S, *columns = upload([plan.picked, plan.uniform, *plan.settings.values()], logits_BV.device)
            masked_SV = masked_BV if ids_B is None else masked_BV.index_select(0, rows_S.long())
            ids_S = pick(weigh(masked_SV, dict(zip(plan.settings, columns, strict=True)), plan), uniform_S)
            ids_B = ids_S if ids_B is None else ids_B.index_copy(0, rows_S.long(), ids_S)
        assert ids_B is not None
        # One number that is not finite is enough for a sum, and a sum is the cheapest look at all of them.
        parts = [logits_BV.sum(-1).isfinite(), ids_B]
        if plan.told:
            parts += logprobs(logits_BV, ids_B, upload([plan.told], logits_BV.device)[0].long(), max(plan.num_top))
        return torch.cat([part.double() for part in parts])

    def run_few(self, logits_RV: Tensor, settings_6R: Tensor, *, draws: bool) -> Tensor:
        """As `run`, of rows that need few, with nothing to decide on the host: whether a row may not end, and is drawn,
        its temperature, top-k, top-p and random number, float64 `[6, R]` on the device. `draws`: some row is drawn."""
        self._move_to(logits_RV.device)
        bans_end_R, is_drawn_R, temperature, top_k, top_p, uniform_R = settings_6R.unbind(0)
        logits_RV = logits_RV.float()
        masked_RV = logits_RV.index_fill(1, self._banned, float("-inf"))
        ends_RE = masked_RV.index_select(1, self._eos).masked_fill(bans_end_R[:, None] > 0, float("-inf"))
        masked_RV.index_copy_(1, self._eos, ends_RE)
        ids_R = masked_RV.argmax(-1)
        if draws:
            settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            most = SamplingRow(SamplingParams(temperature=1.0, top_k=FEW, top_p=0.5), seed=0)
            plan = SamplingPlan.of([most] * len(logits_RV), vocab_size=logits_RV.shape[1], eos_ids=[])
            ids_R = torch.where(is_drawn_R > 0, pick(weigh(masked_RV, settings, plan), uniform_R), ids_R)
        return torch.cat([part.double() for part in (logits_RV.sum(-1).isfinite(), ids_R)])

    def _move_to(self, device: torch.device) -> None:
        if self._banned.device != device:  # once
            self._banned, self._eos = self._banned.to(device), self._eos.to(device)

    def _masked(self, logits_BV: Tensor, plan: SamplingPlan) -> Tensor:
        """Steps 2 and 3, in a copy."""
        self._move_to(logits_BV.device)
        if not plan.penalized and not plan.bans and not plan.masked:
            return logits_BV.index_fill(1, self._banned, float("-inf"))
        masked_BV = logits_BV.clone()
        if plan.penalized:
            self._penalties.apply(masked_BV, plan.penalized, plan.requests)
        if plan.bans:
            [places] = upload([plan.bans], logits_BV.device)
            masked_BV.view(-1).index_fill_(0, places.long(), float("-inf"))
        if plan.masked:
            apply_masks(masked_BV, plan.masked, plan.masks)
        return masked_BV.index_fill_(1, self._banned, float("-inf"))


def apply_masks(logits_BV: Tensor, rows: Sequence[int], masks: Sequence[Mask]) -> None:
    """What may not come in these rows becomes minus infinity, in place."""
    vocab_size = logits_BV.shape[1]
    if logits_BV.device.type == "cpu":  # row by row: what is worked on stays in the core's cache
        for b, mask in zip(rows, masks, strict=True):
            is_out = np.unpackbits(~mask.bits, count=vocab_size, bitorder="little").view(np.bool_)
            logits_BV[b].masked_fill_(torch.from_numpy(is_out), float("-inf"))
        return
    bits_GW = torch.from_numpy(np.stack([mask.bits[: vocab_size + 7 >> 3] for mask in masks]))
    fill_by_bits(logits_BV, torch.tensor(rows), bits_GW)


def fill_by_bits(logits_BV: Tensor, rows_G: Tensor, bits_GW: Tensor) -> None:
    """The same on a device: the bits, `[G, W]` uint8 on the host, are taken apart there."""
    device = logits_BV.device
    bits_GW, rows_G = uploaded(bits_GW, device), uploaded(rows_G, device)
    bits_GW8 = bits_GW[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)
    is_in_GV = (bits_GW8 & 1).bool().flatten(1)[:, : logits_BV.shape[1]]
    logits_BV.index_copy_(0, rows_G, logits_BV.index_select(0, rows_G).masked_fill(~is_in_GV, float("-inf")))


def weigh(logits_SV: Tensor, settings: Mapping[str, Tensor], plan: SamplingPlan) -> Tensor:
    """What each token weighs (int64, `ONE` the most likely one) after temperature, top-k, top-p and min-p.

    `settings` are the plan's, float64 `[S]` each. Top-k keeps all that are as large as the k-th, as transformers does.
    Top-p keeps the smallest set of most likely tokens whose probability reaches p, at least one; of equally likely ones
    those of lower ids. Min-p keeps those at least min_p times as likely as the most likely one.
    """
    of_groups = [settings[name] for name in ("temperature", "top_k", "top_p")]
    weights_SV = _weights(logits_SV, logits_SV.amax(-1), settings["temperature"])
    for group in plan.sorted:
        if len(group.rows) == len(logits_SV):
            _filter(weights_SV, logits_SV, of_groups, group)
            continue
        rows_G = upload([group.rows], logits_SV.device)[0].long()
        weights_GV = weights_SV.index_select(0, rows_G)
        logits_GV, *columns = (part.index_select(0, rows_G) for part in (logits_SV, *of_groups))
        _filter(weights_GV, logits_GV, columns, group)
        weights_SV.index_copy_(0, rows_G, weights_GV)
    if "min_p" in plan.is_on:
        weights_SV.masked_fill_(weights_SV < (settings["min_p"][:, None] * ONE).ceil().long(), 0)
    return weights_SV


def _weights(logits_SK: Tensor, best_S: Tensor, temperature_S: Tensor) -> Tensor:
    """In units of `ONE`, which `best` weighs."""
    return (((logits_SK - best_S[:, None]) / temperature_S.float()[:, None]).exp() * ONE).long()


def _filter(weights_SV: Tensor, logits_SV: Tensor, settings: Sequence[Tensor], group: SortedRows) -> None:
    """Top-k and top-p of the rows of a group, in place. `settings`: temperature, top-k and top-p."""
    temperature_S, top_k_S, top_p_S = settings
    largest_SK = _largest(logits_SV, group.count)
    kth_S1 = largest_SK.gather(1, (top_k_S.long()[:, None] - 1).clamp(min=0))
    kth_S1 = kth_S1.masked_fill(top_k_S[:, None] == 0, float("-inf"))
    weights_SV.masked_fill_(logits_SV < kth_S1, 0)
    if group.has_top_p:
        in_order_SK = _weights(largest_SK, largest_SK[:, 0], temperature_S).masked_fill_(largest_SK < kth_S1, 0)
        enough_S1 = (top_p_S[:, None] * weights_SV.sum(-1, keepdim=True)).ceil().long()
        is_out_SV = _beyond(enough_S1, logits_SV, largest_SK, in_order_SK)
        weights_SV.masked_fill_(is_out_SV & (top_p_S[:, None] < 1), 0)


def _beyond(enough_S1: Tensor, logits_SV: Tensor, largest_SK: Tensor, in_order_SK: Tensor) -> Tensor:
    """Tokens that are not needed to weigh `enough` together, the most likely ones taken first. `in_order` are the
    weights of `largest`, which lacks at most some that are equal to its last one.

    Weights 5 3 3 1, enough 7: before each come 0 5 8 11, so two are needed, and the cut is at the value of the second.
    What is larger weighs 5, so 2 are missing: one of the two that weigh 3 is enough.
    """
    before_SK = in_order_SK.cumsum(-1) - in_order_SK
    num_needed_S1 = (before_SK < enough_S1).sum(-1, keepdim=True).clamp(min=1)
    cut_S1 = largest_SK.gather(1, num_needed_S1 - 1)
    missing_S1 = enough_S1 - in_order_SK.masked_fill(largest_SK <= cut_S1, 0).sum(-1, keepdim=True)
    each_S1 = in_order_SK.gather(1, num_needed_S1 - 1).clamp(min=1)
    num_ties_S1 = (missing_S1 + each_S1 - 1).div(each_S1, rounding_mode="floor")
    ties_SV = logits_SV == cut_S1
    return (logits_SV < cut_S1) | (ties_SV & (ties_SV.cumsum(-1) > num_ties_S1))


def _largest(logits_SV: Tensor, count: int) -> Tensor:
    """At least the `count` largest values of each row, in order."""
    if count < _SORT_ALL_FROM * logits_SV.shape[1]:
        return logits_SV.topk(count).values
    return logits_SV.sort(-1, descending=True).values


def pick(weights_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The token at which the weights, added up in the order of the ids, pass the share `uniform` of their sum."""
    sums_SV = weights_SV.cumsum(-1)
    total_S1 = sums_SV[:, -1:].contiguous()
    # The product may be rounded up to the sum itself.
    point_S1 = (uniform_S[:, None] * total_S1).long().minimum(total_S1 - 1)
    ids_S1 = torch.searchsorted(sums_SV, point_S1, right=True)
    return ids_S1.squeeze(1).clamp(max=weights_SV.shape[1] - 1)  # logits that are not finite lead anywhere


def logprobs(logits_BV: Tensor, ids_B: Tensor, rows_R: Tensor, num_top: int) -> list[Tensor]:
    """Log probability of the row's token `[R]`, and ids and log probabilities of the most likely ones `[R * num_top]`.

    Among equal logits the lower id comes first, as in argmax: (logit, -id) are sorted as one number.
    """
    logits_RV = logits_BV.index_select(0, rows_R)
    vocab_size = logits_RV.shape[1]
    logprobs_RV = logits_RV.log_softmax(-1)
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # minus zero is zero
    ordered_RV = torch.where(bits_RV < 0, bits_RV ^ 0x7FFFFFFF, bits_RV).long()
    keys_RV = ordered_RV * 2**32 + torch.arange(vocab_size - 1, -1, -1, device=logits_BV.device)
    top_RK = vocab_size - 1 - (keys_RV.topk(num_top).values & 0xFFFFFFFF)
    own_R1 = logprobs_RV.gather(1, ids_B.index_select(0, rows_R)[:, None])
    return [own_R1.flatten(), top_RK.flatten(), logprobs_RV.gather(1, top_RK).flatten()]


def unpack(values: list[float], plan: SamplingPlan) -> tuple[list[int | None], list[TokenLogprob | None]]:
    """The result of `Sampler.run`, on the host."""
    num_rows = plan.num_rows
    ids = [int(value) for value in values[num_rows : 2 * num_rows]]
    entries: list[TokenLogprob | None] = [None] * num_rows
    if plan.told:
        width, rest = max(plan.num_top), values[2 * num_rows :]
        num_told = len(plan.told)
        own, top_ids, top = rest[:num_told], rest[num_told : num_told * (1 + width)], rest[num_told * (1 + width) :]
        for r, (b, count) in enumerate(zip(plan.told, plan.num_top, strict=True)):
            part = slice(r * width, r * width + count)
            pairs = zip(map(int, top_ids[part]), top[part], strict=True)
            entries[b] = TokenLogprob(ids[b], own[r], list(pairs))
    is_finite = values[:num_rows]
    return [i if ok else None for i, ok in zip(ids, is_finite, strict=True)], entries
