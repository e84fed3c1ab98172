"""Triton kernels of the expert layer, for bfloat16 on CUDA. Each file has one, and a reference that
`model` does not have.

They are operators that the compiler looks into (`torch.library.triton_op`), so a compiled layer launches them itself.
Nothing here is imported where there is no Triton: the PyTorch code runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os

import torch
from torch import Tensor

from qwen3vl_disagg.core.environment import KERNELS

MAX_FEW_ROWS = 8
"""Up to here each choice of each row reads its expert by itself; above, rows are sorted by expert."""
_FILES = ("route", "order", "pick", "swiglu", "combine", "few_rows")


def register() -> None:
    """Define the operators `q3vl::gpu_*`; ImportError without Triton."""
    for name in _FILES:
        importlib.import_module(f"{__name__}.{name}")


def _is_wanted() -> bool:
    has_cuda = torch.version.cuda is not None
    return has_cuda and os.environ.get(KERNELS) != "off" and importlib.util.find_spec("triton") is not None


IS_ON = _is_wanted()
if IS_ON:
    try:
        register()
    except ImportError as error:  # PyTorch's own operators do the same
        logging.getLogger(__name__).warning("no Triton kernels: %s", error)
        IS_ON = False


def takes(x: Tensor) -> bool:
    """Whether what `x` goes through runs by these kernels."""
    return IS_ON and x.device.type == "cuda" and x.dtype == torch.bfloat16
