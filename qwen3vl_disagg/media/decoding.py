"""Decoding in child processes that can be killed: what the other rooms use."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Literal

import numpy as np

from qwen3vl_disagg.core.errors import DisaggError, InputError, MediaTimeout, ServerError, UnavailableError
from qwen3vl_disagg.media.child import ChildFailed, ChildProcess, Done, Job, MediaRefused, Picture, Reply
from qwen3vl_disagg.media.images import probe_image
from qwen3vl_disagg.media.stop import Slots, StopSignal
from qwen3vl_disagg.media.video import CONTAINERS, MAX_FRAME_PIXELS, MAX_FRAMES, VideoInfo, check_clip_bytes

IMAGE_PATIENCE_S = 10.0
PATIENCE_S_PER_PIXEL = 0.3e-6
"""On top, so that the largest image is decoded on a machine that has much else to do."""
VIDEO_PATIENCE_S = 30.0
_STATUSES = (400, 413, 415)
_CODES = ("invalid_request", "not_installed")
_MAX_MESSAGE = 300
What = Literal["image", "clip"]


class MediaDecoder:
    """Decodes in child processes that hold no secrets and can be killed. Thread-safe.

    Up to `max_children` jobs with images and as many with clips run at a time, others wait as long as it takes: no
    image waits for clips. Children start on first use, are used again, and are replaced when they were killed or
    crashed. A decoder belongs to one process: fork before its first use, not after. Bad media are an InputError (400,
    or 413 for too many bytes), also those that a child crashes on. MediaTimeout when they take too long; ServerError
    when the child was killed from outside; UnavailableError when no child can be started, or after `close`.

    A `stop` that is set, or whose deadline has passed, ends its jobs with Stopped within 0.2 s, those too that wait for
    a child; the child of a running one is killed. Frames raise it when the next one is asked for.

    What comes back is checked, because a child that met hostile bytes is not to be trusted.
    """

    def __init__(
        self,
        *,
        max_children: int = 2,
        image_patience_s: float = IMAGE_PATIENCE_S,
        video_patience_s: float = VIDEO_PATIENCE_S,
    ) -> None:
        self._image_patience_s, self._video_patience_s = image_patience_s, video_patience_s
        self._slots = {"image": Slots(max_children), "clip": Slots(max_children)}
        self._lock = threading.Lock()
        self._idle: list[ChildProcess] = []
        self._busy: set[ChildProcess] = set()
        self._is_closed = False

    def image(self, data: bytes, *, stop: StopSignal | None = None, notes: list[str] | None = None) -> np.ndarray:
        """The image as shown, `[H, W, 3]` uint8, by the rules of `decode_rgb`. InputError for a damaged one.

        What the header is enough to refuse is refused here, and the pixels have the size that it tells. What is missing
        of it is appended to `notes`.
        """
        info = probe_image(data)
        patience_s = self._image_patience_s + PATIENCE_S_PER_PIXEL * info.width * info.height
        with self._running("image", Job(len(data), info), data, patience_s, stop) as (child, reply):
            if not isinstance(reply, MediaRefused):
                pixels = _pixels(child, reply, (info.height, info.width, 3))
                _take_note(reply, notes)
                return pixels
        raise _refusal(reply)

    def probe_video(self, data: bytes, *, stop: StopSignal | None = None) -> VideoInfo:
        """What the clip holds. InputError for a damaged or forbidden one."""
        check_clip_bytes(data)
        with self._running("clip", Job(len(data)), data, self._video_patience_s, stop) as (_, reply):
            if not isinstance(reply, MediaRefused):
                return _checked(reply)
        raise _refusal(reply)

    def video_frames(
        self, data: bytes, indices: Sequence[int], *, stop: StopSignal | None = None, notes: list[str] | None = None
    ) -> Generator[np.ndarray, None, None]:
        """The frames of these strictly rising indices, each `[H, W, 3]` uint8 of the probed size, one at a time.

        What is missing of the clip is appended to `notes` after the last one. A child is taken from the first frame
        asked for until the last one has come or the generator is closed; if that is in the middle, the child is killed.
        Time that the caller takes between two frames is not counted. InputError for a bad clip, also in the middle.
        """
        indices = [int(index) for index in indices]
        if any(later <= earlier for earlier, later in zip([-1, *indices], indices, strict=False)):
            raise ValueError("the indices of frames must rise")
        check_clip_bytes(data)
        return self._video_frames(data, indices, stop, notes)

    def _video_frames(
        self, data: bytes, indices: list[int], stop: StopSignal | None, notes: list[str] | None
    ) -> Generator[np.ndarray, None, None]:
        if not indices:
            return
        shape: tuple[int, ...] | None = None
        job = Job(len(data), indices=indices)
        with self._running("clip", job, data, self._video_patience_s, stop) as (child, reply):
            for _ in indices:
                if isinstance(reply, MediaRefused):
                    break
                frame_HWC = _pixels(child, reply, shape)
                shape = frame_HWC.shape
                yield frame_HWC
                reply = child.receive()
            if not isinstance(reply, (MediaRefused, Done)):
                raise ChildFailed("nonsense")
        if isinstance(reply, MediaRefused):
            raise _refusal(reply)
        _take_note(reply, notes)

    def warm_up(self) -> None:
        """Start a child in the background, so that the first job does not wait for it."""
        threading.Thread(target=self._start_child, name="decoder", daemon=True).start()

    def _start_child(self) -> None:
        stop = StopSignal()
        with self._slots["image"].one(stop), suppress(UnavailableError):  # then the first job says it
            child, _ = self._take("image", stop, must_be_new=False)
            self._give_back(child, is_well=True)

    def close(self) -> None:
        """End the children. Jobs that run fail with UnavailableError."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for child in self._busy:
                child.kill()
        for child in idle:
            child.close()

    @contextmanager
    def _running(
        self, what: What, job: Job, data: bytes, patience_s: float, stop: StopSignal | None
    ) -> Iterator[tuple[ChildProcess, Reply]]:
        """A child and its first answer to a job. The child is kept for the next job unless the block raised."""
        stop = stop or StopSignal()
        with self._slots[what].one(stop):
            child = None
            try:
                child, reply = self._start(what, job, data, patience_s, stop)
                yield child, reply
            except ChildFailed as error:
                self._give_back(child, is_well=False)
                if self._is_closed:
                    raise UnavailableError("decoding of media has ended") from None
                raise _failure(what, error) from None
            except BaseException:
                self._give_back(child, is_well=False)
                raise
            self._give_back(child, is_well=True)

    def _start(
        self, what: What, job: Job, data: bytes, patience_s: float, stop: StopSignal
    ) -> tuple[ChildProcess, Reply]:
        """A child that ends has been brought down by this job, or by one before: only a new child tells which."""
        for is_last in (False, True):
            child, is_new = self._take(what, stop, must_be_new=is_last)
            try:
                child.send(job, data, patience_s, stop)
                return child, child.receive()
            except BaseException as error:
                self._give_back(child, is_well=False)
                if is_new or not isinstance(error, ChildFailed) or error.why == "slow":
                    raise
        raise ChildFailed("ended")

    def _take(self, what: What, stop: StopSignal, *, must_be_new: bool) -> tuple[ChildProcess, bool]:
        """A child, and whether it is new. Those of clips are their own: an image waits for none to start."""
        with self._lock:
            if self._is_closed:
                raise UnavailableError("decoding of media has ended")
            child = next((child for child in reversed(self._idle) if child.what == what), None)
            if child is not None and not must_be_new:
                self._idle.remove(child)
                self._busy.add(child)
                return child, False
        try:
            child = ChildProcess(stop)
            child.what = what
        except (OSError, ChildFailed) as error:
            raise UnavailableError("no process for decoding media can be started") from error
        with self._lock:
            self._busy.add(child)
            if self._is_closed:  # since it was started
                child.kill()
        return child, True

    def _give_back(self, child: ChildProcess | None, *, is_well: bool) -> None:
        if child is None:
            return
        with self._lock:
            self._busy.discard(child)
            if is_well and not self._is_closed:
                self._idle.append(child)
                return
        child.close()


