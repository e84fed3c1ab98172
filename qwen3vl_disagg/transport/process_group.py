"""The one place that builds a 2-rank Gloo group: directly, with no default group, so a link comes and goes without the
other ranks knowing, and over no store that asks a name server: PyTorch's TCPStore does for each client, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from qwen3vl_disagg.transport.gloo import gloo_group

Swap = Callable[[bytes], bytes]
"""What this end's group says of where it is -> what the other end's says. Blocks."""
_LONGEST_WAIT = 5
"""Gloo waits so many times its timeout for the other end's connection."""


def build_pair(swap: Swap, *, rank_in_pair: int, host: str, timeout_s: float) -> dist.ProcessGroup:
    """Meet the other end; blocks until both are there. Raises RuntimeError when it is not within `timeout_s` of the
    swap, ValueError where what it says is no address, and whatever `swap` does."""
    timeout = timedelta(seconds=timeout_s / _LONGEST_WAIT)
    return gloo_group(_TwoEnds(swap), rank_in_pair, 2, host=host, timeout=timeout)


class _TwoEnds(dist.Store):
    """What Gloo takes for a store: it sets its own address, then reads both."""

    def __init__(self, swap: Swap) -> None:
        super().__init__()
        self._swap, self._values = swap, dict[str, bytes]()

    def set(self, key: str, value: Any) -> None:
        self._values[key] = bytes(value)

    def wait(self, keys: list[str], *_: Any) -> None:
        """Only a `get` blocks."""

    def get(self, key: str) -> bytes:
        if key not in self._values:
            ours = next(iter(self._values.values()))
            theirs = self._swap(ours)
            if _form(theirs) != _form(ours):
                raise ValueError(f"{len(theirs)} bytes of the other end are no address like this end's")
            self._values[key] = theirs
        return self._values[key]


def _form(address: bytes) -> tuple[int, int, int]:
    """What both ends' must have in common, as Gloo trusts what it reads: bytes of its socket address, their family,
    bytes behind them. Before it are the length of the host's name and the name; lengths have 8 bytes."""
    start = 8 + _number(address[:8])
    end = start + 8 + (size := _number(address[start : start + 8]))
    return size, _number(address[start + 8 : start + 10]), len(address) - end


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
