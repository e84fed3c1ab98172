"""Files that a viewer shows whole, or most of, though their last bytes are missing or a part is damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.images import decode_rgb
from tests.support.media_bytes import after_start, chunk, encode, exif

GREY = 128
SIZE = (160, 120)


def busy(mode: str = "RGB") -> Image.Image:
    """Blocks of random colours, so that a file's bytes are spread over its rows, and no two rows of blocks alike."""
    blocks = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).convert(mode)


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(busy(), "JPEG"),
    "jpeg full chroma": lambda: encode(busy(), "JPEG", subsampling=0),
    "jpeg grey": lambda: encode(busy("L"), "JPEG"),
    "jpeg CMYK": lambda: encode(busy("CMYK"), "JPEG"),
    "jpeg restart marks": lambda: encode(busy(), "JPEG", restart_marker_rows=1),
    "png": lambda: encode(busy(), "PNG"),
    "png alpha": lambda: encode(busy("RGBA"), "PNG"),
    "png palette": lambda: encode(busy("P"), "PNG"),
    "png grey and alpha": lambda: encode(busy("LA"), "PNG"),
    "png 1 bit": lambda: encode(busy("1"), "PNG"),
    "png 16 bits": lambda: encode(Image.fromarray(np.asarray(busy("L")).astype(np.uint16) * 257), "PNG"),
    "gif": lambda: encode(busy("P"), "GIF", interlace=0),
    "bmp": lambda: encode(busy(), "BMP"),
    "bmp palette": lambda: encode(busy("P"), "BMP"),
    "webp": lambda: encode(busy(), "WEBP"),
    "webp alpha": lambda: encode(busy("RGBA"), "WEBP"),
}


@pytest.fixture(scope="module")
def decoder():
    decoder = MediaDecoder(max_children=1)
    yield decoder
    decoder.close()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.15])
def test_what_is_there_of_a_cut_file_is_shown(name, share):
    data, notes = FILES[name](), list[str]()
    whole = np.asarray(decode_rgb(data)).astype(int)
    shown = np.asarray(decode_rgb(data[: round(len(data) * (1 - share))], notes)).astype(int)
    [note] = notes
    assert "missing" in note
    rows = (abs(shown - whole).max(axis=2) < 3).mean(axis=1)
    if name.startswith("bmp"):
        rows = rows[::-1]  # stored from the bottom up
    num_good = int(np.cumprod(rows == 1).sum())
    assert num_good >= (1 - 1.6 * share) * len(rows) - 25
    grey = (shown == GREY).all(axis=2).all(axis=1)
    assert grey.sum() >= (1 - 0.5) * share * len(rows) - 25
    if share == 0.15:
        assert grey.any()
    assert not grey[-num_good if name.startswith("bmp") else 0 :][:num_good].any()


@pytest.mark.parametrize("name", FILES)
def test_what_lacks_most_of_its_picture_is_refused(name):
    data = FILES[name]()
    for share in (0.5, 0.7, 0.9):
        with pytest.raises(InputError, match=r"damaged|not an image"):
            decode_rgb(data[: round(len(data) * (1 - share))])


@pytest.mark.parametrize("options", [{}, {"lossless": True}])
def test_what_takes_most_bytes_is_not_most_of_a_picture(options):
    """All detail is in the upper tenth: what is there of the bytes says little of the rows."""
    levels = np.full((120, 160, 3), 200, dtype=np.uint8)
    levels[:12] = np.random.default_rng(0).integers(0, 256, (12, 160, 3))
    data = encode(Image.fromarray(levels), "WEBP", **options)
    with pytest.raises(InputError, match="damaged"):
        decode_rgb(data[: round(len(data) * 0.8)])


