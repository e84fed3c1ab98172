"""What a request may say about how its images and clips are looked at: how large, and which frames.

`MediaOptions.of_part` reads a content part, `of_request` what stands beside the messages; a part goes before the
request. Names and meanings are those of qwen-vl-utils (pixels of one image or frame; `total_pixels` of a clip, two
frames counting once) and of transformers (`size`: of an image, or of all frames of a clip together).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing.request_fields import Place, check_fields, check_object

MAX_FPS = 240.0
MAX_FRAMES = 768
_MAX_NUMBER = 2**31
_DETAILS = ("auto", "low", "high", "original")

_PIXELS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_SIZES = (*_PIXELS, "total_pixels", "detail", "size_min", "size_max")
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
        names = list(_IMAGE_READERS if place == "image part" else _CLIP_READERS)
        found = _read(part, names, where)
        rates = [found.pop(name, None) for name in ("raw_fps", "sample_fps")]
        if found.get("fps") is None:
            found["fps"] = next((rate for rate in rates if rate is not None), None)
        return cls(**_spelled(found, where))

    @classmethod
    def of_request(cls, raw: Mapping[str, Any]) -> tuple[MediaOptions, MediaOptions]:
        """(for images, for clips). InputError naming the field."""
        both = _read(raw, [*_PIXELS, "detail"], "")
        image, clip = dict(both), {**both, **_read(raw, [n for n in _CLIP_READERS if n not in both], "")}
        processor = check_object(raw.get("mm_processor_kwargs"), "mm_processor_kwargs")
        check_fields(processor, "mm_processor_kwargs", where="mm_processor_kwargs")
        _take_processor(processor, "mm_processor_kwargs", image, clip)
        for name, target in (("images_kwargs", image), ("videos_kwargs", clip)):
            place = f"mm_processor_kwargs.{name}"
            nested = check_object(processor.get(name), place)
            check_fields(nested, "images_kwargs" if name == "images_kwargs" else "videos_kwargs", where=place)
            _take_processor(nested, place, target if target is image else {}, target if target is clip else {})
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


def _take_processor(raw: Mapping[str, Any], where: str, image: dict[str, Any], clip: dict[str, Any]) -> None:
    """`min_pixels` and `max_pixels` are for images, `size` is for both, the rest for clips."""
    image |= _read(raw, ["min_pixels", "max_pixels"], where)
    clip |= _read(raw, ["fps", "num_frames", "min_frames", "max_frames", "do_sample_frames"], where)
    size = check_object(raw.get("size"), f"{where}.size")
    names = {
        "shortest_edge": "size_min",
        "min_pixels": "size_min",
        "longest_edge": "size_max",
        "max_pixels": "size_max",
    }
    for name, value in size.items():
        if name not in names:
            raise InputError("size takes shortest_edge and longest_edge", param=f"{where}.size.{name[:64]}")
        for target in (image, clip):
            target[names[name]] = _whole(value, f"{where}.size.{name}")


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
        count = None if given.get("num_frames") in (None, -1) else _frames(given["num_frames"], f"{where}.num_frames")
        fps = None if given.get("fps") in (None, -1, 0) else _fps(given["fps"], f"{where}.fps")
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


def _read(raw: Mapping[str, Any], names: list[str], where: str) -> dict[str, Any]:
    prefix = f"{where}." if where else ""
    readers = {**_IMAGE_READERS, **_CLIP_READERS}
    return {name: readers[name](raw[name], prefix + name) for name in names if raw.get(name) is not None}


def _whole(value: object, where: str, low: int = 1, high: int = _MAX_NUMBER) -> int:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value != value or not low <= value <= high or value != int(value):  # type: ignore[operator, call-overload]
        raise InputError(f"{where} must be a whole number from {low} to {high}", param=where)
    return int(value)  # type: ignore[call-overload]


def _number(value: object, where: str, low: float, high: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{where} must be a number from {low:g} to {high:g}", param=where)
    return value


def _fps(value: object, where: str) -> float:
    return _number(value, where, 0.01, MAX_FPS)


def _seconds(value: object, where: str) -> float:
    return _number(value, where, 0, _MAX_NUMBER)


def _frames(value: object, where: str) -> int:
    return _whole(value, where, 2, MAX_FRAMES)


def _count(value: object, where: str) -> int:
    return _whole(value, where, 1)


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{where} must be true or false", param=where)
    return value


def _detail(value: object, where: str) -> str:
    if value not in _DETAILS:
        raise InputError(f"{where} must be one of {', '.join(_DETAILS)}", param=where)
    return str(value)


_IMAGE_READERS: dict[str, Callable[[object, str], Any]] = {**dict.fromkeys(_PIXELS, _count), "detail": _detail}
_CLIP_READERS: dict[str, Callable[[object, str], Any]] = {
    **dict.fromkeys((*_PIXELS, "total_pixels", "min_frames", "max_frames"), _count),
    **dict.fromkeys(("fps", "sample_fps", "raw_fps"), _fps),
    **dict.fromkeys(("num_frames", "nframes"), _frames),
    **dict.fromkeys(("video_start", "video_end"), _seconds),
    "do_sample_frames": _flag,
    "detail": _detail,
}
