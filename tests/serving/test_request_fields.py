"""Every row of the table of fields holds: what is built has an effect, what is refused is named, the rest has none."""

from __future__ import annotations

import base64
import copy
from typing import Any

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.sampling_params import OPTIONS, body_fields
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.media.video import VideoInfo
from qwen3vl_disagg.processing import ChatTemplate, Processor, Prompt
from qwen3vl_disagg.processing.prompt_options import PromptOptions
from qwen3vl_disagg.processing.request_fields import CHAT, CLOSED, FIELDS, IGNORED, BuiltField, Place, RefusedField
from tests.support.fake_backend import ASK, PATH, FakeBackend, serve, tiny_processor
from tests.support.images import png, uri

LARGE, CLIP = png((640, 480)), b"99 24 640 480"
FUNCTION = {"type": "function", "function": {"name": "f"}}
NOT_NULL = [{"a": [1]}, "text", 7, True, [0]]


class Clips(MediaDecoder):
    """Clips whose bytes say what they are: frames, rate, width, height."""

    def probe_video(self, data: bytes, *, stop: StopSignal | None = None) -> VideoInfo:
        num_frames, fps, width, height = data.split()
        return VideoInfo("mp4", int(width), int(height), int(num_frames), float(fps))


def with_template(change=lambda source: source) -> Processor:
    processor = copy.copy(tiny_processor())
    processor.decoder = Clips()
    processor.folder = None  # no children
    source = change(processor.template._source)
    processor.template = ChatTemplate(source, list(processor.tokenizer.special_ids))
    return processor


PROCESSOR = with_template()
CLIENT = serve(FakeBackend(), processor=PROCESSOR)
"""For whom it does not matter what others ask."""


def clip(data: bytes = CLIP) -> str:
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


def asked(processor: Processor = PROCESSOR, **fields: Any) -> tuple[Any, ...]:
    """All that a request comes to: ids, what is seen of the media, sampling, and the answer's fields."""
    backend = FakeBackend()
    reply = serve(backend, processor=processor).post(PATH, json={**ASK, **fields})
    assert reply.status_code == 200, reply.text
    handle = backend.handles[0]
    text = "".join(line for line in reply.text.splitlines() if "data:" in line) if fields.get("stream") else ""
    body = text or {k: v for k, v in reply.json().items() if k not in ("id", "created", "timings")}
    return handle.prompt.token_ids, handle.prompt.items, handle.prompt.media, handle.sampling, body, reply.headers


def said(processor: Processor = PROCESSOR, **fields: Any) -> tuple[Any, ...]:
    return asked(processor, **fields)[:5]


def refused(place: str, **fields: Any) -> None:
    reply = CLIENT.post(PATH, json={**ASK, **fields})
    assert reply.status_code == 400, (place, fields, reply.text)
    error = reply.json()["error"]
    assert error["param"] == place
    assert place.rpartition(".")[2].split("[")[0] in error["message"]


MEDIA = [{"role": "user", "content": [{"type": "image", "image": uri(LARGE)}, {"type": "video", "video": clip()}]}]
SAMPLING: dict[str, tuple[dict[str, Any], Any]] = {
    spelling: ({option.switch["chat"]: True} if "chat" in option.switch else {}, option.example)
    for name, option in OPTIONS.items()
    for spelling in option.spellings(name, "chat")
} | {option.switch["chat"]: ({}, True) for option in OPTIONS.values() if "chat" in option.switch}
# Field -> (what else the request says, the value that makes a difference)
REQUEST: dict[str, tuple[dict[str, Any], Any]] = {
    **SAMPLING,
    "messages": ({}, [{"role": "user", "content": "other"}]),
    "model": ({}, "tiny"),  # without effect when it is right; another name is a 404
    "stream": ({}, True),
    "stream_options": ({"stream": True}, {"include_usage": True}),
    "tools": ({}, [FUNCTION]),
    "tool_choice": ({"tools": [FUNCTION]}, "none"),
    "parallel_tool_calls": ({"tools": [FUNCTION]}, False),
    "response_format": ({}, {"type": "json_object"}),
    "structured_outputs": ({}, {"regex": "a+"}),
    **{name: ({}, {"type": "object"}) for name in ("json_schema", "format", "guided_json")},
    **{name: ({}, "a+") for name in ("regex", "guided_regex")},
    **{name: ({}, ["a", "b"]) for name in ("choice", "guided_choice")},
    **{name: ({}, 'start: "a"') for name in ("grammar", "ebnf", "guided_grammar")},
    "guided_json_object": ({}, True),
    "return_token_ids": ({}, True),
    "cache_salt": ({"messages": MEDIA}, "of my own"),
    "add_generation_prompt": ({}, False),
    "continue_final_message": ({"messages": [*ASK["messages"], {"role": "assistant", "content": "It is a"}]}, True),
    "mm_processor_kwargs": ({"messages": MEDIA}, {"max_pixels": 4096}),
    "media_io_kwargs": ({"messages": MEDIA}, {"video": {"num_frames": 6}}),
    **{name: ({"messages": MEDIA}, 8192) for name in ("max_pixels", "total_pixels")},
    "min_pixels": ({"messages": [{"role": "user", "content": [{"type": "image", "image": uri(png())}]}]}, 1024),
    "resized_height": ({"messages": MEDIA, "resized_width": 64}, 64),
    "resized_width": ({"messages": MEDIA, "resized_height": 64}, 64),
    "detail": ({"messages": MEDIA}, "low"),
    "fps": ({"messages": MEDIA}, 4),
    **{name: ({"messages": MEDIA}, 6) for name in ("num_frames", "nframes", "max_frames")},
    "min_frames": ({"messages": MEDIA}, 20),
    "do_sample_frames": ({"messages": MEDIA}, False),
    **{name: ({"messages": MEDIA}, 2) for name in ("video_start", "video_end")},
}
THINKING = ("chat_template_kwargs", "enable_thinking", "think", "reasoning", "reasoning_effort")
TOGETHER = {("resized_height", "resized_width"), ("resized_width", "resized_height")}


