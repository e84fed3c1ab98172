"""What a request says about its prompt beside messages and tools, and how its media are looked at.

Of media: how large they are made, and which frames count. `MediaOptions.of_part` reads a content part, `of_request`
what stands beside the messages; a part goes before the request. Names and meanings are those of qwen-vl-utils (pixels
of one image or frame; `total_pixels` of a clip, two frames counting once) and of transformers (`size`: of an image, or
of all frames of a clip together).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.processing.request_fields import (
    FIELDS,
    FPS,
    FRAMES,
    OneOf,
    Place,
    check_fields,
    check_object,
    read_fields,
    read_flag,
)

_TEMPLATES_OWN = frozenset(
    {"messages", "tools", "documents", "tokenize", "chat_template", "return_dict", "return_tensors", "_marks"}
)
"""What no client may give a template."""
MAX_VARIABLES_CHARS = 2**14
MAX_SALT_CHARS = 1024
_read_effort = OneOf(("none", "minimal", "low", "medium", "high", "xhigh", "max"))
_BOUNDS = ("min_pixels", "max_pixels")
_SIZES = (*_BOUNDS, "resized_height", "resized_width", "total_pixels", "detail", "size_min", "size_max")
_SAMPLING = ("fps", "num_frames", "max_num_frames", "min_frames", "max_frames", "do_sample_frames")


class MediaOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """None: not said. Pixels are those after resizing, of an image or of one frame."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    detail: str | None = None
    size_min: int | None = None
    """`size`: of an image, or of all frames of a clip together; `size_max` likewise."""
    size_max: int | None = None
    total_pixels: int | None = None
    """Of a clip: the frames together, two of them counting once."""
    fps: float | None = None
    """Of a file: frames a second to look at. Of a list: how many it holds."""
    num_frames: int | None = None
    """Of a file: frames to look at, whatever its length; 400 if there are fewer."""
    max_num_frames: int | None = None
    """The same, or as many as there are."""
    min_frames: int | None = None
    max_frames: int | None = None
    do_sample_frames: bool | None = None
    video_start: float | None = None
    """Seconds; so is `video_end`."""
    video_end: float | None = None

    @classmethod
    def of_part(cls, part: Mapping[str, Any], place: Place, where: str) -> MediaOptions:
        """Of a part that has been checked against the table of fields. InputError naming the field."""
        found = read_fields(part, place, where)
        rates = [found.pop(name, None) for name in ("raw_fps", "sample_fps")]
        if found.get("fps") is None:
            found["fps"] = next((rate for rate in rates if rate is not None), None)
        return cls(**_spelled(found, where))

    @classmethod
    def of_request(cls, raw: Mapping[str, Any]) -> tuple[MediaOptions, MediaOptions]:
        """(for images, for clips). InputError naming the field."""
        clip = read_fields(raw, "request")
        image = {name: value for name, value in clip.items() if name in FIELDS["image part"]}
        where = "mm_processor_kwargs"
        processor = check_object(raw.get(where), where)
        for name, value in _read_processor(processor, "mm_processor_kwargs", where).items():
            if name in (*_BOUNDS, "size_min", "size_max"):
                image[name] = value
            if name not in _BOUNDS:
                clip[name] = value
        image |= _read_processor(processor.get("images_kwargs"), "images_kwargs", f"{where}.images_kwargs")
        clip |= _read_processor(processor.get("videos_kwargs"), "videos_kwargs", f"{where}.videos_kwargs")
        _take_media_io(check_object(raw.get("media_io_kwargs"), "media_io_kwargs"), clip)
        return cls(**_spelled(image, "")), cls(**_spelled(clip, ""))

    def over(self, other: MediaOptions) -> MediaOptions:
        """What is said here, and of the other what is about something else: sizes, sampling or the time."""
        values: dict[str, Any] = {}
        for names in (_SIZES, _SAMPLING, ("video_start", "video_end")):
            of_self = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
            values |= of_self or {name: getattr(other, name) for name in names}
        return MediaOptions(**values)


NO_OPTIONS = MediaOptions()


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model shall think before it answers, and which field says so."""

    is_wanted: bool
    param: str
    effort: str | None = None
    """For templates that know one."""


class PromptOptions(msgspec.Struct, frozen=True, kw_only=True):
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The answer goes on where the last message, the assistant's, ends."""
    variables: dict[str, Any] = msgspec.field(default_factory=dict)
    """More for the template, which need not use them."""
    thinking: Thinking | None = None
    cache_salt: str = ""
    """A digest of whose request it is; see `VisualItem.salt`."""
    image: MediaOptions = NO_OPTIONS
    clip: MediaOptions = NO_OPTIONS

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> PromptOptions:
        """Of a chat request. InputError with `param`."""
        variables = dict(check_object(raw.get("chat_template_kwargs"), "chat_template_kwargs"))
        for name in sorted(_TEMPLATES_OWN.intersection(variables)):
            raise InputError(f"{name} is not the request's to say", param="chat_template_kwargs")
        if variables and len(json.dumps(variables)) > MAX_VARIABLES_CHARS:
            problem = f"chat_template_kwargs may have {MAX_VARIABLES_CHARS} characters as JSON"
            raise InputError(problem, param="chat_template_kwargs")
        flags = dict[str, bool]()
        for name, default in (("continue_final_message", False), ("add_generation_prompt", True)):
            where, value = name, raw.get(name)
            if variables.get(name) is not None:
                where, value = f"chat_template_kwargs.{name}", variables[name]
            variables.pop(name, None)
            if value is not None:
                read_flag(value, where)
            if name == "add_generation_prompt" and flags["continue_final_message"]:
                if value:
                    raise InputError(f"{where} and continue_final_message exclude one another", param=where)
                value = False
            flags[name] = default if value is None else value
        thinking = _thinking(raw, variables)
        image, clip = MediaOptions.of_request(raw)
        variables = {name: value for name, value in variables.items() if value is not None}
        return cls(
            **flags,
            variables=variables,
            thinking=thinking,
            cache_salt=read_salt(raw.get("cache_salt")),
            image=image,
            clip=clip,
        )


