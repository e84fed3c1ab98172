"""What the options `dtype`, `device` and `compile` mean here."""

from __future__ import annotations

import logging

import torch

from qwen3vl_disagg.core.errors import InputError

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a model is run in."""
STORED_DTYPES = (*DTYPES, "float16")
"""What a checkpoint may be in."""


def resolve_dtype(name: str, stored: str) -> torch.dtype:
    """`auto`: as the checkpoint is stored. InputError where no model is run in that."""
    name = stored if name == "auto" else name
    if name not in DTYPES:
        ways = " or ".join(f"--dtype {dtype}" for dtype in DTYPES)
        raise InputError(f"the checkpoint is {stored}, in which nothing is run here: give {ways}", param="dtype")
    return DTYPES[name]


def resolve_device(name: str, *, local_rank: int = 0, num_local_ranks: int = 1) -> torch.device:
    """`auto` -> the local rank's GPU if every local rank can have one of its own, else the CPU; that it is for a lack
    of GPUs, the first rank logs."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if num_gpus >= num_local_ranks else "cpu"
        if name == "cpu" and num_gpus and local_rank == 0:
            few = f"{num_gpus} GPUs here, and {num_local_ranks} ranks, which need one each"
            logger.warning("--device auto takes the CPU: %s", few)
    if name == "cpu":
        return torch.device("cpu")
    if num_gpus == 0:
        raise InputError("--device cuda: no CUDA device is visible", param="device")
    return torch.device("cuda", local_rank % num_gpus)


def resolve_compile(name: str, device: torch.device) -> bool:
    """`auto`: on for CUDA, off on CPU."""
    return name == "on" or (name == "auto" and device.type == "cuda")
