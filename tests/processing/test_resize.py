"""Two arithmetics of resizing: "torch" equals the reference's torchvision processors, "pillow" its PIL processor.

torchvision is not installed with the tests, so its processor's patches are held to by their SHA-256 sums, which
transformers 5.23 with torchvision 0.28.0 gave; `tests/oracle/test_videos.py` runs it where it is installed.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from qwen3vl_disagg import LLM
from qwen3vl_disagg.cluster.rank_setup import RankSetup
from qwen3vl_disagg.cluster.registry import check_fingerprint
from qwen3vl_disagg.cluster.rendezvous import Layout, RankContext, World
from qwen3vl_disagg.core.errors import HandshakeError, InputError
from qwen3vl_disagg.core.settings import ModelOptions
from qwen3vl_disagg.encode.rank import load_worker
from qwen3vl_disagg.options import ServeOptions
from qwen3vl_disagg.plan.presets import PRESETS
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.processing.clips import VideoProcessor
from qwen3vl_disagg.processing.patches import PixelSettings, PixelTransform
from tests.support.clips import VISION, encode_clip, noise_frames, png_frames

BOUNDS = {"min_pixels": 65536, "max_pixels": 16777216}
GOLDEN = {
    (200, 300): "22cae3dc45ace1cc6a4da5ea82aeee91c338ad31e800255862a309469b61e124",
    (60, 80): "ea5b54d4943d1bacbbbbd0b76257f289b3e947457ede480c97e0524774a5ed4d",
    (33, 47): "63e26879aaa023aa938fa19d15b62675db9f0035c098ebf5337c7bd987b0208a",
    (20, 500): "d479282016604b361b5957b8d65566e5a64b9464fe6f2f24031efa32d924d751",
    (1100, 1500): "4c9f69ad7c9f763ec0fb9b575ca6b472e6a534815f6dcf9ef0e49b36f7990ce5",
}
"""(height, width) -> SHA-256 of the patches of Qwen2VLImageProcessor."""


@pytest.mark.parametrize("size", GOLDEN)
def test_the_default_equals_the_torchvision_processor(size):
    [levels_HWC] = noise_frames(1, *size)
    patches, _ = ImageProcessor(PRESETS["30b-a3b"].vision, PixelSettings(**BOUNDS)).patches(levels_HWC)
    assert hashlib.sha256(patches.numpy().tobytes()).hexdigest() == GOLDEN[size]


@pytest.mark.parametrize("layout", ["as decoded", "a view with gaps", "read-only"])
@pytest.mark.parametrize("size", [(70, 50), (33, 200), (1, 1), (2, 300), (64, 64)])
def test_torch_is_uint8_interpolation_however_the_levels_lie_in_memory(layout, size):
    [levels_HWC] = noise_frames(1, *size)
    given = levels_HWC
    if layout == "a view with gaps":
        given = np.repeat(levels_HWC, 2, axis=1)[:, ::2]
    given.flags.writeable = layout != "read-only"
    levels_1CHW = torch.tensor(levels_HWC).permute(2, 0, 1).contiguous()[None]
    expected = F.interpolate(levels_1CHW, (64, 96), mode="bicubic", antialias=True)[0]
    found = PixelTransform((0.5,) * 3, (0.5,) * 3, "torch")(given, 64, 96)
    assert torch.equal(found, (expected.float() - 127.5) / 127.5)


def test_pillow_is_pillow():
    [levels_HWC] = noise_frames(1, 70, 50)
    resized = np.array(Image.fromarray(levels_HWC).resize((96, 64), Image.Resampling.BICUBIC))
    expected = (torch.from_numpy(resized).permute(2, 0, 1).double() * (1 / 255)).float()
    found = PixelTransform((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "pillow")(levels_HWC, 64, 96)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    assert torch.equal(found, (expected - mean) / std)


@pytest.mark.parametrize("how", ["torch", "pillow"])
def test_clips_and_images_are_resized_alike(how):
    """A clip of two equal frames and the picture itself, where both get the same size."""
    [levels_HWC] = noise_frames(1, 100, 140)
    bounds = {"min_pixels": 256 * 256, "max_pixels": 512 * 512}
    patches, grid = ImageProcessor(VISION, PixelSettings(**bounds), resize=how).patches(levels_HWC)
    doubled = PixelSettings(2 * bounds["min_pixels"], 2 * bounds["max_pixels"])
    clip, clip_grid = VideoProcessor(VISION, doubled, resize=how).patches(iter([levels_HWC] * 2), 2, grid)
    assert clip_grid == grid == VideoProcessor(VISION, doubled).grid(2, 140, 100)
    assert torch.equal(clip, patches)


@pytest.fixture(scope="module")
def answers():
    """What each setting gives for an image and a clip that are resized."""
    clip, [picture] = encode_clip(noise_frames(6, 120, 88)), png_frames(noise_frames(1, 70, 90))
    parts = [{"type": "image", "image": picture}, {"type": "video", "video": clip}]
    found = {}
    for how in ("torch", "pillow"):
        llm = LLM(image_resize=how)
        prompt = llm.processor.prepare([{"role": "user", "content": parts}], allow_paths=True)
        found[how] = [
            llm.transfer.worker.preprocess(data, item).patches
            for item, data in zip(prompt.items, prompt.media, strict=True)
        ]
    return found


def test_the_option_reaches_images_and_clips(answers):
    for torchs, pillows in zip(answers["torch"], answers["pillow"], strict=True):
        difference = (torchs - pillows).abs().max()
        assert 1e-6 < difference < 2.5 / 127.5


def setup_of(how: str) -> RankSetup:
    options, world = ServeOptions(model=ModelOptions(image_resize=how)), World(num_local_ranks=2)
    return RankSetup.of(RankContext(0, Layout.of(2, 1), ("127.0.0.1", 1), "token", options, world))


def test_an_encode_rank_resizes_as_told(answers):
    [levels_HWC] = noise_frames(1, 70, 90)
    for how in ("torch", "pillow"):
        worker = load_worker(setup_of(how))
        assert torch.equal(worker.processor.patches(levels_HWC)[0], answers[how][0])
        assert worker.video.resize == how
        worker.decoder.close()


def test_ranks_that_resize_differently_are_not_linked():
    with pytest.raises(HandshakeError, match="image_resize"):
        check_fingerprint(setup_of("torch").fingerprint, setup_of("pillow").fingerprint)


def test_another_word_is_refused():
    with pytest.raises(InputError, match="--image-resize pil: must be one of torch, pillow"):
        LLM(image_resize="pil")
