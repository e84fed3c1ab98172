"""Uploaded bytes under their SHA-256, kept while a request needs them, and both ends of the way to an encode rank."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3vl_disagg.core.errors import DeadlineError, OverloadedError, TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.media.video import MAX_VIDEO_BYTES
from qwen3vl_disagg.protocol.messages import Blob, Heartbeat, Pull
from qwen3vl_disagg.transport.control import HEARTBEAT_S, STILL_S, Connection, connect_hub
from qwen3vl_disagg.transport.sockets import Address
from qwen3vl_disagg.transport.tls import Tls

REACH_S = 30.0
"""For a connection: the frontend may be about to begin anew. From then on a pull goes on as long as something comes."""
MAX_PULLS = 64
"""Answered at a time; each has at most a slice of its bytes on the way."""


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
        self._pulls = asyncio.Semaphore(MAX_PULLS)

    def hold(self, items: Sequence[VisualItem], media: Sequence[bytes]) -> None:
        """Keep the bytes of a request's items, all or none, until `release` was called as often.

        OverloadedError when there is no room.
        """
        pairs = [(item.digest, data) for item, data in zip(items, media, strict=True)]
        new = {digest: data for digest, data in pairs if digest not in self._entries}
        size = sum(map(len, new.values()))
        if self.num_bytes + size > self.max_bytes:
            raise OverloadedError("no room for more images and clips now")
        for digest, data in new.items():
            self._entries[digest] = _Entry(data, 0)
        self.num_bytes += size
        for digest, _ in pairs:
            self._entries[digest].num_holders += 1

    def release(self, items: Sequence[VisualItem]) -> None:
        for digest in (item.digest for item in items):
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

    async def answer(self, connection: Connection, pull: Pull) -> None:
        """What an encode rank asks for: how many bytes there are, -1 for none under that digest, and the bytes."""
        place = asyncio.create_task(self._pulls.acquire())
        try:
            while not (await asyncio.wait((place,), timeout=HEARTBEAT_S))[0]:
                await connection.send(Heartbeat())
            data = self.get(pull.digest)
            await connection.send(Blob(num_bytes=-1 if data is None else len(data)))
            if data is not None:
                await connection.send_bytes(data)
        finally:
            if not place.cancel():  # it was taken
                self._pulls.release()


async def pull_media(hub: Address, token: str, digest: str, num_bytes: int, *, tls: Tls | None = None) -> bytes:
    """The bytes under `digest` from the store behind the hub at that address, checked. TransferError without them,
    also when nothing comes for STILL_S seconds."""
    source = await connect_hub(hub, deadline_s=REACH_S, tls=tls)
    try:
        await source.send(Pull(token=token, digest=digest))
        try:
            blob = await source.receive(timeout=STILL_S, heartbeats_count=True)
        except DeadlineError as error:  # how long the request may take, others know
            raise TransferError(str(error)) from None
        if not isinstance(blob, Blob) or blob.num_bytes != num_bytes or num_bytes > MAX_VIDEO_BYTES:
            raise TransferError("the media store does not have the item")
        data = await source.receive_bytes(num_bytes)
    finally:
        await source.close()
    if hashlib.sha256(data).hexdigest() != digest:
        raise TransferError("the item's bytes do not have its digest")
    return data
