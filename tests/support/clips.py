"""Clips made on the spot, and the processor with the published settings."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

from qwen3vl_disagg.model import VisionConfig
from qwen3vl_disagg.processing.clips import VideoProcessor
from qwen3vl_disagg.processing.patches import PixelSettings

VISION = VisionConfig(
    depth=1,
    hidden_size=16,
    num_heads=2,
    intermediate_size=16,
    out_hidden_size=16,
    num_position_embeddings=4,
    deepstack_visual_indexes=(),
)


@functools.cache
def published_video_processor() -> VideoProcessor:
    """The settings of the published video_preprocessor_config.json."""
    return VideoProcessor(VISION, PixelSettings(4096, 25165824))


def noise_frames(num_frames: int, height: int, width: int, *, seed: int = 0) -> list[np.ndarray]:
    """`[H, W, 3]` uint8 each: noise over a slope, so that resizing and the order of frames show."""
    random = np.random.default_rng(seed)
    slope_HW1 = np.linspace(0, 200, height)[:, None, None] + np.linspace(0, 55, width)[None, :, None]
    noise = random.integers(-60, 60, (num_frames, height, width, 3))
    return list(
        np.clip(slope_HW1[None] + noise + 5 * np.arange(num_frames)[:, None, None, None], 0, 255).astype(np.uint8)
    )


def encode_clip(
    frames: list[np.ndarray],
    *,
    fps: int = 8,
    codec: str = "libx264",
    container: str = "mp4",
    options: dict | None = None,
) -> bytes:
    """A real file of these frames."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def png_frames(frames: list[np.ndarray]) -> list[bytes]:
    """Each frame as a PNG."""
    encoded = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded
