"""Images: bit-equal to the reference's PIL processor, and one fixed rule for every mode and container."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.images import decode_rgb, probe_image
from qwen3vl_disagg.plan.presets import PRESETS
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.processing.patches import PixelSettings, smart_resize
from tests.support.media_bytes import png_claiming

VISION = PRESETS["30b-a3b"].vision
BOUNDS = {"min_pixels": 65536, "max_pixels": 16777216}
PROCESSOR = ImageProcessor(VISION, PixelSettings(**BOUNDS), resize="pillow")


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def reference():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": BOUNDS["min_pixels"], "longest_edge": BOUNDS["max_pixels"]}
    half = [0.5, 0.5, 0.5]
    return Qwen2VLImageProcessorPil(
        size=size, patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=half, image_std=half
    )


@pytest.mark.parametrize(
    ("size", "mode", "form"),
    [
        ((300, 200), "RGB", "PNG"),
        ((256, 256), "RGB", "BMP"),  # no resize
        ((320, 256), "RGB", "JPEG"),
        ((700, 500), "RGB", "WEBP"),
        ((90, 70), "RGBA", "PNG"),
        ((33, 47), "P", "GIF"),
        ((500, 20), "LA", "PNG"),
        ((100, 100), "L", "PNG"),
        ((64, 300), "1", "PNG"),
        ((200, 100), "CMYK", "JPEG"),
    ],
)
def test_patches_are_bit_equal_to_the_reference(reference, size, mode, form):
    data = encode(noise(*size, mode), form)
    patches, grid = PROCESSOR.pixels(data)
    expected = reference(images=[Image.open(io.BytesIO(data))], return_tensors="pt")
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    assert torch.equal(patches, expected["pixel_values"])
    info = probe_image(data)
    assert (info.width, info.height) == size
    assert PROCESSOR.grid(info.width, info.height) == grid


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((300, 400), (288, 384)),
        ((1080, 1920), (1088, 1920)),
        ((200, 100), (384, 192)),
        ((20, 20), (256, 256)),
        ((33, 47), (224, 320)),
        ((16, 3200), (32, 3648)),
        ((10, 100), (96, 832)),
    ],
)
def test_smart_resize_literals(size, expected):
    assert smart_resize(*size, factor=32, **BOUNDS) == expected


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_smart_resize_is_the_reference_or_refuses(height, width):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match="200 times"):
            smart_resize(height, width, factor=32, **BOUNDS)
        return
    ours = smart_resize(height, width, factor=32, **BOUNDS)
    assert ours == theirs(height, width, factor=32, **BOUNDS)
    assert ours[0] % 32 == ours[1] % 32 == 0
    assert min(ours) >= 32


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_and_known_from_the_header(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (96, 64), "white")
    picture.paste("black", (0, 0, 24, 16))  # a mark in the top left corner
    data = encode(picture, form, exif=exif)
    shown = decode_rgb(data)
    info = probe_image(data)
    assert (info.width, info.height) == shown.size == ((96, 64) if orientation < 5 else (64, 96))
    corners = {"tl": (2, 2), "tr": (-3, 2), "br": (-3, -3), "bl": (2, -3)}
    dark = [name for name, (x, y) in corners.items() if sum(shown.getpixel((x % shown.width, y % shown.height))) < 200]
    assert dark == [["tl", "tr", "br", "bl", "tl", "tr", "br", "bl"][orientation - 1]]


def test_a_header_is_read_without_decoding(monkeypatch):
    notes = PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    data = encode(noise(96, 64), "PNG", pnginfo=notes)

    def refuse(self):
        raise AssertionError("decoded")

    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", refuse)
        infos = [probe_image(data), probe_image(encode(noise(96, 64), "BMP"))]
    assert [(info.width, info.height) for info in infos] == [(64, 96), (96, 64)]
    assert decode_rgb(data).size == (64, 96)


def test_a_camera_file_of_several_pictures_shows_the_first():
    second = Image.new("RGB", (64, 64), "blue")
    data = encode(Image.new("RGB", (96, 64), "red"), "MPO", save_all=True, append_images=[second])
    assert probe_image(data).width == 96
    red, green, blue = decode_rgb(data).getpixel((5, 5))
    assert red > 240 > 15 > max(green, blue)


def test_transparency_is_white_in_every_mode():
    rgba = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    assert decode_rgb(encode(rgba)).getpixel((5, 5)) == (255, 255, 255)
    half = Image.new("LA", (40, 40), (0, 128))
    assert decode_rgb(encode(half)).getpixel((5, 5))[0] in (126, 127, 128)
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert decode_rgb(encode(palette, transparency=0)).getpixel((5, 5)) == (255, 255, 255)
    assert decode_rgb(encode(palette)).getpixel((5, 5)) == (10, 20, 30)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(64, 0)
    data = encode(Image.fromarray(ramp))
    greys = np.asarray(decode_rgb(data))[0, :, 0].astype(int)
    assert greys.tolist() == list(range(256))


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(data).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "message", "status"),
    [
        (b"", "empty", 400),
        (b"hello, I am a png", "not an image", 400),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image", 400),
        (b"%PDF-1.4", "not an image", 400),
        (encode(noise(64, 64), "PCX"), "not an image", 400),
        (png_claiming(40000, 30000), "pixels", 400),
        (png_claiming(9000, 8000), "pixels, the limit", 400),
        (encode(noise(1, 300)), "200 times", 400),
        (b"\0" * (20 * 2**20 + 1), "bytes, the limit", 413),
    ],
)
def test_headers_are_enough_to_refuse(data, message, status):
    with pytest.raises(InputError, match=message) as caught:
        probe_image(data)
    assert caught.value.status == status
    assert "0x" not in caught.value.message


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_picture_that_is_cut_off_is_refused(form):
    data = encode(noise(200, 200), form)
    with pytest.raises(InputError, match=r"damaged|not an image"):
        PROCESSOR.pixels(data[: len(data) // 2])


@given(st.data())
def test_flipped_bytes_never_raise_anything_else(data):
    good = bytearray(encode(noise(48, 48), data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        info = probe_image(bytes(good))
        patches, grid = PROCESSOR.pixels(bytes(good))
    except InputError:
        return
    assert PROCESSOR.grid(info.width, info.height) == grid
    assert patches.isfinite().all()


def test_a_decoder_gives_the_same_patches():
    data, decoder = encode(noise(300, 200, "RGBA")), MediaDecoder(max_children=1)
    patches, grid = PROCESSOR.pixels(data, decoder=decoder)
    decoder.close()
    assert grid == PROCESSOR.pixels(data)[1]
    assert torch.equal(patches, PROCESSOR.pixels(data)[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (31, 17)])
def test_tiny_pictures_are_scaled_up(size):
    _, grid = PROCESSOR.pixels(encode(noise(*size)))
    assert grid[1] * grid[2] * 256 >= BOUNDS["min_pixels"]


def test_settings_come_from_the_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json is missing"):
        ImageProcessor.from_folder(tmp_path, VISION)
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": {"shortest_edge": 4096, "longest_edge": 8192}, "patch_size": 16}')
    processor = ImageProcessor.from_folder(tmp_path, VISION)
    assert processor.bounds == PixelSettings(4096, 8192)
    path.write_text('{"size": {"shortest_edge": "a"}, "patch_size": 14}')
    with pytest.raises(CheckpointError, match=r"3 problem"):
        ImageProcessor.from_folder(tmp_path, VISION)
    nested = {"image_processor": {"min_pixels": 1024, "max_pixels": 2048, "image_mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    processor = ImageProcessor.from_folder(tmp_path, VISION)
    assert processor.bounds == PixelSettings(1024, 2048, mean=(0.1, 0.2, 0.3))
    assert processor.settings()["image_mean"] == "(0.1, 0.2, 0.3)"


@pytest.mark.parametrize(
    "wrong",
    [
        {"do_rescale": False},
        {"rescale_factor": 1.0},
        {"resample": 2},
        {"image_std": "a"},
        {"image_mean": [0.5]},
        {"size": [1, 2]},
        {"size": {"shortest_edge": 8, "longest_edge": 16}},
    ],
)
def test_settings_that_we_would_not_follow_are_refused(tmp_path, wrong):
    good = {"size": {"shortest_edge": 4096, "longest_edge": 8192}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(good | wrong))
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: "):
        ImageProcessor.from_folder(tmp_path, VISION)
