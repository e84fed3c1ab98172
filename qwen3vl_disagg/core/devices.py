"""What the options `dtype`, `device` and `compile` mean here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from qwen3vl_disagg.core.errors import DeviceLost, InputError

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a model is run in."""
_LOST = "CUDA error"
_HARMLESS = ("out of memory", "ALLOC_FAILED", "invalid configuration argument", "invalid argument")
"""Errors of one call: the context lives on."""
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
STORED_DTYPES = (*DTYPES, "float16")
"""What a checkpoint may be in."""


def resolve_dtype(name: str, stored: str) -> torch.dtype:
    """`auto`: as the checkpoint is stored. InputError where no model is run in that."""
    name = stored if name == "auto" else name
    if name not in DTYPES:
        ways = " or ".join(f"--dtype {dtype}" for dtype in DTYPES)
        raise InputError(f"the checkpoint is {stored}, in which nothing is run here: give {ways}", param="dtype")
    return DTYPES[name]


def parse_gpus(text: str | None, device: str, num_local_ranks: int) -> tuple[int, ...]:
    """`--gpus 2,3`: the devices of this host's ranks, in the order of these; empty for any. InputError for what cannot
    be. Asks nothing of CUDA, which must not begin in a process that forks."""
    if text is None:
        return ()
    if device == "cpu":
        raise InputError(f"--gpus {text}: not with --device cpu", param="gpus")
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts):
        raise InputError(f"--gpus {text}: must be the numbers of GPUs, as 0,1,2", param="gpus")
    gpus = tuple(map(int, parts))
    if len(set(gpus)) < len(gpus):
        raise InputError(f"--gpus {text}: names a GPU twice", param="gpus")
    if len(gpus) != num_local_ranks:
        counts = f"{len(gpus)} GPUs for {num_local_ranks} ranks on this host"
        raise InputError(f"--gpus {text}: {counts}, each of which takes one", param="gpus")
    return gpus


def resolve_device(
    name: str, *, local_rank: int = 0, num_local_ranks: int = 1, gpus: Sequence[int] = ()
) -> torch.device:
    """`gpus`: one for each local rank. Without them `auto` -> the local rank's GPU if every local rank can have one of
    its own, else the CPU; that it is for a lack of GPUs, the first rank logs. InputError for a GPU that is not here."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        if gpus[local_rank] >= num_gpus:
            here = f"GPUs 0 to {num_gpus - 1} are visible here" if num_gpus else "no CUDA device is visible"
            raise InputError(f"--gpus {','.join(map(str, gpus))}: {here}", param="gpus")
        return torch.device("cuda", gpus[local_rank])
    if name == "auto":
        name = "cuda" if num_gpus >= num_local_ranks else "cpu"
        if name == "cpu" and num_gpus and local_rank == 0:
            few = f"{num_gpus} GPUs here, and {num_local_ranks} ranks, which need one each"
            logger.warning("--device auto takes the CPU: %s", few)
        if name == "cpu" and not num_gpus and local_rank == 0 and NVIDIA_DRIVER.exists():
            logger.warning("--device auto takes the CPU: PyTorch %s finds none of this host's GPUs", torch.__version__)
    if name == "cpu":
        return torch.device("cpu")
    if num_gpus == 0:
        raise InputError("--device cuda: no CUDA device is visible", param="device")
    return torch.device("cuda", local_rank % num_gpus)


def use_device(device: torch.device) -> None:
    """What this thread does on a GPU without naming one, it does on this one: each thread begins with the first."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def resolve_compile(name: str, device: torch.device) -> bool:
    """`auto`: on for CUDA, off on CPU."""
    return name == "on" or (name == "auto" and device.type == "cuda")


def raise_if_lost(error: BaseException) -> None:
    """DeviceLost where the error, or what it came of, is one after which all calls of CUDA fail: an illegal access, a
    card that fell off the bus. Memory that is used up is not, nor what one call was asked for in vain."""
    if isinstance(error, DeviceLost):
        raise error
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        is_of_cuda = isinstance(cause, torch.AcceleratorError) or (isinstance(cause, RuntimeError) and _LOST in text)
        if is_of_cuda and not isinstance(cause, torch.OutOfMemoryError) and not any(word in text for word in _HARMLESS):
            first_line = text.splitlines()[0] if text else type(cause).__name__
            raise DeviceLost(f"the GPU is lost to this process: {first_line}") from error
        cause = cause.__cause__
