"""Gloo groups on one given address. `ProcessGroupGloo._Options` and `create_device` are half private, so this file is
kept small and has a test of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_BACKEND = "q3vl_gloo"
AXIS = "experts"
Swap = Callable[[bytes], bytes]
"""What this end's group says of where it is -> what the other end's says. Blocks."""


def gloo_group(store: dist.Store, rank: int, size: int, *, host: str, timeout: timedelta) -> Any:
    """A group that listens on `host` alone; blocks until all are there. RuntimeError after the timeout, which is also
    that of each wait without one of its own."""
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    options._timeout = timeout
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


def build_pair(swap: Swap, *, rank_in_pair: int, host: str, timeout_s: float) -> dist.ProcessGroup:
    """A 2-rank group with no default group, so that a link comes and goes without the other ranks knowing, and over no
    store of PyTorch's: TCPStore asks a name server about each client, and answers nobody meanwhile.

    Blocks until both are there. RuntimeError when the other one is not `timeout_s` after the swap, ValueError where
    what it says is no address, and whatever `swap` raises.
    """
    timeout = timedelta(seconds=timeout_s / 5)  # Gloo waits five times as long for the other end's connection
    return gloo_group(_TwoEnds(swap), rank_in_pair, 2, host=host, timeout=timeout)


class _TwoEnds(dist.Store):
    """What Gloo takes for a store: it sets its own address, then reads both."""

    def __init__(self, swap: Swap) -> None:
        super().__init__()
        self._swap, self._values = swap, dict[str, bytes]()

    def set(self, key: str, value: Any) -> None:
        self._values[key] = bytes(value)

    def wait(self, keys: list[str], *_: Any) -> None:
        """Only a `get` blocks."""

    def get(self, key: str) -> bytes:
        if key not in self._values:
            ours = next(iter(self._values.values()))
            theirs = self._swap(ours)
            if _form(theirs) != _form(ours):
                raise ValueError(f"{len(theirs)} bytes of the other end are no address like this end's")
            self._values[key] = theirs
        return self._values[key]


def _form(address: bytes) -> tuple[int, int, int]:
    """What both ends' must have in common, as Gloo trusts what it reads: bytes of its socket address, their family,
    bytes behind them. Before it are the length of the host's name and the name; lengths have 8 bytes."""
    number = partial(int.from_bytes, byteorder="little")
    start = 8 + number(address[:8])
    end = start + 8 + (size := number(address[start : start + 8]))
    return size, number(address[start + 8 : start + 10]), len(address) - end


def expert_mesh(
    store: dist.Store, rank: int, size: int, *, host: str, device: torch.device, timeout_s: float
) -> DeviceMesh:
    """A mesh of one axis over the ranks that share experts; they become the process's default group, which DTensor
    needs. Encode ranks are no part of it. On CUDA the rows travel by NCCL, which chooses its own interfaces.

    Blocks until all ranks are there; RuntimeError after `timeout_s` seconds.
    """

    def make(prefix: dist.Store, group_rank: int, group_size: int, timeout: timedelta) -> Any:
        return gloo_group(prefix, group_rank, group_size, host=host, timeout=timeout)

    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(_BACKEND, make, devices=["cpu"])
    backend = _BACKEND if device.type == "cpu" else f"cpu:{_BACKEND},cuda:nccl"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("experts", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    return init_device_mesh(device.type, (size,), mesh_dim_names=(AXIS,))
