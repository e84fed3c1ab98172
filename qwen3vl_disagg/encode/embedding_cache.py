"""Rows of images and clips: those that were encoded before, within a bound of bytes, and those in use by attempts.

An entry is found by its content address. What is in use is pinned and stays; of the rest, the entry that was used
longest ago goes first when there are too many bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import msgspec

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.encode.worker import EncodedItem
from qwen3vl_disagg.protocol.messages import Header, Room

V = TypeVar("V")


class ContentKey(NamedTuple):
    """All that an item's rows depend on: a field for each thing, so that no two contents can spell the same key.

    Processor settings and weights are not in it: a process has one of each for its whole life, and no cache outlives
    the process.
    """

    modality: str
    digest: str
    """SHA-256 of the bytes."""
    grid: tuple[int, int, int]
    frames: tuple[int, ...]
    is_frame_list: bool
    salt: str
    visual_token_id: int


def content_key(visual: VisualItem, visual_token_id: int) -> ContentKey:
    return ContentKey(*visual.content, visual_token_id)


@dataclass
class _Entry(Generic[V]):
    value: V
    num_bytes: int
    num_pins: int = 1


class EmbeddingCache(Generic[V]):
    """Values of at most `max_bytes` together, or of those that are pinned when these alone are more; 0 keeps nothing.

    `get` and `put` pin the entry once for the caller, `pin` once more; each pin is undone by one `unpin`.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.num_pinned_bytes = 0
        self.num_hits = self.num_misses = self.num_evictions = 0
        self._entries: OrderedDict[ContentKey, _Entry[V]] = OrderedDict()
        """The next to go comes first."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: ContentKey) -> bool:
        return key in self._entries

    def get(self, key: ContentKey) -> V | None:
        """The value, pinned, or None; counts a hit or a miss."""
        if not self.pin(key):
            self.num_misses += 1
            return None
        self.num_hits += 1
        return self._entries[key].value

    def put(self, key: ContentKey, value: V, num_bytes: int) -> bool:
        """Keep a value, pinned; False, and nothing is kept, if it is larger than the whole cache may be.

        ValueError if there is a value already.
        """
        if key in self._entries:
            raise ValueError(f"{key} is in the cache")
        if num_bytes > self.max_bytes:
            return False
        self._entries[key] = _Entry(value, num_bytes)
        self.num_bytes += num_bytes
        self.num_pinned_bytes += num_bytes
        self._trim()
        return True

    def pin(self, key: ContentKey) -> bool:
        """The entry is in use; False if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self._entries.move_to_end(key)
        if entry.num_pins == 0:
            self.num_pinned_bytes += entry.num_bytes
        entry.num_pins += 1
        return True

    def unpin(self, key: ContentKey) -> None:
        """One use of the entry is over. ValueError if none was going on."""
        entry = self._entries.get(key)
        if entry is None or entry.num_pins == 0:
            raise ValueError(f"{key} is not pinned")
        entry.num_pins -= 1
        if entry.num_pins == 0:
            self.num_pinned_bytes -= entry.num_bytes
            self._trim()

    def _trim(self) -> None:
        if self.num_bytes <= self.max_bytes:
            return
        for key in [key for key, entry in self._entries.items() if entry.num_pins == 0]:
            self.num_bytes -= self._entries.pop(key).num_bytes
            self.num_evictions += 1
            if self.num_bytes <= self.max_bytes:
                return


@dataclass(frozen=True)
class HeldItem:
    """An item's rows in use by one attempt. `key`: they are pinned under it; None when the cache does not have them."""

    item: EncodedItem
    key: ContentKey | None
    is_cached: bool = False
    """They were there before the attempt began."""
    batch: int = 0
    """Number of the tower's run that made them, from 1; 0 when they were there."""
    waited_s: float = 0.0
    """What the attempt waited for them, stages included."""

    def header(self, grant: Room) -> Header:
        """The item's, with what this attempt had to wait for."""
        header = msgspec.structs.replace(self.item.header(grant), cached=self.is_cached, batch=self.batch)
        if self.is_cached:
            header = msgspec.structs.replace(header, preprocess_ms=0.0, encode_ms=0.0)
        queue_ms = self.waited_s * 1e3 - header.preprocess_ms - header.encode_ms
        return msgspec.structs.replace(header, queue_ms=max(0.0, queue_ms))
