"""Clips -> which frames to look at, their grid and timestamps, and patches.

A clip is a file or a list of images. Frames go two by two (`temporal_patch_size`): each pair is one step of the grid,
which stands in the prompt by itself, behind the time that is half-way between its frames.

Formulas as in the reference video processor. Dims: T steps of the grid, H, W pixels; P patches.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
from torch import Tensor

from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import ImageResize
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.images import MAX_ASPECT
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.model.config import VisionConfig
from qwen3vl_disagg.processing.patches import (
    Frames,
    PixelSettings,
    PixelTransform,
    check_size,
    cut_patches,
    fit_size,
    read_section,
)
from qwen3vl_disagg.processing.positions import Grid

VIDEO_FILE = "video_preprocessor_config.json"
MAX_LIST_FRAMES = 768


def smart_resize_video(
    num_frames: int, height: int, width: int, *, factor: int, temporal: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size to resize all frames to: multiples of `factor`, pixels of the whole clip within the bounds.

    Arithmetic as in the reference (float64, ties to even): 20 frames of 1080 x 1920 -> 832 x 1472 with factor 32,
    temporal 2 and bounds 4096 .. 25165824. InputError for a single frame, or one side 200 times the other.
    """
    if num_frames < temporal:
        raise InputError(f"a clip needs at least {temporal} frames, this one has {num_frames}")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"frames of {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")
    counted = round(num_frames / temporal) * temporal
    return fit_size(height, width, factor, min_pixels, max_pixels, frames=num_frames, counted=counted)


def timestamps(frames: Sequence[int], fps: float, temporal: int, times: Sequence[float] = ()) -> list[float]:
    """Seconds of each step of the grid: half-way between its first and last frame; the last frame is repeated.

    Frames 0, 2, 5, 8, 10 at 4 a second: 0.25, 1.625, 2.5. `times`: of all frames of a clip that has no even rate.
    """
    padded = [*frames, *[frames[-1]] * (-len(frames) % temporal)]
    seconds = [times[frame] if times else frame / fps for frame in padded]
    steps = zip(seconds[::temporal], seconds[temporal - 1 :: temporal], strict=True)
    return [(first + last) / 2 for first, last in steps]


def nearest_frames(times: Sequence[float], count: int) -> list[int]:
    """`count` strictly rising frames, nearest to times spread evenly from the first to the last one's."""
    last, found, at = len(times) - 1, list[int](), 0
    for number in range(count):
        wanted = times[-1] * number / max(count - 1, 1)
        while at < last and times[at + 1] <= wanted:
            at += 1
        is_next_nearer = at < last and times[at + 1] - wanted < wanted - times[at]
        # No frame twice, and as many left as are still wanted.
        low, high = (found[-1] + 1 if found else 0), last - (count - 1 - number)
        found.append(min(max(at + is_next_nearer, low), high))
    return found


