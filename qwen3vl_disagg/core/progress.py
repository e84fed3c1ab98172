"""How far a start is: a line of the log for each stage as it begins, with the seconds since the command was given.

The last line says what is going on now, however long that takes. One process speaks of a stage, not every rank.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_disagg.core.logs import tell

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Progress:
    """Made before forking: what one process ends is over for all.

    `started_at` (`time.monotonic`): when the command was given. `is_heard`: whether this process is one that speaks.
    """

    started_at: float = field(default_factory=time.monotonic)
    is_heard: bool = True
    _over: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 1), repr=False)

    @property
    def is_over(self) -> bool:
        """Whether the start has ended: a rank that is forked again later does not speak."""
        return self._over[0] != 0

    def stage(self, name: str, doing: str, **fields: Any) -> None:
        """What begins now. As JSON the line has `stage`, `seconds` since the command, and the fields."""
        if self.is_heard and not self.is_over:
            seconds = round(time.monotonic() - self.started_at, 3)
            tell(f"at {seconds:.1f} s: {doing}", {"stage": name, "seconds": seconds, **fields})

    def weights(self, of: str, num_bytes: int) -> None:
        """They are read from now on."""
        self.stage("weights", f"reading the weights of the {of}, {_size(num_bytes)}", bytes=num_bytes)

    def end(self, what: str = "ready") -> None:
        """The last line of this start."""
        if self.is_heard and not self.is_over:
            seconds = round(time.monotonic() - self.started_at, 3)
            tell(f"{what} in {seconds:.1f} s", {"stage": "ready", "seconds": seconds})
        self._over[0] = 1


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.1f} MiB"


SILENT = Progress(is_heard=False)
