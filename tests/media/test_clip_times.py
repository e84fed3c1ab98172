"""When frames are shown: by their packets, whatever the headers say; and clips whose file ends early."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.media.child import ChildFailed
from qwen3vl_disagg.media.decoding import MediaDecoder, _checked
from qwen3vl_disagg.media.video import (
    VideoInfo,
    end_note,
    frame_times,
    probe_video,
    sane_fps,
    sniff_container,
    video_frames,
)
from qwen3vl_disagg.processing.clips import nearest_frames
from tests.processing.test_video import SAMPLER, reference
from tests.support.clips import published_video_processor
from tests.support.media_bytes import clip, ordinary_priority
from tests.support.media_clips import AV1, X265, moving, patched

pytest.importorskip("av")
MS = Fraction(1, 1000)


@pytest.mark.parametrize("rate", [None, Fraction(0), Fraction(-24), Fraction(10**9), Fraction(1, 10**9)])
def test_a_rate_that_makes_no_sense_is_taken_for_none(rate):
    assert sane_fps(rate) == 24.0


@pytest.mark.parametrize("declared", [None, Fraction(25), Fraction(1000), Fraction(1, 5), Fraction(90000)])
def test_an_even_clip_has_the_rate_of_its_packets(declared):
    assert frame_times([100 * i for i in range(100)], MS, declared) == (10.0, ())


@given(
    st.integers(2, 3000),
    st.sampled_from([Fraction(24), Fraction(30000, 1001), Fraction(25), Fraction(60), Fraction(1)]),
)
def test_a_declared_rate_that_is_true_is_kept_to_the_last_bit(num_frames, rate):
    """In whole milliseconds, as Matroska has them."""
    ticks = [round(i * 1000 / rate) for i in range(num_frames)]
    assert frame_times(ticks, MS, rate) == (float(rate), ())


def test_an_uneven_clip_has_the_times_of_its_packets():
    fps, times = frame_times([500, 600, 700, 4500, 10500], MS, Fraction(30))
    assert times == (0.0, 0.1, 0.2, 4.0, 10.0)
    assert fps == 0.4


@pytest.mark.parametrize("ticks", [[None] * 9, [0, None, 2], [7], [], [3, 3, 3]])
def test_without_times_the_declared_rate_counts(ticks):
    assert frame_times(ticks, MS, Fraction(12)) == (12.0, ())


def test_times_far_away_are_bounded():
    fps, _ = frame_times([0, 2**62], Fraction(1), None)
    assert fps == 1 / 1000
    fps, _ = frame_times([0, 1, 2], Fraction(1, 10**9), None)
    assert fps == 1000


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=60, unique=True).map(sorted), st.data())
def test_nearest_frames_rise_and_are_as_many_as_asked_for(ticks, data):
    times = [at - ticks[0] for at in ticks]
    count = data.draw(st.integers(2, len(times)))
    frames = nearest_frames(times, count)
    assert len(frames) == count
    assert frames == sorted(set(frames))
    assert frames[0] == 0
    assert frames[-1] == len(times) - 1
    assert count < len(times) or frames == list(range(len(times)))


def test_what_was_visible_then_is_looked_at():
    """A burst in the first second, then one frame for nine more."""
    times = [i / 10 for i in range(11)] + [10.0]
    assert nearest_frames(times, 3) == [0, 10, 11]


def every(number: int) -> Callable[[int, object], None]:
    """Frames that are that many ms apart; `uneven` where it is 0."""

    def edit(index: int, packet) -> None:
        packet.time_base = MS
        packet.pts = packet.dts = 7000 + (index * number or 40 * index + 2000 * (index // 10))

    return edit


FAST = {"bf": "0"}
MAKE: dict[str, dict] = {
    "mp4": {"container": "mp4", "options": FAST},
    "mov": {"container": "mov", "options": FAST},
    "mkv": {"container": "matroska", "options": FAST},
    "webm VP8": {"codec": "libvpx", "container": "webm"},
    "webm VP9": {"codec": "libvpx-vp9", "container": "webm"},
    "gif": {"codec": "gif", "container": "gif", "pix_fmt": "rgb8"},
}


@pytest.mark.parametrize("name", MAKE)
def test_even_clips_of_each_container(name):
    """100 ms apart, written with 8 a second declared, and beginning at 7 s."""
    info = probe_video(clip(frames=moving(40), edit=every(100), **MAKE[name]))
    assert info.num_frames == 40
    assert info.fps == pytest.approx(10, rel=0.01)
    assert info.times == ()


@pytest.mark.parametrize("name", MAKE)
def test_uneven_clips_of_each_container(name):
    info = probe_video(clip(frames=moving(40), edit=every(0), **MAKE[name]))
    expected = [(40 * i + 2000 * (i // 10)) / 1000 for i in range(40)]
    assert np.allclose(info.times, expected, atol=0.011)
    processor = published_video_processor()
    frames = processor.sample(40, info.fps, times=info.times)
    wanted = np.linspace(0, info.times[-1], len(frames))
    times = np.array(info.times)
    assert len(frames) == int(40 / info.fps * 2)
    assert all(abs(times[frame] - at) <= abs(times - at).min() + 1.7 for frame, at in zip(frames, wanted, strict=True))


def without_rate(data: bytes, duration_ns: int | None = None) -> bytes:
    """A Matroska file that does not say its rate, or another one."""
    at = data.index(b"\x23\xe3\x83\x84")
    if duration_ns is None:
        return data[:at] + b"\xec\x86" + data[at + 2 :]
    return data[: at + 4] + duration_ns.to_bytes(4, "big") + data[at + 8 :]


@pytest.mark.parametrize("duration_ns", [None, 1_000_000, 40_000_000, 2_000_000_000])
@pytest.mark.parametrize("codec", ["libx264", "libvpx"])
def test_ten_seconds_of_matroska_whatever_rate_is_declared(codec, duration_ns):
    data = without_rate(clip(codec, "matroska", frames=moving(100), rate=10), duration_ns)
    info = probe_video(data)
    assert (info.num_frames, info.fps, info.times) == (100, pytest.approx(10), ())
    metadata = SimpleNamespace(total_num_frames=100, fps=10)
    expected = reference.Qwen3VLVideoProcessor.sample_frames(SAMPLER, metadata)
    assert published_video_processor().sample(info.num_frames, info.fps) == expected.tolist()


@pytest.mark.parametrize(
    ("box", "at", "value"),
    [
        (b"mvhd", 20, b"\0\0\0\1"),
        (b"mvhd", 20, b"\x7f\xff\xff\xff"),
        (b"mdhd", 20, b"\0\0\0\1"),
        (b"tkhd", 24, b"\0\0\0\1"),
    ],
)
def test_a_wrong_duration_in_an_mp4(box, at, value):
    info = probe_video(patched(clip(frames=moving(40), rate=10), box, at, value))
    assert (info.num_frames, info.fps, info.times) == (40, pytest.approx(10), ())


@pytest.fixture(scope="module")
def llm():
    return LLM()


def test_times_in_the_prompt_are_those_of_the_packets(llm):
    """An uneven clip, turned by a quarter; rows, grid and frames agree between prompt and encode worker."""
    data = clip(frames=moving(40), edit=every(0), turn=90, **MAKE["mp4"])
    part = {"type": "video", "video": data}
    prompt = llm.processor.prepare([{"role": "user", "content": [part]}], allow_paths=True)
    [item] = prompt.items
    text = llm.processor.tokenizer.decode(prompt.token_ids)
    shown = [float(value) for value in re.findall(r"<([0-9.]+) seconds>", text)]
    times = [(40 * i + 2000 * (i // 10)) / 1000 for i in [*item.frames, *item.frames[-1:] * (len(item.frames) % 2)]]
    assert shown == pytest.approx([(a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True)], abs=0.06)
    patches, grid = llm.processor.video.pixels(data, item, llm.processor.decoder)
    assert grid == item.grid
    assert len(patches) == grid[0] * grid[1] * grid[2]


@pytest.mark.parametrize(
    ("start", "end", "frames"), [(2.0, 4.0, range(10, 20)), (None, 0.36, range(10)), (6.0, None, range(30, 40))]
)
def test_a_part_of_an_uneven_clip(llm, start, end, frames):
    data = clip(frames=moving(40), edit=every(0), **MAKE["mp4"])
    part = {"type": "video", "video": data, "fps": 240}
    part |= {"video_start": start} if start is not None else {}
    part |= {"video_end": end} if end is not None else {}
    [item] = llm.processor.prepare([{"role": "user", "content": [part]}], allow_paths=True).items
    assert item.frames == tuple(frames)


# -- files that end early


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """Clips that a player can begin with before all is there."""
    import av

    def in_front(name: str, codec: str = "libx264", **options: str) -> bytes:
        path = Path(tmp_path_factory.mktemp("clips")) / name
        with ordinary_priority(), av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as out:
            stream = out.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.options = {"threads": "1", **options}
            for frame in moving(40):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
        return path.read_bytes()

    return {
        "mp4": in_front("a.mp4"),
        "mp4 that refers ahead": in_front("b.mp4", bf="3"),
        "mp4 HEVC": in_front("c.mp4", "libx265", **X265),
        "mp4 of key frames": in_front("e.mp4", g="1"),
        "mp4 AV1": in_front("d.mp4", "libsvtav1", **AV1),
        **{name: clip(frames=moving(40), rate=10, **make) for name, make in MAKE.items() if name not in ("mp4", "mov")},
        "avi": clip("mpeg4", "avi", frames=moving(40), rate=10),
        "avi H.264": clip("libx264", "avi", frames=moving(40), rate=10),
    }


NAMES = [
    "mp4",
    "mp4 that refers ahead",
    "mp4 HEVC",
    "mp4 AV1",
    "mkv",
    "webm VP8",
    "webm VP9",
    "gif",
    "avi",
    "avi H.264",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_cut_clip_has_the_frames_that_are_there(files, name, share):
    data = files[name][: round(len(files[name]) * (1 - share))]
    whole, info = probe_video(files[name]), probe_video(data)
    assert 20 <= info.num_frames <= whole.num_frames == 40
    assert info.fps == pytest.approx(10, rel=0.06)  # a frame that others refer ahead to may be the missing one
    frames = list(video_frames(data, range(info.num_frames)))
    assert len(frames) == info.num_frames
    for mine, own in zip(frames[:16], video_frames(files[name], range(16)), strict=True):
        assert np.array_equal(mine, own)
    assert "ends early" in end_note(data, sniff_container(data))
    assert not end_note(files[name], sniff_container(files[name]))


def test_a_cut_clip_is_answered_and_said_so(files, llm):
    content = [{"type": "video", "video": files["mp4"][: len(files["mp4"]) * 9 // 10]}, {"type": "text", "text": "?"}]
    for _ in range(2):
        [answer] = llm.chat([[{"role": "user", "content": content}]], SamplingParams(max_new_tokens=1))
        assert "10 % of its bytes are missing" in answer.timings.items[0].note


def test_what_lacks_most_of_its_frames_is_refused(files):
    with pytest.raises(InputError, match=r"cut off: \d+ of its 40 frames"):
        probe_video(files["mp4 of key frames"][: len(files["mp4 of key frames"]) * 4 // 10])


def test_without_its_tables_an_mp4_is_refused():
    with pytest.raises(InputError, match="damaged"):
        probe_video(clip(frames=moving(40))[:-200])


@given(st.binary(max_size=64), st.sampled_from(["mp4", "mov", "mkv", "webm", "avi", "gif"]), st.booleans())
def test_any_bytes_have_an_end(data, container, with_head):
    head = {"mp4": b"\0\0\0\x18ftyp", "mkv": b"\x1aE\xdf\xa3", "avi": b"RIFF"}.get(container, b"") if with_head else b""
    assert isinstance(end_note(head + data, container), str)


@pytest.mark.parametrize("times", [[1.0, 2.0], [0.0, -1.0], [0.0, float("nan")], [0.0, float("inf")], [0.0], [0.0] * 3])
def test_times_that_a_child_makes_up_are_not_believed(times):
    with pytest.raises(ChildFailed):
        _checked(VideoInfo("mp4", 96, 64, 2, 10.0, tuple(times)))


def test_a_child_tells_times():
    decoder = MediaDecoder(max_children=1)
    data = clip(frames=moving(40), edit=every(0), **MAKE["mp4"])
    assert decoder.probe_video(data) == probe_video(data)
    decoder.close()
