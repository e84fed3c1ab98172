"""How rows move between ranks that share experts, as operators that `torch.compile` can see.

Everything is an exchange in which each rank sends a piece to each rank. On Gloo a gather made of one exchange takes
half the time of its all-gather, and a reduce-scatter made of one exchange and a sum here a third of its own, which is
an all-reduce that throws most away; the sum in float32 also rounds once. NCCL has the real ones.

Dims: N ranks, S rows, C columns.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_ops = torch.ops._c10d_functional


class Collectives(Protocol):
    """Every rank calls the same method with equal column counts, in the same order."""

    rank: int
    num_ranks: int
    has_native: bool
    """Whether the device does it, in the order of its stream."""

    def all_gather(self, x_SC: Tensor) -> Tensor:
        """`[N * S, C]`, the rows of rank 0 first. S is the same on all ranks."""
        ...

    def reduce_scatter(self, x_SC: Tensor) -> Tensor:
        """`[S / N, C]`: piece `rank` of the sum over ranks, added in float32. S is the same on all ranks."""
        ...

    def all_to_all(self, x_SC: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """`send[r]` rows to rank r, in order; `[sum(receive), C]`, the rows from rank 0 first."""
        ...


class GroupCollectives:
    """Over a process group, by its name."""

    def __init__(self, group_name: str, rank: int, num_ranks: int, *, has_native: bool) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._group_name, self.has_native = group_name, has_native

    def all_gather(self, x_SC: Tensor) -> Tensor:
        if self.has_native:
            return _wait(_ops.all_gather_into_tensor(x_SC.contiguous(), self.num_ranks, self._group_name))
        sizes = [x_SC.shape[0]] * self.num_ranks
        return self.all_to_all(x_SC.repeat(self.num_ranks, 1), sizes, sizes)

    def reduce_scatter(self, x_SC: Tensor) -> Tensor:
        if self.has_native:
            wide = x_SC.float().contiguous()
            return _wait(_ops.reduce_scatter_tensor(wide, "sum", self.num_ranks, self._group_name)).to(x_SC.dtype)
        sizes = [x_SC.shape[0] // self.num_ranks] * self.num_ranks
        pieces_NSC = self.all_to_all(x_SC, sizes, sizes).unflatten(0, (self.num_ranks, sizes[0]))
        return pieces_NSC.float().sum(0).to(x_SC.dtype)

    def all_to_all(self, x_SC: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return _wait(_ops.all_to_all_single(x_SC.contiguous(), receive, send, self._group_name))


def _wait(x: Tensor) -> Tensor:
    return _ops.wait_tensor(x)
