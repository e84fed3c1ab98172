"""Items for an encode server whose language rank is played by a test."""

from __future__ import annotations

import asyncio
from typing import Any

from qwen3vl_disagg.encode.worker import EncodedItem
from qwen3vl_disagg.protocol.messages import Decoded, Header
from tests.support.link_peers import EncodeSide, Peer, make_grant
from tests.support.link_scenarios import CONFIG
from tests.support.transfer import make_encoded

ITEM = make_encoded(CONFIG)


class Source:
    """The media store: what was pulled, and a gate in front of it."""

    def __init__(self) -> None:
        self.pulled: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, digest: str, num_bytes: int) -> bytes:
        self.pulled.append(digest)
        await self.gate.wait()
        return digest.encode()


async def want(side: EncodeSide, peer: Peer, name: str, content: str = "x", **fields: Any) -> None:
    """The language rank wants item 0 of this request."""
    await peer.say(make_grant(name, content=content, **fields))


async def receive(peer: Peer, name: str, encoded: EncodedItem = ITEM, *, attempt: int = 1) -> Header:
    """Its header; the payload has to have these bits."""
    header = await peer.hear(Header)
    assert (header.request_id, header.attempt) == (name, attempt)
    await peer.take(make_grant(name, attempt=attempt), encoded)
    return header


def decoded(side: EncodeSide) -> list[str]:
    """Requests whose image turned out good, in the order in which the router heard of it."""
    return [message.request_id for message in side.said(Decoded)]
