"""Images and clips as the world sends them, good and bad, and what must come of each.

Nothing is built before its `data` is asked for. A bad entry is refused with an HTTP status and a message; a good one
has a size as shown. Clips also tell their number of frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tests.support.media_clips import CLIPS
from tests.support.media_hostile import HOSTILE_IMAGES
from tests.support.media_images import BAD_IMAGES, GOOD_IMAGES


@dataclass(frozen=True)
class Entry:
    """`size` is (width, height) of a good one; `status` and `message` (a part of it) belong to a bad one."""

    name: str
    kind: Literal["image", "video"]
    make: Callable[[], bytes]
    size: tuple[int, int] | None = None
    num_frames: int | None = None
    status: int | None = None
    message: str = ""

    @cached_property
    def data(self) -> bytes:
        return self.make()

    @property
    def is_good(self) -> bool:
        return self.status is None


CATALOGUE: tuple[Entry, ...] = (
    *(Entry(name, "image", make, size=size) for name, (make, size) in GOOD_IMAGES.items()),
    *(Entry(name, "image", make, status=s, message=m) for name, (make, s, m) in (BAD_IMAGES | HOSTILE_IMAGES).items()),
    *(
        Entry(name, "video", make, size=expected[0], num_frames=expected[1])
        if isinstance(expected[0], tuple)
        else Entry(name, "video", make, status=expected[0], message=expected[1])
        for name, (make, expected) in CLIPS.items()
    ),
)
