"""Every file of the catalogue through a decoding child: what is expected, within 2 s, and the next good one as ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import import_module

import pytest

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.image_formats import FORMATS
from qwen3vl_disagg.media.images import probe_image
from tests.support.media_bytes import SIZE
from tests.support.media_catalogue import CATALOGUE, Entry
from tests.support.media_clips import N, clip
from tests.support.media_images import jpeg

pytest.importorskip("av")
LIMIT_S = 2.0


@pytest.fixture(scope="module")
def decoder() -> Iterator[MediaDecoder]:
    decoder = MediaDecoder(max_children=1)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def good() -> dict[str, bytes]:
    return {"image": jpeg(), "video": clip()}


def outcome(decoder: MediaDecoder, kind: str, data: bytes) -> tuple[tuple[int, int], int | None]:
    """((width, height), frames) of what comes, all frames but of a long clip."""
    if kind == "image":
        height, width, _ = decoder.image(data).shape
        return (width, height), None
    info = decoder.probe_video(data)
    indices = range(info.num_frames) if info.num_frames <= 60 else (0, info.num_frames - 1)
    for frame in decoder.video_frames(data, indices):
        assert frame.shape == (info.height, info.width, 3)
    return (info.width, info.height), info.num_frames


def check(decoder: MediaDecoder, entry: Entry) -> float:
    """What comes of it is what must; the seconds that it takes."""
    data, started = entry.data, time.monotonic()
    if entry.is_good:
        size, num_frames = outcome(decoder, entry.kind, data)
        assert size == entry.size
        assert entry.num_frames in (None, num_frames)
        return time.monotonic() - started
    with pytest.raises(DisaggError) as caught:
        outcome(decoder, entry.kind, data)
    seconds = time.monotonic() - started
    assert caught.value.status == entry.status
    assert entry.message in str(caught.value)
    assert not any(trace in str(caught.value) for trace in ("0x", "/", "\n"))
    return seconds


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_what_comes_of_it(decoder, good, entry: Entry):
    if check(decoder, entry) > LIMIT_S:  # by the file, or by other work on the machine? The file is slow again
        assert check(decoder, entry) < LIMIT_S
    if not entry.is_good:
        started = time.monotonic()
        assert outcome(decoder, entry.kind, good[entry.kind]) == (SIZE, N if entry.kind == "video" else None)
        assert time.monotonic() - started < LIMIT_S


@pytest.mark.parametrize("name", FORMATS)
def test_its_plugins_decode_a_format(name):
    """Children import no other one: what is not there at the start is imported under the file's own bounds."""
    modules = [import_module(f"PIL.{plugin}ImagePlugin") for plugin in FORMATS[name].plugins]
    assert name in {getattr(value, "format", None) for module in modules for value in vars(module).values()}


def test_names_are_names():
    assert len({entry.name for entry in CATALOGUE}) == len(CATALOGUE) >= 70


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_in_the_catalogue(name):
    images = [entry for entry in CATALOGUE if entry.kind == "image" and FORMATS[name].is_one(entry.data)]
    assert [entry for entry in images if entry.is_good and probe_image(entry.data).format == name], "no good file"
    assert [entry for entry in images if not entry.is_good], "no bad file"
