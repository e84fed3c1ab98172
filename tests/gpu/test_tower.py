"""The tower on a GPU: attention over frames in one call, patches that the device makes, and rows beside a decoder."""

from __future__ import annotations

import pytest
import torch

from qwen3vl_disagg.encode.canary import GPU_PATCHES
from qwen3vl_disagg.encode.shared_gpu import SharedGpu
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker
from qwen3vl_disagg.model.vision import attend_frames, takes_varlen
from tests.simcuda.test_tower import CONFIG, GRIDS, bytes_of
from tests.support.random_model import random_vision_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16


@pytest.mark.parametrize("head", [16, 64, 72, 128])
def test_frames_in_one_call_are_as_frames_one_by_one(head):
    lengths = [784, 784, 1, 4096, 12, 256]
    qkv = torch.randn(sum(lengths), 3, 4, head, dtype=BF16, device=CUDA)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    assert takes_varlen(CUDA, BF16, head)
    found = attend_frames(*qkv.unbind(1), ends, ends.int().to(CUDA))
    torch.testing.assert_close(found, attend_frames(*qkv.unbind(1), ends), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("how", ["torch", "pillow"])
def test_patches_of_the_device_are_those_of_the_host(how):
    batch = [bytes_of(5, (3, 4, 6), how=how, seed=n) for n in (1, 20)]
    worker = EncodeWorker(random_vision_model(CONFIG, seed=0).to(CUDA), None, CONFIG)
    found = worker.patches([whole for whole, _ in batch]).cpu()
    expected = torch.cat([cut.patches for _, cut in batch])
    torch.testing.assert_close(found, expected, atol=GPU_PATCHES, rtol=0.0)


@pytest.mark.parametrize("compile", [True, False])
def test_rows_beside_a_decoder_are_those_of_the_cpu(compile):
    """While another stream is kept busy, and steps give the tower its turns."""
    model = random_vision_model(CONFIG, seed=0).to(BF16)
    batch = [bytes_of(2 * grid[0] - 1, grid, seed=n) for n, grid in enumerate(GRIDS)]
    ids = [60] * len(batch)
    wanted = EncodeWorker(model, None, CONFIG).encode([cut for _, cut in batch], ids)
    worker = EncodeWorker(model.to(CUDA), None, CONFIG, compile=compile)
    gpu = SharedGpu(CUDA, 1.5)
    worker.share(gpu)
    x = torch.randn(4096, 4096, device=CUDA, dtype=BF16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(priority=-1)):
        for _ in range(20):
            x = (x @ x).clamp(-1, 1)
        found = [item.arrived() for item in worker.encode([whole for whole, _ in batch], ids)]
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(one, EncodedItem)
        assert isinstance(other, EncodedItem)
        error = (one.main.float() - other.main.float()).norm() / other.main.float().norm()
        assert error < 0.02
