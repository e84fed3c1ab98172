"""Which frames, which size, which time, which patches: against the reference's own functions and by hand.

The reference's video processor needs torchvision, which is not installed with the tests. What it computes without that
is called here; resizing is held to SHA-256 sums of what the whole of it gives (`test_videos.py` among the oracle tests
runs it where torchvision is there).
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from qwen3vl_disagg.core.errors import CheckpointError, InputError, ServerError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.model import VisionConfig
from qwen3vl_disagg.processing.clips import VideoProcessor, pack_frames, smart_resize_video, timestamps
from qwen3vl_disagg.processing.patches import PixelSettings
from tests.support.clips import VISION, noise_frames, published_video_processor

# Through the package it would be a stand-in that asks for torchvision.
reference = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
SAMPLER = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
BOUNDS = {"factor": 32, "temporal": 2, "min_pixels": 4096, "max_pixels": 25165824}


@pytest.mark.parametrize(
    ("total", "fps", "wanted", "expected"),
    [
        (11, 4.0, None, [0, 2, 5, 8, 10]),
        (3, 30.0, None, [0, 1, 2]),
        (100, 25.0, None, [0, 14, 28, 42, 57, 71, 85, 99]),
        (100, 25.0, 1.0, [0, 33, 66, 99]),
    ],
)
def test_sampling_by_hand(total, fps, wanted, expected):
    assert published_video_processor().sample(total, fps, sample_fps=wanted) == expected


def test_the_longest_clips():
    processor = published_video_processor()
    assert (len(processor.sample(3000, 30.0)), len(processor.sample(40000, 24.0))) == (200, 768)
    with pytest.raises(InputError, match="num_frames is 12, but 11 frames"):
        processor.sample(11, 4.0, count=12)


@given(st.integers(1, 5000), st.floats(0.5, 240), st.none() | st.floats(0.1, 60))
def test_sampling_equals_the_reference(total, fps, wanted):
    metadata = SimpleNamespace(total_num_frames=total, fps=fps)
    expected = reference.Qwen3VLVideoProcessor.sample_frames(SAMPLER, metadata, fps=wanted)
    found = published_video_processor().sample(total, fps, sample_fps=wanted)
    assert found == expected.tolist()
    assert all(low < high for low, high in itertools.pairwise(found)), "a decoder could not go backwards"


@given(st.integers(1, 3000), st.data())
def test_a_number_of_frames_equals_the_reference(total, data):
    count = data.draw(st.integers(1, min(total, 768)))
    metadata = SimpleNamespace(total_num_frames=total, fps=24.0)
    sampler = SimpleNamespace(**{**vars(SAMPLER), "fps": None})
    expected = reference.Qwen3VLVideoProcessor.sample_frames(sampler, metadata, num_frames=count)
    assert published_video_processor().sample(total, 24.0, count=count) == expected.tolist()


def test_sizes_by_hand():
    assert smart_resize_video(20, 1080, 1920, **BOUNDS) == (832, 1472)
    assert smart_resize_video(768, 1080, 1920, **BOUNDS) == (128, 224)
    assert smart_resize_video(6, 60, 80, **BOUNDS) == (64, 64)
    assert published_video_processor().grid(20, 1920, 1080) == (10, 52, 92)  # 11,960 tokens
    capped = VideoProcessor(VISION, PixelSettings(4096, 25165824), max_tokens_per_frame=768)
    frames, height, width = capped.grid(20, 1920, 1080)
    assert frames * height * width // 4 == 7200


@given(
    st.integers(1, 800), st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(4096, 25165824), (8192, 9000)])
)
def test_sizes_equal_the_reference(num_frames, height, width, bounds):
    ours = {"factor": 32, "temporal": 2, "min_pixels": bounds[0], "max_pixels": bounds[1]}
    theirs = {"factor": 32, "temporal_factor": 2, "min_pixels": bounds[0], "max_pixels": bounds[1]}
    try:
        expected = reference.smart_resize(num_frames, height, width, **theirs)
    except ValueError:
        with pytest.raises(InputError):
            smart_resize_video(num_frames, height, width, **ours)
    else:
        assert smart_resize_video(num_frames, height, width, **ours) == expected


@given(st.lists(st.integers(0, 40000), min_size=1, max_size=9, unique=True).map(sorted), st.floats(0.5, 240))
def test_times_equal_the_reference(frames, fps):
    expected = Qwen3VLProcessor._calculate_timestamps(None, list(frames), fps, 2)
    assert timestamps(frames, fps, 2) == expected


def test_times_by_hand():
    assert timestamps([0, 2, 5, 8, 10], 4.0, 2) == [0.25, 1.625, 2.5]
    assert [f"{time:.1f}" for time in timestamps([0, 1, 2, 3], 2.0, 2)] == ["0.2", "1.2"]  # ties go to even


@pytest.mark.parametrize(("num_frames", "height", "width"), [(4, 64, 96), (5, 64, 96), (2, 96, 32)])
def test_patches_equal_the_reference_where_nothing_is_resized(num_frames, height, width):
    frames = noise_frames(num_frames, height, width)
    videos = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None]
    expected, *grid = reference.Qwen3VLVideoProcessor.patchify(None, (videos.float() - 127.5) / 127.5, 16, 2, 2)
    processor = published_video_processor()
    patches, found = processor.patches(iter(frames), num_frames, processor.grid(num_frames, width, height))
    assert found == tuple(grid)
    assert torch.equal(patches, expected[0])


GOLDEN = {
    (11, 60, 80): "ba594b6924c7b4fb7e1db646e829d92c5c3108ea8d7c2e531f2aa4a09f7da602",
    (4, 200, 300): "f53d5b72fa7cb4a295997293ddd97d143c7d16127ea4fe537f8ba1e819c1aa4f",
    (3, 33, 47): "59f069d95d5570bfbabac8ea4758703f7a8c03172a7c5a25463c81374769e2e4",
    (2, 20, 500): "eb00f5704bccb7b654c974c9e46a3d9b18bbdaca653ccd5cf63306a08f6dc1f3",
}
"""(frames, height, width) -> SHA-256 of the patches that the reference gives for these frames."""


@pytest.mark.parametrize("size", GOLDEN)
def test_resized_patches_equal_the_reference(size):
    (num_frames, height, width), processor = size, published_video_processor()
    patches, _ = processor.patches(noise_frames(*size), num_frames, processor.grid(num_frames, width, height))
    assert hashlib.sha256(patches.numpy().tobytes()).hexdigest() == GOLDEN[size]


def test_frames_that_do_not_fit_are_refused():
    processor, frames = published_video_processor(), noise_frames(4, 64, 64)
    with pytest.raises(InputError, match="3 of 4 frames can be decoded"):
        processor.patches(frames[:3], 4, (2, 4, 4))
    with pytest.raises(InputError, match="not all of one size"):
        processor.patches([*frames[:3], noise_frames(1, 64, 96)[0]], 4, (2, 4, 4))
    with pytest.raises(InputError, match="more than its header says"):
        processor.patches(frames, 3, (2, 4, 4))
    with pytest.raises(InputError, match="at least 2 frames, this one has 1"):
        processor.grid(1, 64, 64)
    with pytest.raises(InputError, match="one side is more than 200 times the other"):
        processor.grid(4, 64000, 64)


def test_settings_come_from_the_folder(tmp_path):
    vision: VisionConfig = VISION
    assert VideoProcessor.from_folder(tmp_path, vision) is None
    path = tmp_path / "video_preprocessor_config.json"
    good = {"size": {"shortest_edge": 4096, "longest_edge": 65536}, "fps": 1, "min_frames": 2, "max_frames": 6}
    path.write_text(json.dumps(good))
    processor = VideoProcessor.from_folder(tmp_path, vision)
    assert processor is not None
    assert (processor.sample(100, 10.0), processor.grid(4, 640, 640)) == ([0, 20, 40, 59, 79, 99], (2, 8, 8))
    path.write_text(json.dumps({**good, "cap_pixels_per_frame": True, "max_video_tokens": 9}))
    processor = VideoProcessor.from_folder(tmp_path, vision)
    assert processor is not None
    assert processor.grid(4, 640, 640) == (2, 6, 6)
    for wrong in (
        {"fps": 0},
        {"fps": "2"},
        {"max_frames": 2.5},
        {"min_frames": True},
        {"do_sample_frames": False},
        {"num_frames": 8},
        {"patch_size": 14},
        {"image_std": [0, 1, 1]},
        {"size": {"shortest_edge": 1}},
    ):
        path.write_text(json.dumps({**good, **wrong}))
        with pytest.raises(CheckpointError, match=r"video_preprocessor_config.json: "):
            VideoProcessor.from_folder(tmp_path, vision)
    nested = {"image_processor": {}, "video_processor": good}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert VideoProcessor.from_folder(tmp_path, vision) is not None


class CountingDecoder(MediaDecoder):
    """Frames of one colour, and whether the last iterator was closed."""

    num_images = 0
    is_closed = False

    def image(self, data: bytes, *, stop: StopSignal | None = None, notes=None) -> np.ndarray:
        self.num_images += 1
        return np.full((64, 64, 3), data[0], np.uint8)

    def video_frames(self, data: bytes, indices, *, stop: StopSignal | None = None, notes=None):
        try:
            for _ in indices:
                yield np.zeros((64, 64, 3), np.uint8)
        finally:
            self.is_closed = True


def item(frames: tuple[int, ...], *, is_frame_list: bool, size: tuple[int, int] | None = None) -> VisualItem:
    return VisualItem(
        modality="video",
        digest="",
        num_bytes=1,
        grid=(1, 4, 4),
        num_rows=4,
        offset=0,
        param="",
        frames=frames,
        is_frame_list=is_frame_list,
        size=size,
    )


def test_frames_that_are_equal_are_decoded_once():
    decoder, processor = CountingDecoder(), published_video_processor()
    data = pack_frames([b"a", b"a", b"b", b"b", b"a"])
    patches, grid = processor.pixels(data, item((0, 1, 2, 3, 4), is_frame_list=True), decoder)
    assert (grid, decoder.num_images) == ((3, 4, 4), 3)
    first, second, third = patches.view(3, -1)[:, 0].tolist()
    assert first == third != second


@pytest.mark.parametrize("is_frame_list", [False, True])
def test_frames_that_are_not_as_announced_are_a_fault_of_ours(is_frame_list):
    decoder, processor = CountingDecoder(), published_video_processor()
    data = pack_frames([b"a", b"b"])
    processor.pixels(data, item((0, 1), is_frame_list=is_frame_list, size=(64, 64)), decoder)
    with pytest.raises(ServerError, match=r"the video is 64 x 64 pixels, .* \(64, 96\)"):
        processor.pixels(data, item((0, 1), is_frame_list=is_frame_list, size=(64, 96)), decoder)


def test_a_failure_takes_no_more_frames_and_lets_the_decoder_go(monkeypatch):
    decoder, processor = CountingDecoder(), published_video_processor()
    monkeypatch.setattr(processor, "_transform", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        processor.pixels(b"", item((0, 1), is_frame_list=False), decoder)
    assert decoder.is_closed, caught