def _pixels(child: ChildProcess, reply: Reply, shape: tuple[int, ...] | None) -> np.ndarray:
    """The pixels that a reply announces, of this shape if there is one that they must have."""
    if not isinstance(reply, Picture) or shape not in (None, (reply.height, reply.width, 3)):
        raise ChildFailed("nonsense")
    return child.receive_pixels(reply)


def _plain(words: str) -> str:
    """A child's words, cut to one plain line."""
    return "".join(letter for letter in words if letter.isprintable())[:_MAX_MESSAGE]


def _take_note(reply: Reply, notes: list[str] | None) -> None:
    if isinstance(reply, (Picture, Done)) and reply.note and notes is not None:
        notes.append(_plain(reply.note))


def _refusal(reply: MediaRefused) -> InputError:
    """What the child says is wrong with the media."""
    message = _plain(reply.message)
    code = reply.code if reply.code in _CODES else InputError.code
    return InputError(message, status=reply.status if reply.status in _STATUSES else 400, code=code)


def _failure(what: str, error: ChildFailed) -> DisaggError:
    if error.why == "slow":
        return MediaTimeout(f"decoding the {what} takes too long")
    if error.why == "killed":
        return ServerError(f"the process that decoded the {what} was killed", code="decoder_killed")
    return InputError(f"the {what} is damaged and cannot be decoded")


def _checked(info: Reply) -> VideoInfo:
    """ChildFailed for what no clip holds."""
    if not isinstance(info, VideoInfo):
        raise ChildFailed("nonsense")
    sizes_fit = info.width > 0 < info.height and info.width * info.height <= MAX_FRAME_PIXELS
    counts_fit = 0 < info.num_frames <= MAX_FRAMES and 0 < info.fps < float("inf")
    times = info.times
    times_fit = not times or (
        len(times) == info.num_frames
        and times[0] == 0
        and all(now <= after for now, after in pairwise(times))
        and times[-1] < float("inf")
    )
    if not (sizes_fit and counts_fit and times_fit and info.format in CONTAINERS):
        raise ChildFailed("nonsense")
    return info
