"""Addresses in every spelling, by every way that a URL comes in: refused, and nothing is connected to."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing.messages import MediaUrl
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.body import BodyAccount, BodyBudget
from qwen3vl_disagg.serving.fetch_rules import Address
from qwen3vl_disagg.serving.media_fetch import MAX_HOPS, MediaFetcher, is_elsewhere, resolve
from tests.support.asgi import Exchange
from tests.support.fake_backend import PATH, FakeBackend, tiny_processor
from tests.support.fake_ranks import in_loop
from tests.support.media_origin import HOST, LOOPBACK, fetcher, head, origin


def spellings(address: ipaddress.IPv4Address) -> list[str]:
    """Hosts of URLs that some reader takes for this address: inet_aton(3), RFC 4291, 6052, 3056 and 4380."""
    a, b, c, d = address.packed
    number, high, low = int(address), int(address) >> 16, int(address) & 0xFFFF
    return [
        *(f"{a}.{b}.{c}.{d}", f"{a}.{b}.{c}.{d}.", f"{number}", f"0x{number:x}", f"0X{number:08X}", f"0{number:o}"),
        *(f"0x{a:x}.0x{b:x}.0x{c:x}.0x{d:x}", f"0{a:o}.0{b:o}.0{c:o}.0{d:o}", f"{a}.{number & 0xFFFFFF}"),
        *(f"{a}.{b}.{low}", f"000{a:o}.{b}.{c}.{d}", f"{a + 256}.{b}.{c}.{d}", f"{number + 2**32}"),
        *(f"[::ffff:{address}]", f"[::ffff:{high:x}:{low:x}]", f"[0:0:0:0:0:ffff:{high:x}:{low:x}]", f"[::{address}]"),
        *(f"[64:ff9b::{address}]", f"[64:ff9b:1::{address}]", f"[2002:{high:x}:{low:x}::]", f"[::ffff:0:{address}]"),
        f"[2001:0:{high:x}:{low:x}::{~number & 0xFFFFFFFF:x}]".replace("::", "::0:"),
        *(f"{a}\u3002{b}\u3002{c}\u3002{d}", f"\u2460{a}.{b}.{c}.{d}", f"{a}%2e{b}%2e{c}%2e{d}"),
        *(f"a.org@{address}", f"a.org:80@{address}", f"{address}\\@a.org", f"a.org%40{address}", f"{address}%00.a.org"),
    ]


HOSTS = [
    *(host for inside in ("127.0.0.1", "169.254.169.254") for host in spellings(ipaddress.IPv4Address(inside))),
    *("127.255.255.254", "0.0.0.0", "0", "192.168.0.1", "10.0.0.1", "100.100.100.200", "168.63.129.16", "224.0.0.1"),
    *("localhost", "LOCALHOST.", "ip6-localhost", "a.localhost", socket.gethostname(), "metadata.google.internal"),
    *("[::1]", "[::]", "[::1%25lo]", "[::1%lo]", "[fe80::1%25eth0]", "[fd00:ec2::254]", "[0:0:0:0:0:0:0:1]", "[::1"),
]


NAMES = {
    **dict.fromkeys(("localhost", "ip6-localhost", "a.localhost", socket.gethostname().lower()), "127.0.0.1"),
    "metadata.google.internal": "169.254.169.254",
}


@pytest.fixture(autouse=True)
def no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are read as the system does it; names are those of a table, and no server is asked for others."""
    ask = socket.getaddrinfo

    def read(host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> Any:
        if isinstance(host, str):
            host = NAMES.get(host.rstrip(".").lower(), host)
        return ask(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)

    monkeypatch.setattr(socket, "getaddrinfo", read)


SITE = ipaddress.IPv4Address("127.0.0.2")
"""An address of this host that stands for one outside."""


async def names_of_the_site(host: str, port: int) -> list[Address]:
    return [SITE] if host == HOST else await resolve(host, port)


class Ear:
    """Listens at one port of this host's addresses. `num_heard`: connections so far."""

    def __init__(self) -> None:
        self.num_heard = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    async def hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_heard += 1
        writer.close()


@asynccontextmanager
async def listening() -> AsyncIterator[Ear]:
    ear = Ear()
    async with await asyncio.start_server(ear.hear, None, ear.port):
        yield ear


async def refusal(one: MediaFetcher, url: str) -> InputError:
    with BodyAccount(BodyBudget(10**6)) as account, pytest.raises(InputError) as caught:
        await one.fetch([MediaUrl(url, "here", "image", 1000)], account, 1000)
    return caught.value


@in_loop
async def test_no_spelling_of_an_address_inside_is_connected_to() -> None:
    """All hosts and ports are allowed, addresses looked at as in a server."""
    async with listening() as ear, fetcher("*", resolver=resolve, is_allowed=is_elsewhere, fetch_s=10.0) as one:
        for host in HOSTS:
            for scheme in ("http", "https"):
                error = await refusal(one, f"{scheme}://{host}:{ear.port}/latest/meta-data")
                assert error.code in ("unsupported_url", "media_fetch_failed"), host
                assert "no address" in str(error) or error.code == "unsupported_url", (host, str(error))
        assert ear.num_heard == 0
        _, writer = await asyncio.open_connection("127.0.0.1", ear.port)  # who does connect is heard
        writer.close()
        async with asyncio.timeout(10):
            while not ear.num_heard:
                await asyncio.sleep(0.01)


@in_loop
async def test_no_redirect_leads_inside() -> None:
    """From a host that is allowed; also over several hops, and on the same name at another port."""
    site_only = {"resolver": names_of_the_site, "is_allowed": lambda address: address == SITE or is_elsewhere(address)}
    async with listening() as ear, origin({}, str(SITE)) as site, fetcher("*", **site_only) as one:
        targets = [f"http://{host}:{ear.port}/" for host in HOSTS if host.isascii()]
        targets += [f"//127.0.0.1:{ear.port}/", f"https://127.0.0.1:{ear.port}/", f"\\\\127.0.0.1:{ear.port}\\"]
        targets += [f"{scheme}://127.0.0.1:{ear.port}/" for scheme in ("ftp", "gopher", "dict", "unix", "HTTP")]
        targets += ["file:///etc/passwd", "data:image/png;base64,AAAA", f"http:127.0.0.1:{ear.port}", "javascript:1"]
        site.answers |= {f"/{i}": head(302, Location=target) for i, target in enumerate(targets)}
        site.answers |= {f"/deep{i}": head(302, Location=f"/deep{i + 1}") for i in range(MAX_HOPS - 1)}
        site.answers[f"/deep{MAX_HOPS - 1}"] = head(302, Location=targets[0])
        for path in [*(f"/{i}" for i in range(len(targets))), "/deep0"]:
            assert (await refusal(one, site.url(path))).code in ("unsupported_url", "media_fetch_failed"), path
        assert len(site.requests) >= len(targets) + MAX_HOPS
        assert ear.num_heard == 0


@in_loop
async def test_a_name_that_is_resolved_to_another_address_each_time() -> None:
    """At first to one outside that takes no connection, then to this host (DNS rebinding)."""
    turns = [[ipaddress.ip_address("192.0.2.1")], [LOOPBACK], [ipaddress.ip_address("192.0.2.1"), LOOPBACK]]

    async def rebinding(host: str, port: int) -> list[Any]:
        return turns[asked.append(host) or (len(asked) - 1) % 3]  # type: ignore[func-returns-value]

    asked: list[str] = []
    public = {"is_allowed": lambda address: address != LOOPBACK}
    async with listening() as ear, fetcher("*", resolver=rebinding, fetch_s=0.3, **public) as one:
        for _ in range(6):
            await refusal(one, f"http://pictures.example.org:{ear.port}/")
        assert (len(asked), ear.num_heard) == (6, 0)


@pytest.mark.parametrize("route", ["chat", "video", "frames", "responses", "messages", "tool result", "count", "text"])
@in_loop
async def test_by_no_route(route: str) -> None:
    async with listening() as ear, fetcher("*", resolver=resolve, is_allowed=is_elsewhere) as one:
        app = create_app(FakeBackend(), tiny_processor(), model_name="m", fetcher=one)
        for host in (
            "127.0.0.1",
            "2130706433",
            "[::ffff:127.0.0.1]",
            "localhost",
            "a.org@127.0.0.1",
            "169.254.169.254",
        ):
            path, body = asking(route, f"http://{host}:{ear.port}/a.png")
            exchange = Exchange(app, path, [json.dumps(body).encode()])
            await exchange.run()
            assert exchange.status == 400, exchange.body
        assert ear.num_heard == 0


def asking(route: str, url: str) -> tuple[str, dict[str, Any]]:
    block = {"type": "image", "source": {"type": "url", "url": url}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
    turns = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
    ]
    parts = {
        "chat": {"type": "image_url", "image_url": {"url": url}},
        "video": {"type": "video_url", "video_url": {"url": url}},
        "frames": {"type": "video_url", "video_url": [url, url]},
        "text": {"type": "image_url", "image_url": url},
    }
    if route == "responses":
        return "/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}
    if route in ("messages", "count"):
        path = "/v1/messages" if route == "messages" else "/v1/messages/count_tokens"
        return path, {"max_tokens": 1, "messages": [{"role": "user", "content": [block]}]}
    if route == "tool result":
        return "/v1/messages", {"max_tokens": 1, "messages": [*turns, {"role": "user", "content": [result]}]}
    return "/tokenize" if route == "text" else PATH, {"messages": [{"role": "user", "content": [parts[route]]}]}
