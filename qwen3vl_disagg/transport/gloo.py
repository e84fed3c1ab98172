"""Gloo groups on one given address. `ProcessGroupGloo._Options` and `create_device` are half private, so this file is
kept small and has a test of its own.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_BACKEND = "q3vl_gloo"
AXIS = "experts"


def gloo_group(store: dist.Store, rank: int, size: int, *, host: str, timeout: timedelta) -> Any:
    """A group that listens on `host` alone; blocks until all are there. RuntimeError after the timeout, which is also
    that of each wait without one of its own."""
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    options._timeout = timeout
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


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
