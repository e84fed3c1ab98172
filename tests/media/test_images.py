"""Golden pixels: one fixed rule for each mode and container, written out."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from qwen3vl_disagg.media.images import decode_rgb, probe_image
from tests.support.media_bytes import (
    COLOUR,
    COLOUR_ALPHA,
    GREY,
    GREY_ALPHA,
    PALETTE,
    bmp,
    encode,
    exif,
    picture,
    png,
    ycck,
)
from tests.support.media_images import GOOD_IMAGES

PLTE = (b"PLTE", bytes([10, 20, 30, 200, 100, 50, 0, 255, 0, 9, 9, 9]))
BMP_PALETTE = bytes([30, 20, 10, 0, 50, 100, 200, 0])
BMP_ROWS = bytes([3, 2, 1, 30, 20, 10, 0, 0, 6, 5, 4, 60, 50, 40, 0, 0])


def transparent(*values: int) -> list[tuple[bytes, bytes]]:
    return [(b"tRNS", struct.pack(f">{len(values)}H", *values))]


def shown(data: bytes) -> list[str]:
    """The rows of the image, a pixel as rrggbb."""
    levels_HWC = np.asarray(decode_rgb(data))
    return [" ".join(bytes(pixel).hex() for pixel in row) for row in levels_HWC]


GREYS_16 = [[0, 128, 129, 385, 386, 65535]]
TWO_DEEP = [[[0x01FF, 0x0200, 0x0380], [0xC8C8, 0x6464, 0x3232]]]
ALPHAS = [[[0, 0, 0, 0], [200, 100, 50, 128], [200, 100, 50, 255], [200, 100, 50, 1]]]

LOSSLESS = {
    # Fewer than 8 bits are spread over 0 .. 255; 16-bit greys are scaled by 255 / 65535 to the nearest level.
    "1 bit": (png([[0, 1]], 1, GREY), ["000000 ffffff"]),
    "2 bits": (png([[0, 1, 2, 3]], 2, GREY), ["000000 555555 aaaaaa ffffff"]),
    "4 bits": (png([[0, 5, 15]], 4, GREY), ["000000 555555 ffffff"]),
    "8 bits": (png([[0, 5, 15]], 8, GREY), ["000000 050505 0f0f0f"]),
    "16 bits": (png(GREYS_16, 16, GREY), ["000000 000000 010101 010101 020202 ffffff"]),
    # Of 16-bit colours the upper 8 bits count.
    "16-bit colours": (png(TWO_DEEP, 16, COLOUR), ["010203 c86432"]),
    # One transparent level or colour: those pixels are white, whatever the depth.
    "1 bit, black transparent": (png([[0, 1]], 1, GREY, chunks=transparent(0)), ["ffffff ffffff"]),
    "2 bits, one transparent": (png([[0, 1, 2, 3]], 2, GREY, chunks=transparent(2)), ["000000 555555 ffffff ffffff"]),
    "4 bits, one transparent": (png([[0, 5, 15]], 4, GREY, chunks=transparent(5)), ["000000 ffffff ffffff"]),
    "8 bits, one transparent": (png([[0, 5, 15]], 8, GREY, chunks=transparent(5)), ["000000 ffffff 0f0f0f"]),
    "16 bits, one transparent": (
        png(GREYS_16, 16, GREY, chunks=transparent(129)),
        ["000000 000000 ffffff 010101 020202 ffffff"],
    ),
    "colours, one transparent": (
        png([[[1, 2, 3], [200, 100, 50]]], 8, COLOUR, chunks=transparent(200, 100, 50)),
        ["010203 ffffff"],
    ),
    "16-bit colours, one transparent": (
        png(TWO_DEEP, 16, COLOUR, chunks=transparent(0xC8C8, 0x6464, 0x3232)),
        ["010203 ffffff"],
    ),
    # Alpha: (level * alpha + 255 * (255 - alpha)) / 255.
    "alpha": (png(ALPHAS, 8, COLOUR_ALPHA), ["ffffff e3b198 c86432 fffefe"]),
    "16-bit alpha": (png(np.array(ALPHAS) * 257, 16, COLOUR_ALPHA), ["ffffff e3b198 c86432 fffefe"]),
    "grey and alpha": (
        png([[[0, 0], [0, 128], [100, 255], [100, 64]]], 8, GREY_ALPHA),
        ["ffffff 7f7f7f 646464 d8d8d8"],
    ),
    "16-bit grey and alpha": (
        png([[[0, 0], [0, 0x8000], [0x64FF, 65535], [0x6400, 0x4000]]], 16, GREY_ALPHA),
        ["ffffff 7f7f7f 646464 d8d8d8"],
    ),
    # Palettes of every depth, the alpha of each entry composited like any other.
    "palette of 1 bit": (png([[0, 1]], 1, PALETTE, chunks=[PLTE]), ["0a141e c86432"]),
    "palette of 2 bits": (png([[0, 1, 2, 3]], 2, PALETTE, chunks=[PLTE]), ["0a141e c86432 00ff00 090909"]),
    "palette of 4 bits": (png([[0, 1, 2, 3]], 4, PALETTE, chunks=[PLTE]), ["0a141e c86432 00ff00 090909"]),
    "palette and alphas": (
        png([[0, 1, 2, 3]], 8, PALETTE, chunks=[PLTE, (b"tRNS", b"\xff\x80\0")]),
        ["0a141e e3b198 ffffff 090909"],
    ),
    "palette, one transparent": (
        png([[0, 1, 2, 3]], 8, PALETTE, chunks=[PLTE, (b"tRNS", b"\xff\0")]),
        ["0a141e ffffff 00ff00 090909"],
    ),
    # BMP: the fourth byte of 32 bits is no alpha; rows go up unless the height is negative.
    "bmp 24 bits": (bmp(BMP_ROWS, 2, 2, 24), ["040506 28323c", "010203 0a141e"]),
    "bmp from top to bottom": (bmp(BMP_ROWS, 2, -2, 24), ["010203 0a141e", "040506 28323c"]),
    "bmp 32 bits": (bmp(bytes([3, 2, 1, 0, 30, 20, 10, 128]), 2, 1, 32), ["010203 0a141e"]),
    "bmp 16 bits": (bmp(struct.pack("<HH", 0x7C00, 0x03FF), 2, 1, 16), ["ff0000 00ffff"]),
    "bmp 8 bits": (bmp(bytes([1, 0, 1, 0]), 3, 1, 8, palette=BMP_PALETTE), ["c86432 0a141e c86432"]),
    "bmp 1 bit": (bmp(bytes([0b10100000, 0, 0, 0]), 3, 1, 1, palette=BMP_PALETTE), ["c86432 0a141e c86432"]),
    "bmp run lengths": (
        bmp(b"\2\1\1\0\0\1", 3, 1, 8, compression=1, palette=BMP_PALETTE),
        ["c86432 c86432 0a141e"],
    ),
    "webp lossless": (
        encode(Image.fromarray(np.uint8([[[1, 2, 3], [200, 100, 50]]])), "WEBP", lossless=True),
        ["010203 c86432"],
    ),
    "webp alpha": (
        encode(Image.fromarray(np.uint8(ALPHAS)), "WEBP", lossless=True, exact=True),
        ["ffffff e3b198 c86432 fffefe"],
    ),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_lossless_mode_has_its_pixels(name):
    data, expected = LOSSLESS[name]
    assert shown(data) == expected


ORIENTATIONS = {  # of abc / def
    1: ["abc", "def"],
    2: ["cba", "fed"],
    3: ["fed", "cba"],
    4: ["def", "abc"],
    5: ["ad", "be", "cf"],
    6: ["da", "eb", "fc"],
    7: ["fc", "eb", "da"],
    8: ["cf", "be", "ad"],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_has_its_pixels(orientation):
    levels = np.frombuffer(b"abcdef", np.uint8).reshape(2, 3)
    for form in ("PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encode(Image.fromarray(levels).convert("RGB"), form, exif=exif(orientation), **options)
        assert [bytes(row).decode() for row in np.asarray(decode_rgb(data))[..., 0]] == ORIENTATIONS[orientation]
        info = probe_image(data)
        assert (info.format, info.height) == (form, len(ORIENTATIONS[orientation]))


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


CMYK = encode(flat("CMYK", (20, 120, 200, 60)), "JPEG", quality=95)
LOSSY = {
    "jpeg colour": (encode(flat("RGB", (200, 100, 50)), "JPEG", quality=95), (200, 100, 50)),
    "jpeg progressive": (encode(flat("RGB", (200, 100, 50)), "JPEG", quality=95, progressive=True), (200, 100, 50)),
    "jpeg grey": (encode(flat("L", 77), "JPEG", quality=95), (77, 77, 77)),
    # Inks without a profile: red is 255 - (cyan * (255 - black) / 255 + black), and so on; Adobe's are stored inverted.
    "jpeg CMYK": (CMYK, (180, 103, 42)),
    # The same bytes as luma and chroma of the inverted inks, made inks by ITU-R BT.601.
    "jpeg YCCK": (ycck(CMYK), (93, 0, 6)),
    "webp lossy": (encode(flat("RGB", (200, 100, 50)), "WEBP", quality=95), (201, 100, 50)),
}


@pytest.mark.parametrize("name", LOSSY)
def test_every_lossy_mode_has_its_colour(name):
    data, expected = LOSSY[name]
    levels = np.asarray(decode_rgb(data)).astype(int)
    assert np.abs(levels - expected).max() <= 1


def test_interlaced_pixels_are_the_same():
    samples = np.random.default_rng(0).integers(0, 256, (11, 13, 3))
    assert np.array_equal(np.asarray(decode_rgb(png(samples, interlaced=True))), samples)


def test_colour_profiles_are_ignored_as_in_the_reference():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for form in ("JPEG", "PNG", "WEBP"):
        with_profile = encode(picture(), form, icc_profile=profile)
        assert b"XYZ" in with_profile or form == "PNG"
        assert shown(with_profile) == shown(encode(picture(), form))


def test_the_first_of_several_pictures_is_shown():
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    for form in ("GIF", "PNG", "WEBP"):
        data = encode(red, form, save_all=True, append_images=[blue], duration=100, lossless=True)
        assert set(shown(data)) == {" ".join(["ff0000"] * 32)}
    several = encode(red, "MPO", save_all=True, append_images=[blue])
    assert probe_image(several).format == "JPEG"
    assert shown(several) == shown(encode(red, "JPEG"))
    default = encode(red, "PNG", save_all=True, append_images=[blue, blue], default_image=True)
    assert set(shown(default)) == {" ".join(["ff0000"] * 32)}  # what a viewer without animation shows


def test_transparent_pixels_of_a_gif_are_white():
    image = Image.new("P", (2, 1), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    assert shown(encode(image, "GIF")) == ["0a141e c86432"]
    assert shown(encode(image, "GIF", transparency=0)) == ["ffffff c86432"]


def test_the_header_tells_the_size_of_every_good_image():
    for name, (make, size) in GOOD_IMAGES.items():
        info = probe_image(make())
        assert ((info.width, info.height), name) == (size, name)


def test_the_room_needs_no_torch():

    code = (
        "import sys; from qwen3vl_disagg.media import child, decoding, images, video; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'av')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
