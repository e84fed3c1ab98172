"""What decoding in a child costs, printed; and the most costly honest files, which must not be cut off."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.images import decode_rgb
from qwen3vl_disagg.processing.patches import PixelTransform
from tests.support.media_bytes import clip

pytestmark = pytest.mark.acceptance


def smooth(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def median_ms(run: Callable[[], object], times: int = 30) -> float:
    took = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return statistics.median(took) * 1e3


def test_a_child_costs_little():
    data = encode(smooth(1024, 1024), "JPEG", quality=90)
    decoder = MediaDecoder(max_children=1)
    started = time.perf_counter()
    decoder.image(data)
    first_ms = (time.perf_counter() - started) * 1e3
    child_ms, here_ms = median_ms(lambda: decoder.image(data)), median_ms(lambda: np.asarray(decode_rgb(data)))
    status = Path(f"/proc/{decoder._idle[0].process.pid}/status").read_text()
    memory = [line for line in status.splitlines() if line.startswith(("VmRSS", "RssAnon"))]
    decoder.close()
    print(f"\n1 megapixel JPEG: child {child_ms:.1f} ms, in process {here_ms:.1f} ms; with the start {first_ms:.0f} ms")
    print(*memory)
    assert child_ms < here_ms + 15


@pytest.mark.parametrize("size", [(1000, 1000), (4000, 3000)])
def test_resizing_costs_less_than_pillows(size):
    levels_HWC, ms = np.asarray(smooth(*size)), {}
    for how in ("torch", "pillow"):
        transform = PixelTransform((0.5,) * 3, (0.5,) * 3, how)
        for target in ((992, 992), (3008, 4000)):
            ms[how, target] = median_ms(lambda transform=transform, target=target: transform(levels_HWC, *target), 7)
    print(f"\n{size} resized and normalised, ms:", {key: round(value, 1) for key, value in ms.items()})
    assert all(ms["torch", target] < ms["pillow", target] for target in ((992, 992), (3008, 4000)))


@pytest.mark.parametrize(("form", "is_flat"), [("PNG", True), ("JPEG", False), ("WEBP", False)])
def test_an_honest_image_of_64_megapixels(form, is_flat):
    size = (8192, 8160)
    image = Image.new("RGB", size) if is_flat else smooth(*size)
    options = {"JPEG": {"progressive": True, "quality": 60}, "WEBP": {"quality": 30, "method": 0}}
    data = encode(image, form, **options.get(form, {}))
    decoder = MediaDecoder(max_children=1)
    started = time.perf_counter()
    assert decoder.image(data).shape == (8160, 8192, 3)
    print(f"\n{form} of {len(data)} bytes, 64 megapixels: {time.perf_counter() - started:.2f} s")
    decoder.close()


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9", "mpeg4"])
def test_an_honest_clip_of_noise(codec):
    pytest.importorskip("av")
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (720, 1280, 3), dtype=np.uint8) for _ in range(60)]
    options = {"libx264": {"preset": "superfast"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}
    data = clip(codec, "matroska", frames=frames, options=options.get(codec))
    decoder = MediaDecoder(max_children=1)
    started = time.perf_counter()
    assert sum(1 for _ in decoder.video_frames(data, range(60))) == 60
    print(f"\n{codec}, {len(data)} bytes, 60 frames of 1280 x 720: {time.perf_counter() - started:.2f} s")
    decoder.close()
