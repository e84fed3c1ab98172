"""Tokens to the ranks that hold their experts, and the sums back.

Experts are spread like `torch.chunk`: rank r holds the ids `[r * chunk, (r + 1) * chunk)`. Example: 12 experts over 5
ranks, chunk 3: rank 2 holds 6, 7, 8, rank 4 none. An id that is another rank's becomes one that no expert here has.

* `gather`: every rank sees the rows of all, and adds up what its experts make of them. Fixed shapes: each rank brings
  `num_rows`, padded, so it compiles once and never waits for a count.
* `all_to_all`: a row goes once to each rank that holds one of its experts, and to no other. The least that can travel;
  the counts have to be known on the host, which waits for them in each layer.

Dims: T tokens of this rank, D hidden, K experts per token, N ranks, S rows on their way, R rows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_disagg.model.moe import Dispatcher, DispatchKind, DispatchPlan
from qwen3vl_disagg.parallel.collectives import Collectives

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""Ids travel beside the row as the bits of its dtype."""


def pack(x_SD: Tensor, weights_SK: Tensor, ids_SK: Tensor) -> Tensor:
    """Row, weights and ids side by side: `[S, D + 2K]`, x's dtype, so that one exchange carries all."""
    bits = ids_SK.to(_BITS[x_SD.dtype]).view(x_SD.dtype)
    return torch.cat([x_SD, weights_SK.to(x_SD.dtype), bits], dim=1)


def unpack(packed: Tensor, num_choices: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `pack` took: x `[S, D]`, weights `[S, K]`, ids `[S, K]` int64."""
    hidden = packed.shape[1] - 2 * num_choices
    x_SD, weights_SK, bits = packed.split([hidden, num_choices, num_choices], dim=1)
    return x_SD, weights_SK, bits.contiguous().view(_BITS[packed.dtype]).long()


SAVING = 50_000
"""Bytes that an all-to-all has to save for each pair of ranks to be worth its third exchange and the wait for counts:
from docs/benchmarks.md, over Gloo."""


def choose_kind(rows: Sequence[int], num_rows: int, *, num_choices: int, row_bytes: int) -> DispatchKind:
    """How rows should travel in a step in which rank r brings `rows[r]`, and a gather pads each to `num_rows`.

    Example: 512 rows on one of 2 ranks. A gather moves 2 x 512 of them, an all-to-all at most 512.
    """
    num_ranks = len(rows)
    gathered = num_ranks * (num_ranks - 1) * num_rows
    exchanged = sum(rows) * min(num_choices, num_ranks - 1)
    return "all_to_all" if (gathered - exchanged) * row_bytes > SAVING * num_ranks**2 else "gather"


@dataclass(frozen=True)
class Gathered:
    """This rank's own tokens among the rows it brought."""

    num_tokens: int


@dataclass(frozen=True)
class Exchanged:
    """Row s went for token `token_S[s]`; `send[r]` of them to rank r, which sent `receive[r]` here."""

    num_tokens: int
    token_S: Tensor
    send: list[int]
    receive: list[int]


class ExpertDispatcher(Dispatcher):
    """For experts that are spread over the ranks of `collectives`. Every rank has to call it in each layer of a step,
    with the same plan, also one that has no token or no expert.
    """

    def __init__(self, collectives: Collectives, num_experts: int) -> None:
        self._collectives, self._num_experts = collectives, num_experts
        self._chunk = -(-num_experts // collectives.num_ranks)
        first = min(collectives.rank * self._chunk, num_experts)
        self._num_here = min(self._chunk, num_experts - first)
        # A tensor: as a number it would be a constant of the graph, and each rank would compile its own.
        self._first = torch.tensor(first)

    @property
    def can_capture(self) -> bool:
        return self._collectives.has_native

    def num_rows(self, num_tokens: int) -> int:
        return num_tokens * self._collectives.num_ranks

    def local(self, weight: Tensor) -> Tensor:
        return weight.to_local()  # type: ignore[attr-defined]  # a DTensor

    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, plan: DispatchPlan | None
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        if plan is None:
            raise ValueError(f"experts are spread over {self._collectives.num_ranks} ranks: a step needs their plan")
        if plan.kind == "gather":
            return self._gather(x_TD, weights_TK, ids_TK, plan.num_rows)
        return self._exchange(x_TD, weights_TK, ids_TK)

    def combine(self, y_RD: Tensor, sent: Any) -> Tensor:
        if isinstance(sent, Gathered):
            return self._collectives.reduce_scatter(y_RD)[: sent.num_tokens]
        back_SD = self._collectives.all_to_all(y_RD, sent.receive, sent.send)
        out_TD = back_SD.new_zeros(sent.num_tokens, y_RD.shape[1], dtype=torch.float32)
        return out_TD.index_add_(0, sent.token_S, back_SD.float()).to(y_RD.dtype)

    def _gather(
        self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, num_rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Gathered]:
        num_tokens = x_TD.shape[0]
        if num_tokens > num_rows:
            raise ValueError(f"{num_tokens} tokens, but the ranks agreed on {num_rows} rows")
        padding = num_rows - num_tokens
        ids_SK = F.pad(ids_TK, (0, 0, 0, padding), value=self._num_experts)
        packed = pack(F.pad(x_TD, (0, 0, 0, padding)), F.pad(weights_TK, (0, 0, 0, padding)), ids_SK)
        rows = unpack(self._collectives.all_gather(packed), ids_TK.shape[1])
        return *self._here(*rows), Gathered(num_tokens)

    def _exchange(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor, Exchanged]:
        num_tokens, num_ranks = x_TD.shape[0], self._collectives.num_ranks
        is_for_TN = x_TD.new_zeros(num_tokens, num_ranks, dtype=torch.bool)
        is_for_TN = is_for_TN.scatter_(1, ids_TK // self._chunk, True)
        token_S = is_for_TN.T.nonzero()[:, 1]  # by rank, then by token
        send_N1 = is_for_TN.sum(0).unsqueeze(1)
        ones = [1] * num_ranks
        receive_N1 = self._collectives.all_to_all(send_N1, ones, ones)
        # The host waits here: it has to know how much room to make.
        send, receive = torch.cat([send_N1, receive_N1], dim=1).T.tolist()
        packed = pack(x_TD[token_S], weights_TK[token_S], ids_TK[token_S])
        rows = unpack(self._collectives.all_to_all(packed, send, receive), ids_TK.shape[1])
        return *self._here(*rows), Exchanged(num_tokens, token_S, send, receive)

    def _here(self, x_RD: Tensor, weights_RK: Tensor, ids_RK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids as this rank counts its experts, from 0. Those of ranks before become, as those of ranks behind are, ids
        that no expert here has."""
        ids_RK = ids_RK - self._first
        return x_RD, weights_RK, torch.where(ids_RK < 0, self._num_here, ids_RK)