ENDS: dict[str, tuple[str, int, str]] = {
    "jpeg": ("jpeg", 2, "lacks its end"),
    "jpeg, half an end mark": ("jpeg", 1, "lacks its end"),
    "jpeg grey": ("jpeg grey", 2, "lacks its end"),
    "jpeg CMYK": ("jpeg CMYK", 2, "lacks its end"),
    "png without its last chunk": ("png", 12, "lacks its end"),
    "png without its last checksum": ("png", 16, "lacks its end"),
    "gif without its last byte": ("gif", 1, "lacks its end"),
    "webp without its last byte": ("webp", 1, "lacks its end"),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_file_that_lacks_its_end_alone_is_whole(case):
    name, count, words = ENDS[case]
    data, notes = FILES[name](), list[str]()
    assert np.array_equal(decode_rgb(data[:-count], notes), decode_rgb(data))
    assert [words in note for note in notes] == [True]


def test_a_progressive_jpeg_is_whole_if_less_fine():
    data = encode(busy(), "JPEG", progressive=True)
    whole = np.asarray(decode_rgb(data)).astype(int)
    for share, off in ((0.0, 1), (0.1, 30), (0.3, 80)):
        notes = list[str]()
        shown = np.asarray(decode_rgb(data[: round(len(data) * (1 - share)) - 2], notes))
        assert abs(shown.astype(int) - whole).mean() < off
        assert "finer detail" in notes[0]
    first_scan = data[: data.index(b"\xff\xda") + 40]
    with pytest.raises(InputError, match="damaged"):
        decode_rgb(first_scan)


def broken(data: bytes, kind: bytes) -> bytes:
    """A PNG with another checksum behind this chunk."""
    at = data.index(kind)
    (length,) = struct.unpack(">I", data[at - 4 : at])
    end = at + 4 + length
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"pHYs", b"eXIf", b"tIME", b"prVt"])
def test_a_wrong_checksum_in_a_chunk_beside_the_picture(kind):
    good = encode(busy(), "PNG")
    body = {b"zTXt": b"a\0\0\0", b"iTXt": b"a\0\0\0\0\0a", b"eXIf": exif(1)[6:], b"gAMA": b"\0\0\xb1\x8f"}
    extra = chunk(kind, body.get(kind, b"a\0some text"))
    for data in (good[:33] + extra + good[33:], good[:-12] + extra + good[-12:]):
        notes = list[str]()
        assert np.array_equal(decode_rgb(broken(data, kind), notes), decode_rgb(good))
        assert notes in ([], [f"damaged chunks of the file were skipped: {kind.decode()}"])
        if data.index(kind) < data.index(b"IDAT"):
            assert notes


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE"])
def test_a_wrong_checksum_in_what_the_picture_needs(kind):
    with pytest.raises(InputError, match=r"damaged|not an image"):
        decode_rgb(broken(encode(busy("P"), "PNG"), kind))


def test_rows_before_the_damage_are_shown():
    """A PNG whose deflate stream is overwritten at four fifths."""
    data, notes = bytearray(encode(busy(), "PNG", compress_level=1)), list[str]()
    at = len(data) * 4 // 5
    data[at : at + 40] = b"\xff" * 40
    shown, whole = np.asarray(decode_rgb(bytes(data), notes)), np.asarray(busy())
    assert "missing" in notes[0]
    assert (shown == whole).all(axis=2).all(axis=1)[:70].all()


def test_gaps_of_an_interlaced_picture_are_filled_from_beside():
    picture = np.asarray(busy("P"))
    data = encode(Image.fromarray(picture), "GIF", interlace=1)
    notes: list[str] = []
    shown = np.asarray(decode_rgb(data[: len(data) * 9 // 10], notes))
    assert "missing" in notes[0]
    assert not (shown == GREY).all(axis=2).all(axis=1).any()
    assert (shown == np.asarray(decode_rgb(data))).all(axis=2).mean() > 0.85


def test_the_orientation_counts_for_what_is_there():
    data = after_start(encode(busy(), "JPEG"), b"\xff\xe1" + struct.pack(">H", len(exif(8)) + 2) + exif(8))
    shown = np.asarray(decode_rgb(data[: len(data) * 8 // 10]))
    assert shown.shape[:2] == (SIZE[0], SIZE[1])
    assert (shown[:, -2] == GREY).all()  # what was at the bottom is at the right
    assert not (shown[:, 0] == GREY).all()


def test_a_child_tells_it_and_plain_files_have_no_note(decoder):
    for name, make in FILES.items():
        data, notes = make(), list[str]()
        assert np.array_equal(decoder.image(data, notes=notes), decode_rgb(data))
        assert not notes, name
        cut = data[: len(data) * 9 // 10]
        assert np.array_equal(decoder.image(cut, notes=notes), decode_rgb(cut))
        assert len(notes) == 1


@pytest.fixture(scope="module")
def llm():
    return LLM()


def ask(llm: LLM, *images: bytes):
    content = [{"type": "image", "image": image} for image in images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}
    [answer] = llm.chat([[message]], SamplingParams(max_new_tokens=2))
    return [item.note for item in answer.timings.items]


def test_the_answer_says_it_each_time(llm):
    """Also when the rows come from a cache, and when none are sent because the prompt's pages are there."""
    good, cut = FILES["jpeg"](), FILES["jpeg"]()[:-2]
    first = ask(llm, good, cut)
    assert first[0] == ""
    assert "lacks its end" in first[1]
    assert ask(llm, good, cut) == first
    assert ask(llm, cut, good) == first[::-1]


def test_frames_of_a_list_say_it_too(llm):
    frames = [encode(busy(), "PNG"), encode(busy().transpose(Image.Transpose.ROTATE_180), "PNG")[:-12]]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "What happens?"}]
    [answer] = llm.chat([[{"role": "user", "content": content}]], SamplingParams(max_new_tokens=2))
    assert "lacks its end" in answer.timings.items[0].note