def test_the_examples_are_all_of_the_built_fields():
    built = {name for name, treatment in FIELDS["request"].items() if isinstance(treatment, BuiltField)}
    assert built == REQUEST.keys() | set(THINKING)


def test_what_the_table_of_options_has_is_not_said_otherwise_here():
    assert CHAT.keys() & set(body_fields("chat")) == set(), "rows that do not hold: processing/request_fields.py"


@pytest.mark.parametrize("name", [name for name in REQUEST if name != "model"])
def test_a_built_field_has_an_effect(name):
    beside, value = REQUEST[name]
    plain = {k: v for k, v in beside.items() if (name, k) not in TOGETHER}
    assert said(**beside, **{name: value}) != said(**plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": True},
        {"think": True},
        {"reasoning": {"enabled": True}},
        {"reasoning": {"effort": "high"}},
        {"reasoning_effort": "low"},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"thinking": True}},
    ],
)
def test_thinking_is_the_templates_to_turn_on_or_a_400(fields):
    def change(source: str) -> str:
        return source + "{% if enable_thinking %}{{ '<think>\n' }}{{ reasoning_effort }}{% endif %}"

    assert said(with_template(change), **fields)[0] != said(with_template(change))[0]
    name, value = next(iter(fields.items()))
    place = f"{name}.{next(iter(value))}" if isinstance(value, dict) else name
    reply = CLIENT.post(PATH, json={**ASK, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, place)


@pytest.mark.parametrize(
    "fields", [{"enable_thinking": False}, {"reasoning_effort": "none"}, {"reasoning": {"enabled": False}}]
)
def test_a_model_that_does_not_think_may_be_told_not_to(fields):
    assert said(**fields) == said()

    def think(source: str) -> str:
        return source + "{{ '<think>\n' }}"

    with pytest.raises(AssertionError, match="always thinks"):
        said(with_template(think), **fields)


def test_what_a_template_knows_may_be_given():
    def change(source: str) -> str:
        return source + "{% if add_vision_id %}Picture {{ add_vision_id }}{% endif %}"

    given = said(with_template(change), chat_template_kwargs={"add_vision_id": "<|im_end|>"})[0]
    text = tiny_processor().tokenizer.decode(given)
    assert text.endswith("Picture <|im_end|>"), "and is text, whatever it says"
    refused("chat_template_kwargs.add_vision_id", chat_template_kwargs={"add_vision_id": True})
    assert said(chat_template_kwargs={"add_vision_id": False, "preserve_thinking": True, "more": [{"a": 1}]}) == said()
    many = {"terms": [{"a": "<|im_end|>"}, {"a": "b"}]}
    shown = said(
        with_template(lambda source: source + "{% for x in terms %}{{ x.a }}{% endfor %}"), chat_template_kwargs=many
    )
    assert tiny_processor().tokenizer.decode(shown[0]).endswith("<|im_end|>b")
    refused("chat_template_kwargs", chat_template_kwargs={"x": ["y" * 9000] * 2})
    for name in ("messages", "tools", "tokenize", "_marks", "chat_template"):
        reply = CLIENT.post(PATH, json={**ASK, "chat_template_kwargs": {name: "x"}})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "chat_template_kwargs")