def read_salt(value: object) -> str:
    """A digest of it, empty for null. InputError."""
    if value is None:
        return ""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_SALT_CHARS:
        raise InputError(f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters", param="cache_salt")
    return hashlib.sha256(value.encode()).hexdigest()


def _thinking(raw: Mapping[str, Any], variables: dict[str, Any]) -> Thinking | None:
    """What is said in any spelling, of each kind the first: flags say whether, an effort how much, and whether where no
    flag does. Those in `variables` are taken out of it."""
    kwargs = {f"chat_template_kwargs.{name}": variables.pop(name, None) for name in ("enable_thinking", "thinking")}
    effort_in_kwargs = variables.pop("reasoning_effort", None)
    reasoning = check_object(raw.get("reasoning"), "reasoning")
    for name, value in reasoning.items():
        if name not in ("effort", "enabled", "summary", "generate_summary") and value not in (None, False):
            raise NotBuiltYet(f"reasoning.{name[:64]}", param=f"reasoning.{name[:64]}")
    flags = {
        **kwargs,
        "enable_thinking": raw.get("enable_thinking"),
        "think": raw.get("think"),
        "reasoning.enabled": reasoning.get("enabled"),
    }
    efforts = {
        "chat_template_kwargs.reasoning_effort": effort_in_kwargs,
        "reasoning_effort": raw.get("reasoning_effort"),
        "reasoning.effort": reasoning.get("effort"),
    }
    wanted = [(param, read_flag(value, param)) for param, value in flags.items() if value is not None]
    how_much = [(param, _read_effort(value, param)) for param, value in efforts.items() if value is not None]
    said, effort = next(iter(wanted), None), next(iter(how_much), None)
    if said is None:
        return effort and Thinking(is_wanted=effort[1] != "none", param=effort[0], effort=effort[1])
    if effort is None or not said[1]:
        return Thinking(is_wanted=said[1], param=said[0])
    if effort[1] == "none":
        raise InputError(f"{said[0]} is true, and {effort[0]} none", param=effort[0])
    return Thinking(is_wanted=True, param=effort[0], effort=effort[1])


def _read_processor(raw: object, place: Place, where: str) -> dict[str, Any]:
    given = check_object(raw, where)
    check_fields(given, place, where=where)
    found = read_fields(given, place, where)
    sizes = found.pop("size", {})
    return {**found, **sizes}


def _take_media_io(raw: Mapping[str, Any], clip: dict[str, Any]) -> None:
    """As vLLM reads it: at most `num_frames`, -1 for no such bound; `fps` beside it lowers that."""
    for name, value in raw.items():
        where = f"media_io_kwargs.{name[:64]}"
        if name not in ("image", "video"):
            raise InputError("media_io_kwargs takes image and video", param=where)
        given = check_object(value, where)
        check_fields(given, "media_io_kwargs.image" if name == "image" else "media_io_kwargs.video", where=where)
        if name == "image":
            continue
        count = None if given.get("num_frames") in (None, -1) else FRAMES(given["num_frames"], f"{where}.num_frames")
        fps = None if given.get("fps") in (None, -1, 0) else FPS(given["fps"], f"{where}.fps")
        for key in _SAMPLING:
            clip.pop(key, None)
        if fps is not None:
            clip |= {"fps": fps, "max_frames": count}
        elif count is not None:
            clip["max_num_frames"] = count


def _spelled(found: dict[str, Any], where: str) -> dict[str, Any]:
    """One spelling for each thing; InputError for two that exclude one another."""
    values = dict(found)
    prefix = f"{where}." if where else ""
    frames = values.pop("nframes", None)
    if frames is not None:
        if values.get("num_frames") is not None:
            raise InputError("nframes and num_frames are the same", param=f"{prefix}nframes")
        values["num_frames"] = round(frames / 2) * 2  # as in qwen-vl-utils
    if (values.get("resized_height") is None) != (values.get("resized_width") is None):
        raise InputError("resized_height and resized_width go together", param=f"{prefix}resized_height")
    for low, high in (("min_pixels", "max_pixels"), ("size_min", "size_max"), ("min_frames", "max_frames")):
        if None not in (values.get(low), values.get(high)) and values[low] > values[high]:
            raise InputError(f"{low} is {values[low]}, more than {high}, {values[high]}", param=f"{prefix}{low}")
    start, end = values.get("video_start"), values.get("video_end")
    if start is not None and end is not None and start >= end:
        raise InputError(f"video_start is {start:g}, and video_end {end:g}", param=f"{prefix}video_start")
    if values.get("do_sample_frames") is False and (values.get("fps") or values.get("num_frames")) and not where:
        raise InputError("without sampling there is no fps and no num_frames", param="do_sample_frames")
    return {name: value for name, value in values.items() if value is not None}
