"""What every viewer shows: BMP whose fourth byte nobody filled in, GIF smaller than its screen, AVIF and TIFF."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.images import decode_rgb, probe_image
from tests.support.media_bytes import encode, exif, picture


def bmp_of_four(pixels: list[tuple[int, int, int, int]], header: int, masks: tuple[int, ...]) -> bytes:
    """One row of (blue, green, red, alpha) behind a header of 40 to 124 bytes; bit fields where masks are given."""
    rows = b"".join(map(bytes, pixels))
    compression = 3 if masks else 0
    info = struct.pack("<IiiHHIIiiII", header, len(pixels), 1, 1, 32, compression, len(rows), 0, 0, 0, 0)
    fields = struct.pack(f"<{len(masks)}I", *masks)
    behind = fields if header == 40 else fields.ljust(header - 40, b"\0")
    offset = 14 + 40 + len(behind)
    return struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset) + info + behind + rows


MASKS = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
SWAPPED = (0xFF, 0xFF00, 0xFF0000, 0xFF000000)


@pytest.mark.parametrize("header", [56, 108, 124])
@pytest.mark.parametrize("masks", [MASKS, SWAPPED])
def test_a_bmp_without_alpha_anywhere_is_opaque(header, masks):
    data = bmp_of_four([(10, 20, 30, 0), (200, 100, 50, 0)], header, masks)
    expected = [[30, 20, 10], [50, 100, 200]] if masks == MASKS else [[10, 20, 30], [200, 100, 50]]
    assert np.asarray(decode_rgb(data)).tolist() == [expected]


@pytest.mark.parametrize("header", [56, 108, 124])
def test_a_bmp_with_some_alpha_is_over_white(header):
    data = bmp_of_four([(10, 20, 30, 0), (200, 100, 50, 255), (0, 0, 0, 128)], header, MASKS)
    assert np.asarray(decode_rgb(data)).tolist() == [[[255, 255, 255], [50, 100, 200], [127, 127, 127]]]


@pytest.mark.parametrize(
    ("header", "masks"), [(40, ()), (40, MASKS[:3]), (52, MASKS[:3]), (108, ()), (124, (*MASKS[:3], 0))]
)
def test_a_fourth_byte_that_is_not_declared_as_alpha_is_none(header, masks):
    data = bmp_of_four([(10, 20, 30, 0), (200, 100, 50, 128)], header, masks)
    assert np.asarray(decode_rgb(data)).tolist() == [[[30, 20, 10], [50, 100, 200]]]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_elsewhere_what_is_transparent_everywhere_shows_nothing(form):
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(form, {})
    data = encode(Image.new("RGBA", (16, 16), (200, 0, 0, 0)), form, **options)
    assert (np.asarray(decode_rgb(data)) == 255).all()


@pytest.mark.parametrize("has_transparency", [False, True])
def test_a_gif_is_transparent_where_its_first_picture_is_not(has_transparency):
    levels = np.full((20, 30), 5, np.uint8)
    levels[:, 15:] = 7
    options = {"transparency": 7} if has_transparency else {}
    data = bytearray(encode(Image.fromarray(levels), "GIF", **options))
    at = next(i for i in range(13 + 3, len(data)) if data[i : i + 9] == b"\x2c" + struct.pack("<4H", 0, 0, 30, 20))
    data[6:10] = struct.pack("<HH", 64, 48)
    data[at + 1 : at + 5] = struct.pack("<HH", 10, 8)
    shown = np.asarray(decode_rgb(bytes(data)))
    inside = np.full((20, 30, 3), 5)
    inside[:, 15:] = 255 if has_transparency else 7
    assert (shown[8:28, 10:40] == inside).all()
    shown = shown.copy()
    shown[8:28, 10:40] = 255
    assert (shown == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["AVIF", "TIFF"])
def test_all_orientations(form, orientation):
    options = {"exif": exif(orientation), "quality": 100} if form == "AVIF" else {"tiffinfo": {274: orientation}}
    data = encode(picture((40, 24)), form, **options)
    turned = Image.Exif()
    turned[0x0112] = orientation
    source = picture((40, 24))
    source.info["exif"] = turned.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(source)).astype(int)
    shown, info = decode_rgb(data), probe_image(data)
    assert (info.format, info.width, info.height) == (form, *shown.size)
    assert abs(np.asarray(shown).astype(int) - expected).max() <= (0 if form == "TIFF" else 12)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("is_inverted", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_greys_of_a_tiff(order, is_inverted, bits):
    if (order, is_inverted, bits) == (">", True, 16):  # Pillow has no mode for it
        pytest.skip("the library does not read it")
    values = [value * (257 if bits == 16 else 1) for value in (0, 100, 255)]
    levels = struct.pack(order + ("3H" if bits == 16 else "3B"), *values)
    tags = [(256, 3), (257, 1), (258, bits), (259, 1), (262, 0 if is_inverted else 1)]
    tags += [(273, 8), (277, 1), (278, 1), (279, len(levels))]
    head = b"II*\0" if order == "<" else b"MM\0*"
    at = 8 + len(levels) + len(levels) % 2
    directory = struct.pack(order + "H", len(tags))
    for tag, value in tags:
        directory += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    data = head + struct.pack(order + "I", at) + levels.ljust(at - 8, b"\0") + directory + bytes(4)
    shown = np.asarray(decode_rgb(data))[0, :, 0].tolist()
    assert shown == ([255, 155, 0] if is_inverted else [0, 100, 255])


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_modes_of_a_tiff(mode, compression):
    image = picture((40, 24), mode)
    try:
        data = encode(image, "TIFF", compression=compression)
    except (OSError, RuntimeError):  # JPEG of a palette or of single bits
        pytest.skip("not a combination that can be written")
    if compression != "jpeg":
        png = decode_rgb(encode(image, "PNG")) if mode == "RGBA" else image.convert("RGB")
        assert np.array_equal(decode_rgb(data), png)
    assert decode_rgb(data).size == (40, 24)


def test_the_first_page_counts():
    pages = [picture((40, 24)), picture((16, 16))]
    for form in ("TIFF", "AVIF"):
        assert probe_image(encode(pages[0], form, save_all=True, append_images=[pages[0].rotate(180)])).width == 40
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(decode_rgb(data), pages[0])


@pytest.mark.parametrize("mode", ["F", "I"])
def test_levels_that_viewers_do_not_show_alike_are_refused(mode):
    with pytest.raises(InputError, match="damaged"):
        decode_rgb(encode(picture((40, 24)).convert(mode), "TIFF"))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b"  <svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"II+\0\x08\0\0\0", "BigTIFF"),
    ],
)
def test_what_is_not_taken_is_told_by_name(data, name):
    with pytest.raises(InputError, match=f"not an image of an allowed format .*this is {name}"):
        probe_image(data)


def test_sizes_are_bounded_by_the_header():
    tiff = bytearray(encode(picture((40, 24)), "TIFF"))
    at = next(i for i in range(len(tiff)) if tiff[i : i + 2] == b"\0\1" and tiff[i + 4 : i + 8] == b"\1\0\0\0")
    tiff[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 2**31)
    avif = bytearray(encode(picture((40, 24)), "AVIF"))
    at = avif.index(b"ispe") + 8
    avif[at : at + 8] = struct.pack(">II", 60000, 60000)
    for data in (bytes(tiff), bytes(avif)):
        with pytest.raises(InputError, match="pixels, the limit"):
            probe_image(data)


@given(st.sampled_from(["AVIF", "TIFF"]), st.data())
def test_flipped_bytes_never_raise_anything_else(form, data):
    good = bytearray(FLIPPED[form])
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    del good[data.draw(st.integers(1, len(good))) :]
    try:
        probe_image(bytes(good))
    except InputError:
        return


FLIPPED = {form: encode(picture((40, 24)), form) for form in ("AVIF", "TIFF")}


def test_children_decode_them_too():
    decoder = MediaDecoder(max_children=1)
    for form in ("AVIF", "TIFF"):
        data = encode(picture((200, 120)), form)
        assert np.array_equal(decoder.image(data), decode_rgb(data))
        with pytest.raises(InputError, match="damaged"):
            decoder.image(data[: len(data) * 9 // 10] if form == "AVIF" else data[: len(data) // 2])
    decoder.close()