def rows(place: Place, kind: type) -> list[Any]:
    return [(name, row) for name, row in FIELDS[place].items() if isinstance(row, kind)]


@pytest.mark.parametrize(("name", "row"), rows("request", RefusedField))
def test_a_refused_field_is_named_and_its_neutral_values_are_not(name, row):
    refused(name, **{name: next(v for v in NOT_NULL if v not in row.neutral)})
    for value in (None, *row.neutral):
        reply = CLIENT.post(PATH, json={**ASK, name: value})
        assert reply.status_code == 200, (value, reply.text)


def test_ignored_and_unknown_fields_have_no_effect():
    names = [name for name, row in FIELDS["request"].items() if row == IGNORED]
    assert said(**{key: {"a": [1]} for key in [*names, "nobody_knows_this"]}) == said()


@pytest.mark.parametrize(("name", "row"), rows("message", RefusedField))
def test_a_refused_field_of_a_message_is_named(name, row):
    turn = ASK["messages"][0]
    refused(f"messages[0].{name}", messages=[{**turn, name: {"a": [1]}}])
    for value in (None, *row.neutral):
        assert said(messages=[{**turn, name: value}]) == said()


@pytest.mark.parametrize("name", ["image", "images", "image_url", "video", "videos", "video_url", "attachments"])
@pytest.mark.parametrize("place", ["request", "message", "text part", "part without a type"])
def test_no_picture_is_left_out_in_silence(name, place):
    value = [uri(LARGE)] if name.endswith("s") else uri(LARGE)
    part = {"text": "?"} if place == "part without a type" else {"type": "text", "text": "?"}
    turn = {"role": "user", "content": [{**part, name: value} if "part" in place else part]}
    if place == "message":
        turn[name] = value
    beside = {name: value} if place == "request" else {}
    param = {"request": name, "message": f"messages[0].{name}"}.get(place, f"messages[0].content[0].{name}")
    refused(param, messages=[turn], **beside)


def test_a_part_is_one_picture_and_nothing_else():
    part = PART["image part"]
    for name, value in {"text": "describe it", "image": uri(png()), "url": uri(png())}.items():
        with pytest.raises(InputError) as caught:
            seen({**part, name: value})
        assert caught.value.param == f"messages[0].content[0].{name}"
    with pytest.raises(InputError) as caught:
        seen({"type": "image_url", "image_url": {"url": uri(LARGE), "data": "aGk="}})
    assert caught.value.param == "messages[0].content[0].image_url.data"
    assert seen({**part, "image": part["image_url"], "url": None, "text": None}) == seen(part)


def test_null_beside_the_url_does_not_undo_what_stands_within():
    low = {"type": "image_url", "image_url": {"url": uri(LARGE), "detail": "low"}}
    assert seen({**low, "detail": None}) == seen(low) != seen(PART["image part"])


def test_a_flag_says_whether_and_an_effort_how_much():
    def change(source: str) -> str:
        return source + "{% if enable_thinking %}{{ '<think>\n' }}{{ reasoning_effort }}{% endif %}"

    processor = with_template(change)
    for flag in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert said(processor, **flag, reasoning_effort="medium") == said(processor)
    low = said(processor, reasoning_effort="low")
    assert said(processor, think=True, reasoning_effort="low") == low != said(processor, think=True)
    reply = serve(FakeBackend(), processor=processor).post(
        PATH, json={**ASK, "think": True, "reasoning_effort": "none"}
    )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "reasoning_effort")
    assert said(enable_thinking=False, reasoning_effort="high") == said()


# ---- parts ----

PART: dict[Place, dict[str, Any]] = {
    "image part": {"type": "image_url", "image_url": uri(LARGE)},
    "clip part": {"type": "video_url", "video_url": clip()},
    "text part": {"type": "text", "text": "?"},
}
IMAGE_EXAMPLES = {"max_pixels": 4096, "min_pixels": 1024, "detail": "low", "resized_height": 64, "resized_width": 64}
CLIP_EXAMPLES = {
    "detail": "low",
    "min_pixels": 9000,
    "max_pixels": 4096,
    "total_pixels": 8192,
    "resized_height": 64,
    "resized_width": 64,
    "fps": 4,
    "min_frames": 20,
    "num_frames": 6,
    "nframes": 6,
    "max_frames": 6,
    "video_start": 2,
    "video_end": 2,
    "do_sample_frames": False,
}
SMALL: dict[Place, dict[str, Any]] = {
    "image part": {"type": "image_url", "image_url": uri(png())},
    "clip part": {"type": "video_url", "video_url": clip(b"99 24 64 64")},
}
SOURCES = ("type", "image_url", "image", "video_url", "video", "url", "base64", "data", "text")
OF_LISTS = ("sample_fps", "raw_fps")


