"""A rank's part of a model without any ranks: plain tensors, and what was asked."""

from __future__ import annotations

from torch import Tensor, nn

from qwen3vl_disagg.parallel.expert_placement import shard_rows


class PlainShards:
    """Experts' rows of one rank as ordinary tensors. `held` is what `hold` saw, `finished` what `finish` saw."""

    def __init__(self, num_ranks: int, rank: int) -> None:
        self.num_ranks, self.rank = num_ranks, rank
        self.held: dict[str, tuple[int, ...]] = {}
        self.finished: list[nn.Module] = []

    def rows(self, name: str, shape: tuple[int, ...]) -> range | None:
        return shard_rows(shape[0], self.num_ranks, self.rank) if ".mlp.experts." in name else None

    def hold(self, name: str, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        self.held[name] = shape
        return local

    def finish(self, module: nn.Module) -> None:
        self.finished.append(module)
