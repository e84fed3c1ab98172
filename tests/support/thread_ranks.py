"""Ranks as threads of one process: the collectives without any process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WAIT_S = 30.0


class ThreadCollectives:
    """`Collectives` of one of the ranks of a `Board`."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board, self.rank, self.num_ranks = board, rank, board.num_ranks

    def all_gather(self, x_SC: Tensor) -> Tensor:
        pieces = self._board.swap(self.rank, [x_SC] * self.num_ranks)
        if len({len(piece) for piece in pieces}) != 1:
            raise ValueError(f"ranks brought {[len(piece) for piece in pieces]} rows")
        return torch.cat(pieces)

    def reduce_scatter(self, x_SC: Tensor) -> Tensor:
        pieces = self._board.swap(self.rank, list(x_SC.chunk(self.num_ranks)))
        return torch.stack(pieces).float().sum(0).to(x_SC.dtype)

    def all_to_all(self, x_SC: Tensor, send: list[int], receive: list[int]) -> Tensor:
        pieces = self._board.swap(self.rank, list(x_SC.split(send)))
        if [len(piece) for piece in pieces] != receive:
            raise ValueError(f"{[len(piece) for piece in pieces]} rows came, {receive} were expected")
        return torch.cat(pieces)


class Board:
    """Where the ranks leave pieces for one another; every wait has a deadline."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._left: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        self._barrier = threading.Barrier(num_ranks, timeout=WAIT_S)
        self.num_swaps = 0

    def swap(self, rank: int, pieces: list[Tensor]) -> list[Tensor]:
        """Piece r of each rank goes to rank r; what comes back is in order of the ranks."""
        self._left[rank] = pieces
        self._barrier.wait()
        mine = [self._left[other][rank].clone() for other in range(self.num_ranks)]
        if self._barrier.wait() == 0:
            self.num_swaps += 1
        return mine


def on_ranks(num_ranks: int, body: Callable[[ThreadCollectives], T]) -> list[T]:
    """What `body` returns on each rank. The first failure is raised."""
    board = Board(num_ranks)

    def run(rank: int) -> T:
        try:
            with torch.inference_mode():
                return body(ThreadCollectives(board, rank))
        except BaseException:
            board._barrier.abort()
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(num_ranks)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]
