"""Headers: sizes as the pixels have them, little work for hostile ones, nothing but one kind of error."""

from __future__ import annotations

import contextlib
import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.image_headers import BadHeader, ImageHeader, exif_orientation, read_header
from qwen3vl_disagg.media.images import decode_rgb, probe_image
from tests.support.media_bytes import after_start, encode, exif, picture, png, segment
from tests.support.media_hostile import HOSTILE_IMAGES
from tests.support.media_images import GOOD_IMAGES, jpeg

SMALL = {name: make() for name, (make, _) in GOOD_IMAGES.items() if "itself" not in name and "pieces" not in name}


@pytest.mark.parametrize("name", HOSTILE_IMAGES)
def test_a_hostile_header_costs_little(name):
    data = HOSTILE_IMAGES[name][0]()
    started = time.process_time()
    with contextlib.suppress(InputError):  # either way, but quickly
        probe_image(data)
    assert time.process_time() - started < 0.1


def test_a_profile_of_many_lines_costs_little():
    body = b"Raw profile type exif\0" + b"\n" * 19_000_000
    png = encode(picture(), "PNG")
    data = png[:33] + struct.pack(">I4s", len(body), b"tEXt") + body + bytes(4) + png[33:]
    started = time.process_time()
    assert probe_image(data).width == 96
    assert time.process_time() - started < 0.2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@given(st.data())
def test_flipped_bytes_give_a_size_that_the_pixels_have(data):
    good = bytearray(SMALL[data.draw(st.sampled_from(sorted(SMALL)))])
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, min(len(good), 200) - 1))] = data.draw(st.integers(0, 255))
    try:
        info = probe_image(bytes(good))
        image = decode_rgb(bytes(good))
    except InputError:
        return
    assert (info.width, info.height) == image.size


@given(st.binary(max_size=80), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF"]))
def test_no_bytes_raise_anything_else(tail, head):
    try:
        read_header(head + tail)
    except BadHeader:
        return


@pytest.mark.parametrize("cut", [4, 8, 12, 16, 20, 25, 29])
def test_a_header_that_is_cut_is_none(cut):
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        try:
            assert read_header(encode(picture(), form)[:cut]).format in ("WEBP", "BMP")  # these say it early
        except BadHeader:
            continue


def test_the_first_exif_and_then_xmp_tell_the_orientation():
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="8"/>')
    assert read_header(after_start(jpeg(), xmp)) == ImageHeader("JPEG", 96, 64, 8)
    assert read_header(after_start(jpeg(), xmp, segment(0xE1, exif(3)))).orientation == 3
    both = after_start(jpeg(), segment(0xE1, exif(3)), segment(0xE1, exif(6)))
    assert read_header(both).orientation == 3
    behind = encode(picture(), "PNG")
    assert read_header(behind[:-12] + _chunk_of_exif() + behind[-12:]).orientation == 1  # pixels came before


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (60_000, 60_000)])
def test_a_picture_of_two_sizes_is_refused(size):
    second = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    data = png(np.zeros((64, 64, 3)), chunks=[(b"IHDR", second)])
    assert probe_image(data).width == 64
    with pytest.raises(InputError, match="damaged"):
        decode_rgb(data)


def _chunk_of_exif() -> bytes:
    body = exif(6).removeprefix(b"Exif\0\0")
    return struct.pack(">I4s", len(body), b"eXIf") + body + bytes(4)


@pytest.mark.parametrize(
    ("block", "orientation"),
    [
        (exif(6), 6),
        (exif(6).removeprefix(b"Exif\0\0"), 6),
        (exif(6, order=">"), 6),
        (exif(0), 1),
        (exif(9), 1),
        (exif(6)[:20], None),
        (b"", None),
        (b"II*\0\xff\xff\xff\xff", None),
        (b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 4, 1, 8), 8),  # four bytes wide
        (b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 2, 1, 8), 1),  # a text is no orientation
        (b"II*\0" + struct.pack("<IH", 8, 0), None),
    ],
)
def test_orientation_of_exif(block, orientation):
    assert exif_orientation(block) == orientation
