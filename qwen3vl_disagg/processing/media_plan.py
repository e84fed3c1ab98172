"""What the headers of a request's media say, and the request about them: sizes, frames, times and rows of each item."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from qwen3vl_disagg.core.errors import DisaggError, InputError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.image_formats import ImageInfo
from qwen3vl_disagg.media.images import check_aspect, probe_image
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.media.video import UNKNOWN_FPS, VideoInfo
from qwen3vl_disagg.model.config import VisionConfig
from qwen3vl_disagg.processing.clips import VIDEO_FILE, VideoProcessor, timestamps, unpack_frames
from qwen3vl_disagg.processing.messages import Media
from qwen3vl_disagg.processing.patches import ImageProcessor, smart_resize
from qwen3vl_disagg.processing.positions import Grid
from qwen3vl_disagg.processing.prompt_options import NO_OPTIONS, MediaOptions

MAX_STILL_PIXELS = 2**31
"""To decode for one request, in images and in lists of frames: 768 frames of 1080p fit."""
MAX_FILE_PIXELS = 2**33
"""To decode for one request, in files of clips."""
LOW_DETAIL_PIXELS = 512 * 512
"""`detail: low`: so many at most, and a quarter of what the checkpoint takes."""


@dataclass(frozen=True)
class Plan:
    """What a header says about an item. Of a clip: the frames to look at, and the seconds of each step of the grid."""

    modality: Literal["image", "video"]
    digest: str
    """SHA-256 of its bytes."""
    num_bytes: int
    param: str
    is_frame_list: bool
    grid: Grid
    frames: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    size: tuple[int, int] = (0, 0)
    """Height and width of the image, or of each frame."""
    num_pixels: int = 0
    """What has to be decoded: of a file all frames up to the last one that is looked at."""

    @property
    def content(self) -> tuple[object, ...]:
        """What encode ranks tell it by, within a request."""
        return self.digest, self.grid, self.frames, self.is_frame_list

    def run_rows(self, vision: VisionConfig) -> int:
        return self.grid[1] * self.grid[2] // vision.merge_unit

    def num_rows(self, vision: VisionConfig) -> int:
        return self.grid[0] * self.run_rows(vision)

    def item(self, runs: list[int], vision: VisionConfig, salt: str = "") -> VisualItem:
        """`runs`: where its placeholders begin."""
        return VisualItem(
            modality=self.modality,
            digest=self.digest,
            num_bytes=self.num_bytes,
            grid=self.grid,
            num_rows=self.num_rows(vision),
            offset=runs[0],
            param=self.param,
            run_offsets=tuple(runs) if self.modality == "video" else (),
            frames=self.frames,
            is_frame_list=self.is_frame_list,
            size=self.size,
            salt=salt,
        )


class MediaPlanner:
    """Plans the items of the prompts of one request; equal bytes are looked at once. Stopped once `stop` is set."""

    def __init__(
        self,
        image: ImageProcessor,
        video: VideoProcessor | None,
        decoder: MediaDecoder,
        stop: StopSignal,
        *,
        of_images: MediaOptions = NO_OPTIONS,
        of_clips: MediaOptions = NO_OPTIONS,
    ) -> None:
        self._image, self._video, self._config = image, video, image.config
        self._of_images, self._of_clips = of_images, of_clips
        self._decoder, self._stop = decoder, stop
        self._images: dict[bytes, ImageInfo] = {}
        self._clips: dict[bytes, VideoInfo] = {}
        self._pixels = _Pixels()
        self._planned: set[tuple[object, ...]] = set()
        """In earlier prompts of the request: what is encoded once."""
        self._digests: dict[int, tuple[str, bytes]] = {}
        """By the identity of bytes, which are kept here: those of one URL may stand in every part."""

    def plan_all(self, media: Iterable[Media], max_rows: int) -> list[Plan]:
        """InputError where an item stands that cannot be had, or brings more rows than fit the context."""
        plans, num_rows = list[Plan](), 0
        for entry in media:
            try:
                plans.append(self._plan(entry))
            except DisaggError as error:
                raise error.at(entry.param) from error
            num_rows += plans[-1].num_rows(self._config)
            if num_rows > max_rows:
                raise InputError(
                    f"the images and videos up to here take {num_rows} tokens, the context is {max_rows}",
                    param=entry.param,
                    code="context_length_exceeded",
                )
            if plans[-1].content not in self._planned:
                self._pixels.add(plans[-1])
        self._planned |= {plan.content for plan in plans}
        return plans

    def _look_at_image(self, data: bytes) -> ImageInfo:
        self._stop.check()
        if data not in self._images:
            self._images[data] = probe_image(data)
        return self._images[data]

    def _look_at_clip(self, data: bytes) -> VideoInfo:
        self._stop.check()
        if data not in self._clips:
            self._clips[data] = self._decoder.probe_video(data, stop=self._stop)
        return self._clips[data]

    def _digest(self, data: bytes) -> str:
        if id(data) not in self._digests:
            self._stop.check()
            self._digests[id(data)] = hashlib.sha256(data).hexdigest(), data
        return self._digests[id(data)][0]

    def _made(self, media: Media, grid: Grid, **others: Any) -> Plan:
        digest = self._digest(media.data)
        return Plan(media.modality, digest, len(media.data), media.param, media.is_frame_list, grid, **others)

    def _plan(self, entry: Media) -> Plan:
        if entry.modality == "image":
            info = self._look_at_image(entry.data)
            grid = self._image_grid(entry.options.over(self._of_images), info)
            size = info.height, info.width
            return self._made(entry, grid, size=size, num_pixels=info.width * info.height)
        if self._video is None:
            raise InputError(f"this checkpoint takes no videos: it has no {VIDEO_FILE}")
        options, seconds = entry.options.over(self._of_clips), tuple[float, ...]()
        if entry.is_frame_list:
            infos = [self._look_at_image(image) for image in unpack_frames(entry.data)]
            sizes = {(info.width, info.height) for info in infos}
            if len(sizes) > 1:
                raise InputError(f"the frames of a clip must have one size, these have {len(sizes)}")
            frames, fps = list(range(len(infos))), options.fps or UNKNOWN_FPS
            least, most = entry.options.min_frames or 0, entry.options.max_frames or len(frames)
            if not least <= len(frames) <= most:
                raise InputError(f"a list is looked at as it is: it has {len(frames)} frames, not {least} to {most}")
            width, height = sizes.pop()
        else:
            clip = self._look_at_clip(entry.data)
            frames = _frames(options, clip, self._video)
            fps, seconds, width, height = clip.fps, clip.times, clip.width, clip.height
        times = timestamps(frames, fps, self._config.temporal_patch_size, seconds)
        grid = _clip_grid(options, self._video, len(frames), width, height)
        num_pixels = (frames[-1] + 1) * width * height
        size = height, width
        return self._made(entry, grid, frames=tuple(frames), times=tuple(times), size=size, num_pixels=num_pixels)

    def _image_grid(self, options: MediaOptions, info: ImageInfo) -> Grid:
        image, own, patch = self._image, self._image.bounds, self._config.patch_size
        size = _exact_size(options, image.factor, 1, own.max_pixels)
        if size is None:
            least, most = options.min_pixels or options.size_min, options.max_pixels or options.size_max
            if least is None and most is None and options.detail == "low":
                most = max(image.factor**2, min(LOW_DETAIL_PIXELS, own.max_pixels // 4))
            bounds = _within(least, most, own.min_pixels, own.max_pixels, image.factor**2)
            size = smart_resize(info.height, info.width, image.factor, *bounds)
        return 1, size[0] // patch, size[1] // patch


def _exact_size(options: MediaOptions, factor: int, num_frames: int, limit: int) -> tuple[int, int] | None:
    """(height, width) that is asked for, in whole merged patches. InputError for more pixels than there may be."""
    if options.resized_height is None or options.resized_width is None:
        return None
    given = options.resized_height, options.resized_width
    check_aspect(*given)
    height, width = (max(factor, round(side / factor) * factor) for side in given)
    if num_frames * height * width > limit:
        most = limit // num_frames
        raise InputError(f"resized_height and resized_width make {height} x {width} pixels, the limit is {most}")
    return height, width


def _within(least: int | None, most: int | None, own_least: int, own_most: int, smallest: int) -> tuple[int, int]:
    """The request's bounds within the checkpoint's: no more pixels than that takes, but fewer if asked for."""
    if least is not None and least > own_most:
        raise InputError(f"min_pixels is {least}, this server takes at most {own_most}")
    if most is not None and most < smallest:
        raise InputError(f"max_pixels is {most}, one visual token has {smallest}")
    most = own_most if most is None else min(most, own_most)
    least = min(own_least, most) if least is None else least
    if least > most:
        raise InputError(f"min_pixels is {least}, more than max_pixels, {most}")
    return least, most


def _clip_grid(options: MediaOptions, video: VideoProcessor, num_frames: int, width: int, height: int) -> Grid:
    own_least, own_most = video.bounds(num_frames)
    patch, temporal, smallest = video.config.patch_size, video.config.temporal_patch_size, video.factor**2 * num_frames
    size = _exact_size(options, video.factor, num_frames, own_most)
    if size is not None:
        if num_frames < temporal:
            raise InputError(f"a clip needs at least {temporal} frames, this one has {num_frames}")
        return -(-num_frames // temporal), size[0] // patch, size[1] // patch
    least = options.min_pixels and options.min_pixels * num_frames
    most = options.max_pixels and options.max_pixels * num_frames
    if options.total_pixels is not None:
        share = max(options.total_pixels * temporal, int((least or 0) * 1.05))
        most = share if most is None else min(most, share)
    if least is None and most is None:
        least, most = options.size_min, options.size_max
    if least is None and most is None and options.detail == "low":
        most = max(smallest, own_most // 4)
    return video.grid(num_frames, width, height, _within(least, most, own_least, own_most, smallest))


def _frames(options: MediaOptions, clip: VideoInfo, video: VideoProcessor) -> list[int]:
    """Which frames of a file are looked at. InputError for what it does not have, and for more than are looked at."""
    first, last = _range(options, clip)
    num_frames, count = last - first + 1, options.num_frames
    if options.do_sample_frames is False:
        if options.fps is not None or count is not None:
            raise InputError("do_sample_frames is false: fps and num_frames have nothing to say")
        if num_frames > video.max_frames:
            raise InputError(f"the clip has {num_frames} frames, at most {video.max_frames} are looked at")
        count = num_frames
    elif options.max_num_frames is not None:
        count = min(options.max_num_frames, video.max_frames, num_frames)
    elif count is not None and options.fps is not None:
        raise InputError("fps and num_frames exclude one another")
    frames = video.sample(
        num_frames,
        clip.fps,
        sample_fps=options.fps,
        min_frames=options.min_frames,
        max_frames=options.max_frames,
        count=count,
        times=[at - clip.times[first] for at in clip.times[first : last + 1]],
    )
    return [first + frame for frame in frames]


def _range(options: MediaOptions, clip: VideoInfo) -> tuple[int, int]:
    """First and last frame between `video_start` and `video_end`."""
    last = clip.num_frames - 1
    start, end = 0, last
    if (at := options.video_start) is not None:
        start = bisect_left(clip.times, at) if clip.times else math.ceil(at * clip.fps)
    if (at := options.video_end) is not None:
        end = min(last, bisect_right(clip.times, at) - 1 if clip.times else math.floor(at * clip.fps))
    if (start, end) != (0, last) and start >= end:
        seconds = clip.num_frames / clip.fps
        raise InputError(f"there are not two frames from video_start to video_end: the clip has {seconds:.2f} seconds")
    return start, end


class _Pixels:
    """What decoding a request's media takes so far, of stills and of files of clips: it must not keep an encode rank
    from everybody else's for long. Looked at part by part: a thousand of them take a second to plan."""

    def __init__(self) -> None:
        self._num_stills = self._num_of_files = 0

    def add(self, plan: Plan) -> None:
        """InputError for too much."""
        if plan.modality == "video" and not plan.is_frame_list:
            self._num_of_files += plan.num_pixels
            total, limit, what = self._num_of_files, MAX_FILE_PIXELS, "clips"
        else:
            self._num_stills += plan.num_pixels
            total, limit, what = self._num_stills, MAX_STILL_PIXELS, "images and frames"
        if total > limit:
            message = f"the {what} of this request have {total} pixels to decode up to here, the limit is {limit}"
            raise InputError(message, param=plan.param, status=413)
