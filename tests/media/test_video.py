"""Clips in this process: what is counted, in which order and colours frames come, and what is refused."""

from __future__ import annotations

import io
import sys
from fractions import Fraction

import numpy as np
import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.video import probe_video, sniff_container, video_frames
from tests.support.media_bytes import SIZE, clip, encode, joined, picture
from tests.support.media_clips import moving, small_jpeg, with_hidden_frame, without_first

av = pytest.importorskip("av")


def every_frame(data: bytes) -> list[np.ndarray]:
    return list(video_frames(data, range(probe_video(data).num_frames)))


def test_frames_come_in_the_order_in_which_they_are_shown():
    levels = [30 + 20 * i for i in range(10)]
    frames = [np.full((64, 96, 3), level, np.uint8) for level in levels]
    data = clip(frames=frames, options={"bf": "3", "b_strategy": "0"})
    with av.open(io.BytesIO(data)) as container:
        order = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert order != sorted(order)  # frames refer ahead, so the file has them in another order
    got = [float(frame.mean()) for frame in every_frame(data)]
    assert np.abs(np.array(got) - levels).max() < 4
    picked = [float(frame.mean()) for frame in video_frames(data, [2, 3, 9])]
    assert picked == [got[2], got[3], got[9]]


def test_colours_are_those_of_the_reference():
    data = clip(frames=moving(6), pix_fmt="yuv420p")
    with av.open(io.BytesIO(data)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(every_frame(data), expected, strict=True))


@pytest.mark.parametrize(("turn", "corner"), [(0, "tl"), (90, "bl"), (180, "br"), (-90, "tr"), (30, "tl")])
def test_quarter_turns_are_applied(turn, corner):
    frame = np.full((64, 96, 3), 250, np.uint8)
    frame[:24, :32] = 0
    data = clip(frames=[frame] * 3, turn=turn)
    info, shown = probe_video(data), every_frame(data)[1]
    assert shown.shape == (info.height, info.width, 3) == ((96, 64, 3) if abs(turn) == 90 else (64, 96, 3))
    corners = {"tl": shown[4, 4], "tr": shown[4, -4], "br": shown[-4, -4], "bl": shown[-4, 4]}
    assert [name for name, level in corners.items() if level.max() < 100] == [corner]


def test_a_hidden_frame_is_not_counted():
    data = with_hidden_frame()
    assert probe_video(data).num_frames == 7
    assert len(every_frame(data)) == 7


@pytest.mark.parametrize(
    ("codec", "options", "first", "num_frames"),
    [
        ("libx264", {"bf": "0"}, 3, 16),
        ("libx264", {"bf": "3", "b_strategy": "0"}, 3, 16),
        ("libx264", {"bf": "3", "b_strategy": "0", "x264-params": "open-gop=1:scenecut=0"}, 3, 16),
        ("libx264", {"bf": "3", "b_strategy": "0", "x264-params": "open-gop=1:scenecut=0"}, 5, 16),  # begins with a key
        ("libx264", {"bf": "0", "x264-params": "intra-refresh=1"}, 3, 12),
        ("mpeg4", {}, 3, 21),  # its decoder takes what is gone for grey
    ],
)
@pytest.mark.parametrize("form", ["matroska", "mov"])
def test_a_clip_cut_between_key_frames_has_the_frames_that_are_shown(codec, options, first, num_frames, form):
    whole = clip(codec, "matroska", frames=moving(24), options={"g": "8", **options})
    assert probe_video(whole).num_frames == 24
    data = without_first(whole, first, form)
    assert probe_video(data).num_frames == num_frames
    with av.open(io.BytesIO(data)) as container:
        assert len(list(container.decode(video=0))) == num_frames
    assert len(every_frame(data)) == num_frames


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_vp8_or_vp9_clip_cut_between_key_frames_is_refused(codec):
    whole = clip(codec, "webm", frames=moving(12), options={"g": "8"})
    with pytest.raises(InputError, match="damaged"):
        probe_video(without_first(whole, 3, "webm"))


@pytest.mark.parametrize(("rate", "fps"), [(8, 8.0), (Fraction(30000, 1001), 30000 / 1001), (Fraction(1, 2), 0.5)])
def test_the_average_rate(rate, fps):
    assert probe_video(clip(rate=rate)).fps == pytest.approx(fps, rel=1e-3)


def test_the_size_may_not_change():
    data = joined([small_jpeg(SIZE)] * 4 + [small_jpeg((64, 64))] * 2)
    assert probe_video(data).num_frames == 6
    assert len(list(video_frames(data, [0, 3]))) == 2
    with pytest.raises(InputError, match="size of the frames changes"):
        list(video_frames(data, [0, 5]))


def test_a_frame_that_is_not_there():
    frames = video_frames(clip(), [0, 8])
    assert next(frames).shape == (64, 96, 3)
    with pytest.raises(InputError, match="frame 8 is not in the clip"):
        next(frames)


def test_how_much_will_be_decoded_is_told_before():
    told: list[int] = []
    frames = video_frames(clip(), [1, 5], told.append)
    next(frames)
    assert told == [6 * 96 * 64]


def test_without_the_extra(monkeypatch):
    data = clip()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'qwen3vl-disagg\[video\]'"):
        probe_video(data)


@pytest.mark.parametrize(
    ("head", "container"),
    [
        (b"\0\0\0\x20ftypisom", "mp4"),
        (b"\0\0\0\x14ftypqt  ", "mov"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "mov"),
        (b"\x1aE\xdf\xa3\x9fB\x82\x84webm", "webm"),
        (b"\x1aE\xdf\xa3\xa3B\x82\x88matroska", "mkv"),
        (b"RIFF\0\0\0\0AVI LIST", "avi"),
        (b"RIFF\0\0\0\0WEBPVP8 ", None),
        (b"GIF89a", "gif"),
        (b"\x47" + bytes(187) + b"\x47", None),
        (b"", None),
    ],
)
def test_containers_are_told_by_content(head, container):
    assert sniff_container(head) == container


def test_a_cover_picture_is_no_clip():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(encode(picture(), "JPEG"))
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1)
        out.mux(packet)
    with pytest.raises(InputError, match="no video stream"):
        probe_video(buffer.getvalue())
