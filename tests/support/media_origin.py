"""A host on loopback from which media are fetched, and a fetcher to which it is a public one."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qwen3vl_disagg.serving.fetch_rules import FetchRules
from qwen3vl_disagg.serving.media_fetch import MediaFetcher

LIMIT, HOST = 1000, "pictures.example.org"
LOOPBACK = ipaddress.ip_address("127.0.0.1")
Answer = Callable[[str, asyncio.StreamWriter], Coroutine[Any, Any, None]]


def head(status: int = 200, **fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Connection: close", *(f"{k.replace('_', '-')}: {v}" for k, v in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


class Origin:
    """A server on loopback that answers by path. `requests` has the head of each."""

    def __init__(self, answers: dict[str, bytes | Answer]) -> None:
        self.answers, self.requests, self.port = answers, list[str](), 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(request)
            answer = self.answers[request.split()[1]]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(request, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client had enough
        finally:
            writer.close()

    def url(self, path: str, host: str = HOST) -> str:
        return f"http://{host}:{self.port}{path}"


@asynccontextmanager
async def origin(answers: dict[str, bytes | Answer], address: str = "127.0.0.1") -> AsyncIterator[Origin]:
    one = Origin(answers)
    server = await asyncio.start_server(one.serve, address, 0)
    one.port = server.sockets[0].getsockname()[1]
    async with server:
        yield one


@asynccontextmanager
async def fetcher(*domains: str, folders: tuple[Path, ...] = (), **settings: Any) -> AsyncIterator[MediaFetcher]:
    """Every name is this host, this host is public, and all its ports are."""

    async def here(host: str, port: int) -> list[Any]:
        return [LOOPBACK]

    given = {"resolver": here, "is_allowed": lambda address: True, **settings}
    one = MediaFetcher(FetchRules.of([f"{domain}:*" for domain in domains or (HOST,)], folders), **given)
    try:
        yield one
    finally:
        await one.close()