def seen(*parts: Any, **fields: Any) -> Prompt:
    messages = [{"role": "user", "content": list(parts)}]
    return PROCESSOR.prepare(messages, options=PromptOptions.read(fields))


@pytest.mark.parametrize("place", PART)
def test_a_parts_rows_hold(place):
    part, plain = PART[place], seen(PART[place])
    examples = {"image part": IMAGE_EXAMPLES, "clip part": CLIP_EXAMPLES, "text part": {}}[place]
    for name, row in FIELDS[place].items():
        if row == IGNORED:
            assert seen({**part, name: {"a": 1}}) == plain
        elif isinstance(row, RefusedField):
            for value in (None, *row.neutral):
                assert seen({**part, name: value}) == plain
            with pytest.raises(InputError) as caught:
                seen({**part, name: {"a": 1}})
            assert (caught.value.param, caught.value.code) == (f"messages[0].content[0].{name}", "not_built_yet")
        elif name not in SOURCES + OF_LISTS:
            part = SMALL[place] if name == "min_pixels" else PART[place]
            plain = seen(part)
            two = {n: 64 for n in ("resized_height", "resized_width") if n.startswith(name[:7]) and "resized" in name}
            assert seen({**part, **two, name: examples[name]}) != plain, name
            nested = {part["type"]: {"url": part[part["type"]], **two, name: examples[name]}}
            assert seen({**part, **nested}) == seen({**part, **two, name: examples[name]}), "also beside the url"
            with pytest.raises(InputError) as caught:
                seen({**part, name: {"a": 1}})
            assert caught.value.param == f"messages[0].content[0].{name}"


@pytest.mark.parametrize("place", ["image part", "clip part"])
@pytest.mark.parametrize(
    "name", ["max_pixel", "frame_rate", "target_size", "image_resolution", "videoStart", "crop_box"]
)
def test_a_strange_name_about_media_is_refused(place, name):
    with pytest.raises(InputError) as caught:
        seen({**PART[place], name: 5})
    assert caught.value.param == f"messages[0].content[0].{name}"


@pytest.mark.parametrize("name", OF_LISTS)
def test_rates_of_lists_of_frames(name):
    part = {"type": "video", "video": [uri(png())] * 4}
    assert seen({**part, name: 2}) == seen({**part, "fps": 2}) != seen(part)


@pytest.mark.parametrize(("name", "kept", "broken"), [("max_frames", 4, 3), ("min_frames", 4, 5)])
def test_bounds_of_frames_hold_for_lists_or_are_a_400(name, kept, broken):
    part = {"type": "video", "video": [uri(png())] * 4}
    assert seen({**part, name: kept}) == seen(part)
    with pytest.raises(InputError, match="it has 4 frames") as caught:
        seen({**part, name: broken})
    assert caught.value.param == "messages[0].content[0]"


@pytest.mark.parametrize(
    ("fields", "equal"),
    [
        ({"mm_processor_kwargs": {"max_pixels": 4096}}, ({"max_pixels": 4096}, {})),
        ({"mm_processor_kwargs": {"images_kwargs": {"min_pixels": 21000}}}, ({"min_pixels": 21000}, {})),
        ({"mm_processor_kwargs": {"fps": 4}}, ({}, {"fps": 4})),
        ({"mm_processor_kwargs": {"videos_kwargs": {"fps": [4.0]}}}, ({}, {"fps": 4})),
        ({"mm_processor_kwargs": {"videos_kwargs": {"num_frames": 6}}}, ({}, {"num_frames": 6})),
        ({"mm_processor_kwargs": {"do_sample_frames": False}}, ({}, {"do_sample_frames": False})),
        ({"media_io_kwargs": {"video": {"num_frames": 6}}}, ({}, {"num_frames": 6})),
        ({"media_io_kwargs": {"video": {"num_frames": 500}}}, ({}, {"num_frames": 99})),
        ({"media_io_kwargs": {"video": {"fps": 4, "num_frames": -1}}}, ({}, {"fps": 4})),
        ({"media_io_kwargs": {"video": {"fps": 4, "num_frames": 10}}}, ({}, {"fps": 4, "max_frames": 10})),
        ({"max_pixels": 4096}, ({"max_pixels": 4096}, {"max_pixels": 4096})),
        ({"fps": 4, "video_end": 3}, ({}, {"fps": 4, "video_end": 3})),
        ({"nframes": 7}, ({}, {"num_frames": 8})),
    ],
)
def test_what_stands_beside_the_messages_is_what_stands_in_the_parts(fields, equal):
    image, video = PART["image part"], PART["clip part"]
    assert seen(image, video, **fields) == seen({**image, **equal[0]}, {**video, **equal[1]})
    other = {**video, "num_frames": 12}, {**image, "detail": "high", "max_pixels": 9216}
    kept = seen(*other, **{name: fields[name] for name in fields if name != "max_pixels"})
    assert kept.items[0].frames == seen(other[0]).items[0].frames or "video_end" in fields
    assert kept.items[1].grid == seen(other[1]).items[0].grid, "a part goes before the request"


