"""Headers: sizes as the pixels have them, little work for hostile ones, nothing but one kind of error."""

from __future__ import annotations

import contextlib
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.image_formats import FORMATS, ImageInfo, read_header
from qwen3vl_disagg.media.image_headers import MAX_STEPS, BadHeader, exif_orientation
from qwen3vl_disagg.media.images import decode_rgb, probe_image
from tests.support.media_bytes import after_start, encode, exif, picture, png, segment
from tests.support.media_hostile import HOSTILE_IMAGES
from tests.support.media_images import GOOD_IMAGES, jpeg

SMALL = {name: make() for name, (make, _) in GOOD_IMAGES.items() if "itself" not in name and "pieces" not in name}
SAMPLES = {read_header(data).format: data for data in reversed(SMALL.values())}
"""A good file of each format, the first of the catalogue."""


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
    assert time.process_time() - started < 0.1


class Counted(bytes):
    """Bytes that count how often one of them is looked at."""

    count = 0

    def __getitem__(self, at):
        self.count += 1
        return super().__getitem__(at)


def test_the_parts_of_all_notes_count_together():
    head, end = b"GIF89a\x40\0\x40\0\0\0\0", encode(picture((64, 64), "P"), "GIF")[13 + 768 :]
    many = Counted(head + (b"!\xfe" + b"\1x" * 999 + b"\0") * 100 + end)
    with pytest.raises(BadHeader, match="no picture"):
        read_header(many)
    assert MAX_STEPS <= many.count < MAX_STEPS + 100
    few = head + (b"!\xfe" + b"\1x" * 999 + b"\0") * 9 + end
    assert read_header(few) == ImageInfo("GIF", 64, 64)


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("text", [b"\n" * 2**20, b"\nexif\n 4\n" + b"00" * 2**19, b"\nexif\n 4\n" + b" " * 2**20])
def test_a_short_file_with_a_long_profile_costs_little(kind, text):
    compressed = {b"tEXt": b"\0" + text, b"zTXt": b"\0\0" + zlib.compress(text)}
    body = b"Raw profile type exif" + compressed.get(kind, b"\0\1\0\0\0" + zlib.compress(text))
    data = png(np.zeros((4, 4, 3)), chunks=[(kind, body)])
    took = []
    for _ in range(5):
        started = time.process_time()
        assert read_header(data).orientation == 1
        took.append(time.process_time() - started)
    assert min(took) < 0.003


@pytest.mark.parametrize("width", [72, 73, 10])
def test_a_profile_may_be_as_long_as_exif_can_be(width):
    """The directory stands at the end of 64 KiB, in lines of this many digits."""
    directory = struct.pack("<HHHIHH", 1, 0x0112, 3, 1, 6, 0)
    block = (b"Exif\0\0II*\0" + struct.pack("<I", 2**16 - 6 - len(directory))).ljust(2**16 - len(directory), b"\0")
    digits = (block + directory).hex()
    lines = "\n".join(digits[at : at + width] for at in range(0, len(digits), width))
    text = f"\nexif\n{2**16:8}\n{lines}\n".encode()
    data = png(np.zeros((4, 4, 3)), chunks=[(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))])
    assert read_header(data).orientation == 6


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


@given(st.binary(max_size=80), st.sampled_from([b"", *(data[:n] for data in SAMPLES.values() for n in (4, 8, 12))]))
def test_no_bytes_raise_anything_else(tail, head):
    try:
        read_header(head + tail)
    except BadHeader:
        return


@pytest.mark.parametrize("name", FORMATS)
def test_a_header_that_is_cut_is_none(name):
    data = SAMPLES[name]
    for cut in range(4, 60):
        try:
            found = read_header(data[:cut])
        except BadHeader:
            continue
        assert found == read_header(data), "some say it early"


@pytest.mark.parametrize("name", FORMATS)
def test_of_a_file_that_is_cut_is_shown_what_the_table_says(name):
    data, notes = SAMPLES[name], list[str]()
    with pytest.raises(InputError, match=r"damaged|not an image"):
        decode_rgb(data[: len(data) // 2])
    if FORMATS[name].mending is None:
        with pytest.raises(InputError, match="damaged"):
            decode_rgb(data[: -len(data) // 10])
    else:
        decode_rgb(data[: -len(data) // 20], notes)
        assert len(notes) == 1


def test_the_first_exif_and_then_xmp_tell_the_orientation():
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="8"/>')
    assert read_header(after_start(jpeg(), xmp)) == ImageInfo("JPEG", 64, 96, 8)
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