class VideoProcessor:
    """One checkpoint's way from clips to patches. `resize` picks the arithmetic, see `PixelTransform`."""

    def __init__(
        self,
        config: VisionConfig,
        pixels: PixelSettings,
        *,
        fps: float = 2.0,
        min_frames: int = 4,
        max_frames: int = 768,
        max_tokens_per_frame: int | None = None,
        resize: ImageResize = "torch",
    ) -> None:
        """`max_tokens_per_frame`: where given, no frame gets more visual tokens than that, however short the clip."""
        self.config, self._pixels = config, pixels
        self.fps, self.min_frames, self.max_frames = fps, min_frames, max_frames
        self._max_tokens_per_frame = max_tokens_per_frame
        self.factor = config.patch_size * config.spatial_merge_size
        self.resize, self._transform = resize, PixelTransform(pixels.mean, pixels.std, resize)

    @classmethod
    def from_folder(cls, folder: Path, config: VisionConfig, *, resize: ImageResize = "torch") -> VideoProcessor | None:
        """Read video_preprocessor_config.json, or the `video_processor` part of processor_config.json; None if there
        is neither: such a checkpoint takes no videos."""
        raw = read_section(folder, VIDEO_FILE, "video_processor")
        if raw is None:
            return None
        pixels, problems = PixelSettings.read(raw, config)
        numbers: dict[str, float] = {"fps": 2, "min_frames": 4, "max_frames": 768, "max_video_tokens": 768}
        for name, default in numbers.items():
            value = raw.get(name, default) if raw.get(name) is not None else default
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31
            if not good or (name != "fps" and not isinstance(value, int)):
                problems.append(f"{name} must be a positive number, got {value!r}")
                continue
            numbers[name] = value
        if raw.get("do_sample_frames", True) is not True or raw.get("num_frames") is not None:
            problems.append("only do_sample_frames true by fps is supported, without num_frames")
        if problems or pixels is None:
            raise CheckpointError(folder, [f"{VIDEO_FILE}: {problem}" for problem in problems])
        return cls(
            config,
            pixels,
            fps=float(numbers["fps"]),
            min_frames=int(numbers["min_frames"]),
            max_frames=int(numbers["max_frames"]),
            max_tokens_per_frame=int(numbers["max_video_tokens"]) if raw.get("cap_pixels_per_frame") else None,
            resize=resize,
        )

    def sample(
        self,
        num_frames: int,
        fps: float,
        *,
        sample_fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        count: int | None = None,
        times: Sequence[float] = (),
    ) -> list[int]:
        """Which frames of a file of `num_frames` at `fps` to look at: `count`, or `sample_fps` a second within these
        bounds, what is None as the checkpoint wants it; spread evenly from first to last, in `times` where these are
        given. InputError for more than there are, or than are looked at."""
        if count is None:
            if min_frames is not None and min_frames > self.max_frames:
                raise InputError(f"min_frames is {min_frames}, at most {self.max_frames} are looked at")
            most = min(max_frames or self.max_frames, self.max_frames)
            wanted = int(num_frames / fps * (sample_fps or self.fps))
            count = min(max(wanted, min(min_frames or self.min_frames, most)), most, num_frames)
        elif count > min(num_frames, self.max_frames):
            most = min(num_frames, self.max_frames)
            raise InputError(f"num_frames is {count}, but {most} frames of this clip can be looked at")
        if times:
            return nearest_frames(times, count)
        return np.linspace(0, num_frames - 1, count).round().astype(int).tolist()

    def grid(self, num_frames: int, width: int, height: int, bounds: tuple[int, int] | None = None) -> Grid:
        """(steps, height, width) in patches of that many frames of that many pixels. InputError if they do not fit.

        `bounds`: in place of the checkpoint's.
        """
        min_pixels, max_pixels = self.bounds(num_frames) if bounds is None else bounds
        new_height, new_width = smart_resize_video(
            num_frames,
            height,
            width,
            factor=self.factor,
            temporal=self.config.temporal_patch_size,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        patch, temporal = self.config.patch_size, self.config.temporal_patch_size
        return -(-num_frames // temporal), new_height // patch, new_width // patch

    def bounds(self, num_frames: int) -> tuple[int, int]:
        """Least and most pixels of all frames together of a clip of that many."""
        min_pixels, max_pixels = self._pixels.min_pixels, self._pixels.max_pixels
        if self._max_tokens_per_frame is not None:
            share = min(self._max_tokens_per_frame * self.factor**2, max_pixels // num_frames)
            max_pixels = num_frames * max(share, int(min_pixels * 1.05))
        return min_pixels, max_pixels

    def pixels(
        self,
        data: bytes,
        visual: VisualItem,
        decoder: MediaDecoder,
        stop: StopSignal | None = None,
        notes: list[str] | None = None,
    ) -> tuple[Tensor, Grid]:
        """Decode the item's frames -> patches `[P, patch_dim]` float32 and the grid.

        InputError for damaged media, ServerError for frames of another size than announced, Stopped when nobody wants
        them any more. What is missing is appended to `notes`.
        """
        # Closed also when this fails: whoever decodes must not wait for frames to be taken.
        with closing(_decoded(data, visual, decoder, stop, notes)) as frames:
            return self.patches(_announced(frames, visual), len(visual.frames), visual.grid)

    def frames(
        self,
        data: bytes,
        visual: VisualItem,
        decoder: MediaDecoder,
        stop: StopSignal | None = None,
        notes: list[str] | None = None,
    ) -> tuple[Frames, Grid]:
        """As `pixels`, for a GPU to cut up."""
        count = len(visual.frames)
        grid = self._stepped(count, visual.grid)
        with closing(_decoded(data, visual, decoder, stop, notes)) as frames:
            counted = _counted(_announced(frames, visual), count)
            return Frames.of(counted, count, grid, self.config, self._transform), grid

    def patches(self, frames: Iterable[np.ndarray], num_frames: int, grid: Grid) -> tuple[Tensor, Grid]:
        """Frames `[H, W, 3]` uint8 of one size -> patches `[P, patch_dim]` float32 and the grid, with as many steps as
        they have. InputError if sizes differ or another number of frames comes."""
        grid = self._stepped(num_frames, grid)
        return cut_patches(_counted(frames, num_frames), num_frames, grid, self.config, self._transform), grid

    def _stepped(self, num_frames: int, grid: Grid) -> Grid:
        return -(-num_frames // self.config.temporal_patch_size), grid[1], grid[2]


def _decoded(
    data: bytes, visual: VisualItem, decoder: MediaDecoder, stop: StopSignal | None, notes: list[str] | None
) -> Generator[np.ndarray]:
    if visual.is_frame_list:
        return _images(unpack_frames(data), visual.frames, decoder, stop, notes)
    return decoder.video_frames(data, visual.frames, stop=stop, notes=notes)


def _announced(frames: Iterable[np.ndarray], visual: VisualItem) -> Iterator[np.ndarray]:
    for frame in frames:
        check_size(frame, visual)
        yield frame


def _counted(frames: Iterable[np.ndarray], num_frames: int) -> Iterator[np.ndarray]:
    shape, count = None, 0
    for count, frame in enumerate(frames, 1):
        shape = shape or frame.shape
        if frame.shape != shape or count > num_frames:
            raise InputError("the clip's frames are not all of one size, or more than its header says")
        yield frame
    if count != num_frames:
        raise InputError(f"the clip is damaged: {count} of {num_frames} frames can be decoded")


def _images(
    images: Sequence[bytes],
    indices: Sequence[int],
    decoder: MediaDecoder,
    stop: StopSignal | None,
    notes: list[str] | None,
) -> Generator[np.ndarray]:
    """A frame that equals the one before it is not decoded again."""
    last, frame_HWC = b"", np.empty(0)
    for index in indices:
        if images[index] != last:
            last, frame_HWC = images[index], decoder.image(images[index], stop=stop, notes=notes)
        yield frame_HWC


def pack_frames(images: Sequence[bytes]) -> bytes:
    """A list of images as one string of bytes, so that a clip is content like any other."""
    return msgspec.msgpack.encode(list(images))


def unpack_frames(data: bytes) -> list[bytes]:
    return msgspec.msgpack.decode(data, type=list[bytes])