def test_size_is_of_an_image_or_of_all_frames_together():
    size = {"shortest_edge": 4096, "longest_edge": 8192}
    prompt = seen(PART["image part"], PART["clip part"], mm_processor_kwargs={"size": size})
    unit = PROCESSOR.image.factor**2
    image, video = prompt.items
    assert 4096 <= image.num_rows * unit <= 8192
    assert len(video.frames) // 2 * video.num_rows // video.grid[0] * 2 * unit <= max(8192, len(video.frames) * unit)
    assert video.num_rows < seen(PART["clip part"]).items[0].num_rows


@pytest.mark.parametrize("place", CLOSED)
def test_closed_places_name_what_they_do_not_know(place):
    inner: dict[str, Any] = {"max_dynamic_tiles": 3}
    where = {
        "mm_processor_kwargs": inner,
        "images_kwargs": {"images_kwargs": inner},
        "videos_kwargs": {"videos_kwargs": inner},
    }
    if place in where:
        nested = "" if place == "mm_processor_kwargs" else f".{place}"
        refused(f"mm_processor_kwargs{nested}.max_dynamic_tiles", mm_processor_kwargs=where[place])
    else:
        modality = place.rpartition(".")[2]
        refused(f"media_io_kwargs.{modality}.max_dynamic_tiles", media_io_kwargs={modality: inner})
    for name, row in FIELDS[place].items():
        if isinstance(row, RefusedField) and place == "mm_processor_kwargs":
            refused(f"{place}.{name}", mm_processor_kwargs={name: "other"})
            assert said(mm_processor_kwargs=dict.fromkeys([name], row.neutral[0])) == said()


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"min_pixels": 10**6}, "this server takes at most"),
        ({"max_pixels": 5}, "one visual token has"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "more than max_pixels"),
        ({"resized_height": 2000, "resized_width": 2000}, "the limit is"),
        ({"resized_height": 6400, "resized_width": 1}, "one side is more than"),
        ({"resized_height": 64}, "go together"),
        ({"max_pixels": 0}, "whole number"),
        ({"max_pixels": -1}, "whole number"),
        ({"max_pixels": True}, "whole number"),
        ({"max_pixels": "9"}, "whole number"),
        ({"detail": "tiny"}, "one of auto"),
    ],
)
@pytest.mark.parametrize("place", ["image part", "clip part"])
def test_sizes_that_cannot_be_are_refused(place, part, text):
    with pytest.raises(InputError, match=text) as caught:
        seen({**PART[place], **part})
    assert caught.value.param.startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"video_start": 5}, "two frames"),
        ({"video_start": 2, "video_end": 1}, "video_start is 2"),
        ({"video_start": 2, "video_end": 2.01}, "two frames"),
        ({"video_start": -1}, "must be a number"),
        ({"min_frames": 9, "max_frames": 8}, "more than max_frames"),
        ({"min_frames": 769}, "at most 768"),
        ({"nframes": 6, "num_frames": 6}, "the same"),
        ({"fps": 2, "num_frames": 6}, "exclude one another"),
        ({"do_sample_frames": False, "fps": 2}, "nothing to say"),
        ({"do_sample_frames": 1}, "true or false"),
        ({"nframes": 100}, "99 frames"),
    ],
)
def test_samplings_that_cannot_be_are_refused(part, text):
    with pytest.raises(InputError, match=text):
        seen({**PART["clip part"], **part})


def test_pixels_come_out_in_the_size_that_was_asked_for():
    """The encode side follows the prompt: other pixels, other rows, other entries of its caches."""
    prompt = seen(PART["image part"], {**PART["image part"], "max_pixels": 4096})
    for item, data in zip(prompt.items, prompt.media, strict=True):
        patches, grid = PROCESSOR.image.pixels(data, item)
        assert grid == item.grid
        assert len(patches) == item.num_rows * PROCESSOR.config.vision.merge_unit
    assert prompt.items[0].content != prompt.items[1].content
