"""The tower on a GPU: one call of attention for all frames, bytes of pixels up, and the rows of the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen

from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker, Pixels
from qwen3vl_disagg.model.vision import attend_frames, takes_varlen
from qwen3vl_disagg.processing import ImageProcessor, VideoProcessor
from qwen3vl_disagg.processing.patches import Frames, PixelSettings, PixelTransform, cut_patches
from tests.support.random_model import cuda_config, random_vision_model
from tests.support.simcuda import ASYNC, DEVICE, WAITS, simulated, to_device

BF16 = torch.bfloat16
CONFIG = replace(cuda_config(), vision=replace(cuda_config().vision, hidden_size=32))
VISION = CONFIG.vision
SETTINGS = PixelSettings(1024, 1 << 20, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
GRIDS = [(1, 4, 6), (1, 8, 8), (1, 4, 6), (2, 2, 4), (1, 2, 2)] * 3


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bytes_of(count: int, grid: tuple[int, int, int], *, how: str = "torch", seed: int = 0) -> tuple[Pixels, Pixels]:
    """So many frames for a GPU, and cut up as on the CPU; every second one has to be resized."""
    transform = PixelTransform(SETTINGS.mean, SETTINGS.std, how)
    sizes = [(grid[1] * 16 + 8 * (n % 2), grid[2] * 16) for n in range(seed, seed + count)]
    frames = [picture(seed + n, *size) for n, size in enumerate(sizes)]
    cut = cut_patches(iter(frames), count, grid, VISION, transform)
    return Pixels(Frames.of(iter(frames), count, grid, VISION, transform), grid, 0.0), Pixels(cut, grid, 0.0)


@pytest.mark.parametrize("head", [16, 72])
@pytest.mark.parametrize("lengths", [[4, 4, 9, 1, 4], [7], [1] * 12])
def test_frames_in_one_call_are_as_frames_one_by_one(head, lengths):
    qkv = torch.randn(sum(lengths), 3, 2, head, dtype=BF16)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    expected = attend_frames(*qkv.unbind(1), ends)
    with simulated() as watch:
        on_gpu = qkv.to(DEVICE)
        found = attend_frames(*on_gpu.unbind(1), ends, ends.int().to(DEVICE))
        assert watch.varlen == 1
        assert not watch.sdpa
    torch.testing.assert_close(found.elem, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("device", "dtype", "head", "capability", "expected"),
    [
        ("cuda", BF16, 72, (9, 0), True),
        ("cuda", torch.float16, 256, (8, 0), True),
        ("cuda", torch.float32, 72, (9, 0), False),
        ("cuda", BF16, 12, (9, 0), False),
        ("cuda", BF16, 264, (9, 0), False),
        ("cuda", BF16, 72, (7, 5), False),
        ("cpu", BF16, 72, (9, 0), False),
    ],
)
def test_heads_that_flash_attention_takes(monkeypatch, device, dtype, head, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert takes_varlen(torch.device(device), dtype, head) == expected


@pytest.mark.parametrize(
    ("problem", "dtype", "head", "to_ends"),
    [
        ("fp16 and bf16", torch.float32, 16, lambda ends: ends.int()),
        ("head size 12", BF16, 12, lambda ends: ends.int()),
        ("int32", BF16, 16, lambda ends: ends),
    ],
)
def test_what_flash_attention_refuses_is_refused(problem, dtype, head, to_ends):
    x, ends = torch.randn(5, 2, head, dtype=dtype), torch.tensor([0, 2, 5])
    with simulated():
        x = x.to(DEVICE)
        with pytest.raises(RuntimeError, match=problem):
            attend_frames(x, x, x, ends, to_ends(ends).to(DEVICE))


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_batch_of_many_images_has_the_rows_of_the_cpu(dtype, compile):
    """With a call of attention for each layer, an upload of bytes, and one wait. Where flash attention takes no such
    numbers, as before."""
    model = random_vision_model(CONFIG, seed=0).to(dtype)
    batch = [bytes_of(2 * grid[0] - 1, grid, seed=n) for n, grid in enumerate(GRIDS)]
    wanted = EncodeWorker(model, None, CONFIG).encode([cut for _, cut in batch], [60] * len(batch))
    with simulated() as watch:
        worker = EncodeWorker(to_device(model, watch), None, CONFIG, compile=compile)
        watch.reset()
        found = worker.encode([whole for whole, _ in batch], [60] * len(batch))
        assert watch.varlen == (VISION.depth if dtype == BF16 else 0)
        assert watch.of(*WAITS) == 1, str(watch)
        assert not watch.problems
        found = [item.arrived() for item in found]
    bound = 1e-4 if dtype == torch.float32 else 0.02
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(one, EncodedItem)
        assert isinstance(other, EncodedItem)
        for rows, expected in ((one.main, other.main), (one.deepstack, other.deepstack)):
            error = (rows.float() - expected.float()).norm() / expected.float().norm()
            assert error < bound


@pytest.mark.parametrize("how", ["torch", "pillow"])
@pytest.mark.parametrize(("count", "steps"), [(1, 1), (2, 1), (5, 3)])
def test_patches_of_the_device_are_those_of_the_host_to_the_bit(how, count, steps):
    """Both arithmetics, images and clips, whose last frame may have to fill up its step; channels that differ."""
    batch = [bytes_of(count, (steps, 4, 6), how=how, seed=n) for n in (1, 20)]
    expected = torch.cat([cut.patches for _, cut in batch])
    with simulated() as watch:
        worker = EncodeWorker(to_device(random_vision_model(CONFIG, seed=0), watch), None, CONFIG)
        watch.reset()
        found = worker.patches([whole for whole, _ in batch])
        uploaded, num_blocking = watch.bytes_of(ASYNC), watch.of(*WAITS)
        assert not watch.problems
    assert torch.equal(found.elem, expected)
    share = count / (2 * steps) / 4  # an image is its own second frame, which need not travel
    small = 2 * 2 * 3 * 4  # mean and deviation
    assert uploaded == share * expected.nbytes + small
    assert num_blocking == 0


def test_processors_make_frames_of_what_they_cut_up_for_a_cpu(monkeypatch):
    """From the levels that decoding gave, of the announced size."""
    levels = picture(3, 70, 100)
    image = ImageProcessor(VISION, SETTINGS)
    clips = VideoProcessor(VISION, SETTINGS)
    expected, grid = image.patches(levels)
    visual = type("Visual", (), {"size": (70, 100), "grid": grid, "modality": "image"})()
    monkeypatch.setattr(image, "_levels", lambda *_: levels)
    frames, found_grid = image.frames(b"", visual)
    assert found_grid == grid
    assert torch.equal(frames.patches(frames.levels, grid, VISION), expected)
    clip = type("Visual", (), {"size": (70, 100), "grid": (2, *grid[1:]), "modality": "video", "frames": (0, 1, 2)})()
    clip.is_frame_list = False
    decoder = type("Decoder", (), {"video_frames": lambda *_, **__: (x for x in [levels] * 3)})()
    frames, found_grid = clips.frames(b"", clip, decoder)
    expected, clip_grid = clips.pixels(b"", clip, decoder)
    assert found_grid == clip_grid == (2, *grid[1:])
    assert torch.equal(frames.patches(frames.levels, clip_grid, VISION), expected)


def test_the_compiled_operator_takes_the_ends_on_the_device():
    q = torch.randn(6, 2, 16, dtype=BF16)
    ends = torch.tensor([0, 2, 6])
    torch.library.opcheck(torch.ops.q3vl.attend_frames.default, (q, q, q, ends), test_utils="test_schema")
    with simulated() as watch:
        x = q.to(DEVICE)
        torch.ops.q3vl.attend_frames(x, x, x, ends, ends.int().to(DEVICE))
        assert watch.varlen == 1
    assert varlen.varlen_attn.__module__.startswith("torch.")
