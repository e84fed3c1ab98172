"""Messages with clips -> ids: the reference's, with and without the pair around a clip; bad clips by their place."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.images import probe_image
from qwen3vl_disagg.media.stop import Stopped, StopSignal
from qwen3vl_disagg.media.video import VideoInfo
from qwen3vl_disagg.processing import (
    ChatTemplate,
    GenerationDefaults,
    ImageProcessor,
    Processor,
    Tokenizer,
    media_plan,
)
from qwen3vl_disagg.processing.clips import VideoProcessor
from qwen3vl_disagg.processing.messages import has_clips, parse_messages, put_fetched
from qwen3vl_disagg.processing.patches import PixelSettings
from tests.support.clips import VISION, encode_clip, noise_frames, png_frames
from tests.support.random_model import small_config
from tests.support.tokenizer import write_tokenizer


class FakeDecoder(MediaDecoder):
    """Clips whose bytes say what they are: frames, rate, width, height. `seen`: what was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []

    def probe_video(self, data: bytes, *, stop: StopSignal | None = None) -> VideoInfo:
        self.seen.append(data)
        num_frames, fps, width, height = data.split()
        return VideoInfo("mp4", int(width), int(height), int(num_frames), float(fps))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


_MADE: dict[bool, Processor] = {}


@pytest.fixture(scope="module")
def make(folder):
    from dataclasses import replace

    def make(is_wrapped: bool) -> Processor:
        tokenizer = Tokenizer.from_folder(folder)
        names = ("image_pad", "video_pad", "vision_start", "vision_end")
        fields = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {field: tokenizer.token_id(f"<|{name}|>") for field, name in zip(fields, names, strict=True)}
        config = small_config()
        text = replace(config.text, vocab_size=400, max_position_embeddings=60_000)
        config = replace(config, text=text, vision=VISION, **ids)
        return Processor(
            config,
            tokenizer,
            ImageProcessor(VISION, PixelSettings(4096, 65536)),
            ChatTemplate.from_folder(folder, list(tokenizer.special_ids)),
            GenerationDefaults(frozenset({1})),
            video=VideoProcessor(VISION, PixelSettings(4096, 2**20)),
            decoder=FakeDecoder(),
            video_outer_wrapper=is_wrapped,
        )

    return make


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def clip_text(num_frames: int, fps: float, width: int, height: int) -> str:
    """What the reference puts in place of a clip's placeholder."""
    video = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    processing = importlib.import_module("transformers.models.qwen3_vl.processing_qwen3_vl").Qwen3VLProcessor
    sampler = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    indices = video.Qwen3VLVideoProcessor.sample_frames(sampler, SimpleNamespace(total_num_frames=num_frames, fps=fps))
    bounds = {"factor": 32, "min_pixels": 4096, "max_pixels": 2**20}
    height, width = video.smart_resize(len(indices), height, width, **bounds)
    grid = torch.tensor([[-(-len(indices) // 2), height // 16, width // 16]])
    own = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=lambda *args, **kw: processing._calculate_timestamps(None, *args, **kw),
    )
    metadata = SimpleNamespace(fps=fps, frames_indices=indices)
    return processing.replace_video_token(own, {"video_grid_thw": grid, "video_metadata": [metadata]}, 0)


def clip_part(num_frames: int, fps: float, width: int, height: int) -> dict:
    return {"type": "video", "video": f"{num_frames} {fps} {width} {height}".encode()}


CLIPS = st.tuples(st.integers(2, 300), st.sampled_from([1, 2.5, 24, 29.97, 60]), st.integers(30, 300), st.just(120))
PARTS = st.lists(st.text("ab <1.", max_size=5) | CLIPS, min_size=1, max_size=4)


@given(PARTS, st.booleans())
def test_ids_equal_the_reference(make, reference, parts, is_wrapped):
    processor = _MADE.setdefault(is_wrapped, make(is_wrapped))
    content = [clip_part(*p) if isinstance(p, tuple) else {"type": "text", "text": p} for p in parts]
    shown = [{"type": "video"} if isinstance(p, tuple) else {"type": "text", "text": p} for p in parts]
    text = reference.apply_chat_template(
        [{"role": "user", "content": shown}], add_generation_prompt=True, tokenize=False
    )
    pad = "<|video_pad|>"
    slot = pad if is_wrapped else f"<|vision_start|>{pad}<|vision_end|>"
    clips = [clip_text(*p) for p in parts if isinstance(p, tuple)]
    between = text.split(slot)
    assert len(between) == len(clips) + 1
    whole = between[0] + "".join(clip + rest for clip, rest in zip(clips, between[1:], strict=True))
    prompt = processor.prepare([{"role": "user", "content": content}], allow_paths=True)
    assert prompt.token_ids == reference(whole)["input_ids"]
    placeholders = {n for n, i in enumerate(prompt.token_ids) if i == processor.config.video_token_id}
    assert placeholders == {run + k for item in prompt.items for run in item.runs for k in range(item.run_rows)}


def test_a_prompt_by_hand(make):
    processor = make(False)
    [message] = [{"role": "user", "content": [{"type": "text", "text": "a"}, clip_part(11, 4.0, 80, 60)]}]
    prompt = processor.prepare([message], allow_paths=True)
    [item] = prompt.items
    assert (item.frames, item.grid, item.num_rows) == ((0, 2, 5, 8, 10), (3, 4, 4), 12)
    pad = processor.config.video_token_id
    shown = [processor.tokenizer.decode([i]) or str(i == pad) for i in prompt.token_ids if i != pad]
    text = "".join(piece for piece in shown if piece not in ("True", "False"))
    assert text == "user\na<0.2 seconds><1.6 seconds><2.5 seconds>\nassistant\n"
    starts = prompt.token_ids.count(processor.config.vision_start_token_id)
    assert starts == prompt.token_ids.count(processor.config.vision_end_token_id) == 3


def test_a_clip_as_a_file_and_as_a_list_of_its_frames(make, folder):
    frames = noise_frames(6, 64, 96)
    processor = make(False)
    processor.decoder = MediaDecoder()
    listed = [uri(frame) for frame in png_frames(frames)]
    as_list = {"type": "video", "video": listed, "fps": 2}
    as_file = {"type": "video_url", "video_url": {"url": uri(encode_clip(frames, fps=2), "video/mp4")}}
    as_jpegs = {"type": "video_url", "video_url": {"url": jpeg_uri(frames)}}
    found = [processor.prepare([{"role": "user", "content": [part]}]) for part in (as_list, as_file, as_jpegs)]
    assert found[0].token_ids == found[1].token_ids
    assert [(prompt.items[0].grid, prompt.items[0].size) for prompt in found] == [((3, 4, 6), (64, 96))] * 3
    assert "<0.0 seconds>" in processor.tokenizer.decode(found[2].token_ids)  # 24 a second where nothing is said
    for prompt in found:
        patches, grid = processor.video.pixels(prompt.media[0], prompt.items[0], processor.decoder)
        assert grid == (3, 4, 6)
        assert patches.shape == (72, 1536)
    processor.decoder.close()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def jpeg_uri(frames: list[np.ndarray]) -> str:
    encoded = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(encoded)


def png_header(width: int, height: int) -> bytes:
    """What a header says, and no pixels."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = uri(png_frames(noise_frames(1, 64, 64))[0])
BOMB = uri(png_header(4096, 4096))
OTHER = uri(png_frames(noise_frames(1, 64, 96))[0])


@pytest.mark.parametrize(
    ("part", "param", "text"),
    [
        ({"video": [PNG, OTHER]}, "", "must have one size, these have 2"),
        ({"video": [PNG]}, "", "at least 2 frames, this one has 1"),
        ({"video": []}, "", "a list of 0 frames, it may hold 1 to 768"),
        ({"video": [PNG] * 769}, "", "a list of 769 frames"),
        ({"video": [PNG, "data:image/png;base64,AAAA"]}, "", "not an image"),
        ({"video": [PNG, 3]}, "", "the frame's url must be a string"),
        ({"video": [PNG] * 2, "num_frames": 2}, "", "a list of frames is looked at as it is"),
        ({"video": "data:video/jpeg;base64," + "," * 768}, "", "a list of 769 frames"),
        ({"video": "data:video/jpeg;base64,AAAA,@@@@"}, "", "not valid base64"),
        ({"video": "data:" + "video/jpeg;" * 99 + ";base64," + "," * 700}, "", "the image is empty"),
        ({"video": [BOMB] * 129}, "", "the images and frames of this request have 2164260864 pixels"),
        ({"video": b"4000 24 2000 2000", "num_frames": 2}, "", "the clips of this request have 16000000000 pixels"),
        ({"video": b"99 24 640 480", "num_frames": 4, "fps": 1}, "", "exclude one another"),
        ({"video": b"99 24 640 480", "num_frames": 100}, "", "99 frames of this clip can be looked at"),
        ({"video": b"99 24 640 480", "num_frames": 2.5}, ".num_frames", "must be a whole number from 2 to 768"),
        ({"video": b"99 24 640 480", "fps": 0}, ".fps", "must be a number from 0.01 to 240"),
        ({"video": b"99 24 640 480", "fps": True}, ".fps", "must be a number"),
        ({"video": b"99 24 640 480", "fps": float("nan")}, ".fps", "must be a number"),
        ({"video": b"99 24 9000 30"}, "", "one side is more than 200 times the other"),
        ({"video": "http://127.0.0.1/a.mp4"}, "", "URLs are not fetched"),
        ({"video": {"url": "file://elsewhere/a.mp4"}}, "", "on this host"),
    ],
)
def test_bad_clips_name_their_place(make, part, param, text):
    content = [{"type": "text", "text": "?"}, {"type": "video", **part}]
    with pytest.raises(InputError, match=text) as caught:
        make(False).prepare([{"role": "user", "content": content}], allow_paths=True)
    assert caught.value.param == "messages[0].content[1]" + param


def test_a_checkpoint_without_video_settings_takes_none(make):
    processor = make(False)
    processor.video = None
    with pytest.raises(InputError, match=r"takes no videos: it has no video_preprocessor_config\.json"):
        processor.prepare([{"role": "user", "content": [clip_part(9, 1, 64, 64)]}], allow_paths=True)


def test_a_clip_that_does_not_fit_the_context(make):
    clip = {**clip_part(768, 2, 320, 240), "fps": 2}
    with pytest.raises(InputError, match="the context is 60000"):
        make(False).prepare([{"role": "user", "content": [clip] * 16}], allow_paths=True)


def test_a_long_head_is_not_copied_for_each_frame(make):
    """A list of frames in one URI: what it takes is bounded by its own size."""
    head = "data:video/jpeg" + ";" + "a" * 200_000 + ";base64,"
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            make(False).prepare([{"role": "user", "content": [{"type": "video", "video": head + "," * 700}]}])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


def frames_and_clips() -> list[dict]:
    """An image, a list of frames and two clips, each twice, and the first frame of the list is the image."""
    image = {"type": "image_url", "image_url": {"url": PNG}}
    frames = {"type": "video", "video": [PNG, PNG, uri(png_frames(noise_frames(2, 64, 64))[1])]}
    return [image, frames, clip_part(9, 1, 64, 64), clip_part(8, 1, 64, 64)] * 2


@pytest.fixture
def probed(make, monkeypatch):
    """A processor, and the bytes whose headers were looked at."""
    processor = make(False)
    seen = processor.decoder.seen

    def noted(data: bytes):
        seen.append(data)
        return probe_image(data)

    monkeypatch.setattr(media_plan, "probe_image", noted)
    return processor, seen


def test_equal_bytes_are_looked_at_once(probed):
    processor, seen = probed
    messages = [{"role": "user", "content": frames_and_clips()}]
    prompt = processor.prepare(messages, allow_paths=True)
    assert len(seen) == len(set(seen)) == 4
    grids = [item.grid for item in prompt.items]
    assert grids[:4] == grids[4:]
    assert len({item.digest for item in prompt.items}) == 4
    processor.prepare(messages, allow_paths=True)
    assert len(seen) == 8  # of one request: nothing is kept


@pytest.mark.parametrize("after", range(4))
def test_a_stopped_request_looks_at_nothing_more(probed, after, monkeypatch):
    processor, seen = probed
    stop = StopSignal()
    if not after:
        stop.set()

    def stopping(look):
        def look_and_stop(data, **options):
            info = look(data, **options)
            if len(seen) == after:
                stop.set()
            return info

        return look_and_stop

    for owner, name in ((media_plan, "probe_image"), (processor.decoder, "probe_video")):
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    with pytest.raises(Stopped):
        processor.prepare([{"role": "user", "content": frames_and_clips()}], allow_paths=True, stop=stop)
    assert len(seen) == after


def test_the_probe_of_a_clip_gets_the_stop(make, monkeypatch):
    processor, stops = make(False), []

    def probe_video(data, *, stop=None):
        stops.append(stop)
        return VideoInfo("mp4", 64, 64, 9, 1.0)

    monkeypatch.setattr(processor.decoder, "probe_video", probe_video)
    stop = StopSignal(deadline=time.monotonic() + 60)
    processor.prepare([{"role": "user", "content": [clip_part(9, 1, 64, 64)]}], allow_paths=True, stop=stop)
    assert stops == [stop]


@pytest.mark.parametrize(("name", "number"), [("MAX_FILE_PIXELS", 2), ("MAX_STILL_PIXELS", 0)])
def test_pixels_are_bounded_before_the_next_part_is_planned(make, monkeypatch, name, number):
    """Of files of clips and of all else; a thousand parts, also of one clip, take a second to plan."""
    processor, planned, plan = make(False), list[str](), media_plan.MediaPlanner._plan
    monkeypatch.setattr(media_plan, name, 9 * 64 * 64 * 3)
    monkeypatch.setattr(media_plan.MediaPlanner, "_plan", lambda self, entry: planned.append("") or plan(self, entry))
    still = {"type": "image_url", "image_url": {"url": uri(png_frames(noise_frames(1, 256, 512))[0])}}
    content = [*([clip_part(9, 1, 64, 64)] * 2), clip_part(10, 1, 64, 64), *([clip_part(9, 1, 64, 64)] * 50)]
    if name == "MAX_STILL_PIXELS":
        content = [still] * 50
    with pytest.raises(InputError, match=f"pixels to decode up to here, the limit is {9 * 64 * 64 * 3}") as caught:
        processor.prepare([{"role": "user", "content": content}], allow_paths=True)
    assert (caught.value.param, caught.value.status) == (f"messages[0].content[{number}]", 413)
    assert len(planned) == number + 1


TEXT = {"type": "text", "text": "video_url"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"content": "video"}, {"content": [TEXT, {"type": "video", "video": ""}]}], True),
        ([{"content": [{"type": "video_url"}]}], True),
        ([{"content": [TEXT, {"type": "image_url", "image_url": {"url": PNG}}]}], False),
        ([{"content": "video"}, {}, 3, {"content": [3, "video", {"type": ["video"]}, {"type": None}]}], False),
        ({"content": [{"type": "video"}]}, False),
        (None, False),
    ],
)
def test_whether_messages_have_clips(messages, expected):
    assert has_clips(messages) is expected


def test_a_passed_deadline_stops(make):
    messages = [{"role": "user", "content": [clip_part(9, 1, 64, 64)]}]
    with pytest.raises(Stopped):
        make(False).prepare(messages, allow_paths=True, stop=StopSignal(deadline=time.monotonic()))


@pytest.mark.parametrize("is_stopped", [False, True])
def test_bytes_of_one_url_are_read_once_however_many_parts_name_it(probed, is_stopped, monkeypatch):
    processor, seen = probed
    stop, digested = StopSignal(), list[bytes]()

    def sha256(data: bytes):
        digested.append(data)
        if is_stopped:
            stop.set()
        return hashlib.sha256(data)

    monkeypatch.setattr(media_plan, "hashlib", SimpleNamespace(sha256=sha256))
    one, other = (png_frames(noise_frames(1, 64, size))[0] for size in (64, 96))
    urls = ["https://a/1", "https://a/2"] * 50
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}]
    put_fetched(messages, {"https://a/1": one, "https://a/2": other})
    if is_stopped:
        with pytest.raises(Stopped):
            processor.prepare(messages, stop=stop)
        assert digested == [one]
        return
    prompt = processor.prepare(messages, stop=stop)
    assert digested == seen == [one, other]
    assert [item.digest for item in prompt.items] == [hashlib.sha256(data).hexdigest() for data in (one, other)] * 50


def test_the_lists_of_a_request_are_bounded_together():
    """Each alone has no more bytes than a list may."""
    frame = bytes(60 * 2**10)
    clips = [{"type": "video", "video": ["https://a/1"] * 760} for _ in range(2)]
    messages = [{"role": "user", "content": clips}]
    put_fetched(messages, {"https://a/1": frame})
    with pytest.raises(InputError, match=f"all lists up to here have more than {64 * 2**20} bytes") as caught:
        parse_messages(messages)
    assert (caught.value.param, caught.value.status) == ("messages[0].content[1]", 413)
    assert len(parse_messages([{"role": "user", "content": clips[:1]}])[1]) == 1
    assert len(parse_messages(messages, allow_paths=True)[1]) == 2
