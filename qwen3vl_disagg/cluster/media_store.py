"""Uploaded bytes under their SHA-256, kept while a request needs them."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3vl_disagg.core.errors import OverloadedError


@dataclass
class _Entry:
    data: bytes
    num_holders: int


class MediaStore:
    """Bounded in bytes. The same bytes of several requests are kept once."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: dict[str, _Entry] = {}

    def hold(self, items: list[tuple[str, bytes]]) -> None:
        """Keep the bytes of (digest, bytes) pairs, all or none, until `release` was called as often.

        OverloadedError when there is no room.
        """
        new = {digest: data for digest, data in items if digest not in self._entries}
        size = sum(map(len, new.values()))
        if self.num_bytes + size > self.max_bytes:
            raise OverloadedError("no room for more images and clips now")
        for digest, data in new.items():
            self._entries[digest] = _Entry(data, 0)
        self.num_bytes += size
        for digest, _ in items:
            self._entries[digest].num_holders += 1

    def release(self, digests: list[str]) -> None:
        for digest in digests:
            entry = self._entries[digest]
            entry.num_holders -= 1
            if entry.num_holders == 0:
                del self._entries[digest]
                self.num_bytes -= len(entry.data)

    def get(self, digest: str) -> bytes | None:
        entry = self._entries.get(digest)
        return entry.data if entry is not None else None

    def __len__(self) -> int:
        return len(self._entries)
