from pathlib import Path

import pytest
import torch

from qwen3vl_disagg.core.tensors import lazy_zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 4), (4, 0), (1,)])
def test_zeros_of_every_dtype_and_shape(shape, dtype):
    zeros = lazy_zeros(shape, dtype)
    assert zeros.dtype == dtype
    assert zeros.shape == shape
    assert not zeros.any()
    zeros += 1
    assert (zeros == 1).all()


def _private_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_memory_is_taken_only_when_written():
    before = _private_kib()
    zeros = lazy_zeros((64, 2**20), torch.float32)  # 256 MiB
    assert _private_kib() - before < 32 * 1024
    zeros[:32] = 1
    assert _private_kib() - before > 100 * 1024
