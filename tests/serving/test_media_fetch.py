"""Media by URL: what may be named, where connections go, what they may cost."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import DisaggError, InputError, OverloadedError
from qwen3vl_disagg.processing.messages import MediaUrl
from qwen3vl_disagg.serving import media_fetch
from qwen3vl_disagg.serving.body import BodyAccount, BodyBudget
from qwen3vl_disagg.serving.fetch_rules import FetchRules, is_public
from qwen3vl_disagg.serving.media_fetch import MAX_HOPS, MAX_OF_ONE, MediaFetcher, is_elsewhere
from tests.support.fake_ranks import in_loop
from tests.support.media_origin import HOST, LIMIT, LOOPBACK, Answer, fetcher, head, origin


def wanted(url: str, limit: int = LIMIT, where: str = "messages[0].content[0]") -> MediaUrl:
    return MediaUrl(url, where, "image", limit)


async def fetch(one: MediaFetcher, *urls: str, limit: int = LIMIT, memory: int = 10 * LIMIT) -> dict[str, bytes]:
    with BodyAccount(BodyBudget(memory)) as account:
        return dict(await one.fetch([wanted(url, limit) for url in urls], account, 10 * LIMIT))


async def refusal(one: MediaFetcher, *urls: str, limit: int = LIMIT) -> InputError:
    with pytest.raises(InputError) as caught:
        await fetch(one, *urls, limit=limit)
    assert caught.value.param == "messages[0].content[0]"
    return caught.value


@in_loop
async def test_files_come_from_the_address_that_was_looked_at_under_the_name_that_was_given() -> None:
    body = b"picture" * 20
    chunked = head(Transfer_Encoding="chunked") + b"8c\r\n" + body + b"\r\n0\r\n\r\n"
    async with origin({"/a?b=c": head(Content_Length="140") + body, "/d": chunked}) as site, fetcher() as one:
        urls = site.url("/a?b=c#part"), site.url("/d", HOST.upper() + ".")
        assert await fetch(one, *urls, urls[0]) == dict.fromkeys(urls, body)
        assert len(site.requests) == 2
        for request in site.requests:
            names = [line.partition(": ")[0].lower() for line in request.splitlines()[1:]]
            assert f"Host: {HOST}:{site.port}" in request
            assert not {"cookie", "authorization"} & set(names)


@in_loop
async def test_only_hosts_that_are_named_are_asked() -> None:
    async with origin({}) as site, fetcher("a.org", "*.b.org") as one:
        for host in (
            "b.org",
            "evil.org",
            "xa.org",
            "a.org.evil.org",
            "xb.org",
            "127.0.0.1",
            "localhost",
            "2130706433",
            "b.org#@a.org",
        ):
            assert (await refusal(one, site.url("/", host))).code == "unsupported_url"
        assert not site.requests
        for host in ("a.org", "x.b.org", "x.y.b.org"):
            assert "site" not in str(await refusal(one, f"http://{host}:1/"))  # allowed, and nobody is there


@pytest.mark.parametrize(
    "url",
    [
        "http://a.org\\@b.org/",
        "http://user@a.org/",
        "http://a.org%2eb.org/",
        "http://a.org /",
        "http://a.org\t/",
        "http://\u0430.org/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http:a.org/",
        "http:///a.org/",
        "http://a.org:0/",
        "http://a.org:99999/",
        "http://a.org:80:80/",
        "http://a.org/\r\nX: y",
        "http://a.org/" + "a" * 5000,
        "https://",
    ],
)
@in_loop
async def test_urls_that_two_readers_could_read_differently_are_refused(url: str) -> None:
    async with fetcher("a.org", "*") as one:
        error = await refusal(one, url)
        assert (error.code, error.status) == ("unsupported_url", 400)
        assert "\u0430" not in str(error)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "168.63.129.16",
        "192.0.0.192",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "::1",
        "::",
        "::7f00:1",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2002:c0a8:1::",
        "2001:db8::1",
        "fec0::1",
    ],
)
def test_what_is_not_reached_by_everybody_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
def test_an_address_inside_another_one_is_no_better(inner: ipaddress.IPv4Address) -> None:
    for text in (f"::ffff:{inner}", f"64:ff9b::{inner}", f"2002:{int(inner) >> 16:x}:{int(inner) & 0xFFFF:x}::1"):
        assert is_public(ipaddress.ip_address(text)) <= is_public(inner)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@in_loop
async def test_one_address_that_is_not_public_is_enough_and_names_are_resolved_once() -> None:
    asked = []

    async def rebinding(host: str, port: int) -> list[Any]:
        asked.append(host)
        return [ipaddress.ip_address("8.8.8.8"), LOOPBACK]

    async with origin({"/": head()}) as site, fetcher("*", resolver=rebinding, is_allowed=is_public) as one:
        assert "not a public one" in str(await refusal(one, site.url("/")))
        assert asked == [HOST]
        assert not site.requests


@in_loop
async def test_the_connection_goes_to_an_address_that_was_checked() -> None:
    """The next answer of the resolver may be another one."""
    answers = [[LOOPBACK], [ipaddress.ip_address("127.0.0.2")]]

    async def rebinding(host: str, port: int) -> list[Any]:
        return answers.pop(0)

    async with origin({"/": head(Content_Length="1") + b"x"}) as site, fetcher(resolver=rebinding) as one:
        assert await fetch(one, site.url("/")) == {site.url("/"): b"x"}
        assert len(answers) == 1


@in_loop
async def test_redirects_are_looked_at_like_urls() -> None:
    async with fetcher() as one, origin({}) as site:
        site.answers |= {
            "/next": head(302, Location="good"),
            "/good": head(Content_Length="2") + b"ok",
            "/away": head(301, Location="http://evil.org/"),
            "/slashes": head(307, Location="//evil.org/x"),
            "/file": head(308, Location="file:///etc/passwd"),
            "/loop": head(302, Location="/loop"),
            "/nowhere": head(302),
            "/bracket": head(302, Location="http://[::1"),
        }
        assert await fetch(one, site.url("/next")) == {site.url("/next"): b"ok"}
        for path in ("/away", "/slashes", "/file"):
            assert (await refusal(one, site.url(path))).code == "unsupported_url"
        before = len(site.requests)
        assert "redirects" in str(await refusal(one, site.url("/loop")))
        assert len(site.requests) - before == MAX_HOPS + 1
        for path in ("/nowhere", "/bracket"):
            assert "nowhere" in str(await refusal(one, site.url(path)))


@in_loop
async def test_what_a_host_does_wrong_is_the_clients_error() -> None:
    async def stall(request: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async def drip(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(head())
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    answers: dict[str, bytes | Answer] = {
        "/missing": head(404),
        "/zip": head(Content_Encoding="gzip") + b"x",
        "/short": head(Content_Length="100") + b"x",
        "/garbage": b"\x00\x01\x02\r\n\r\n",
        "/stall": stall,
        "/drip": drip,
    }
    async with origin(answers) as site, fetcher(fetch_s=0.5) as one:
        for path, said in [
            ("/missing", "status 404"),
            ("/zip", "compressed"),
            ("/short", "does not answer well"),
            ("/garbage", "does not answer well"),
            ("/stall", "longer than 0.5 s"),
            ("/drip", "longer than 0.5 s"),
        ]:
            error = await refusal(one, site.url(path))
            assert said in str(error), path
            assert (error.status, error.code) == (400, "media_fetch_failed")
        assert "cannot be reached" in str(await refusal(one, f"http://{HOST}:1/"))


@in_loop
async def test_bytes_are_bounded_said_or_not_each_and_together_and_in_memory() -> None:
    sent = 0

    async def endless(request: str, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(head())
        while True:
            writer.write(b"x" * 500)
            await writer.drain()
            sent += 500

    piece = head(Content_Length="900") + b"y" * 900
    answers: dict[str, bytes | Answer] = {f"/{i}": piece for i in range(12)}
    answers |= {"/said": head(Content_Length="9999999999"), "/endless": endless}
    async with origin(answers) as site, fetcher() as one:
        for path in ("/said", "/endless"):
            assert (await refusal(one, site.url(path))).status == 413
        assert sent < 2**23  # what fits into the buffers of two sockets
        assert "together" not in str(await refusal(one, *(site.url(f"/{i}") for i in range(12))))
        budget = BodyBudget(1000)
        with BodyAccount(budget) as account, pytest.raises(OverloadedError):
            await one.fetch([wanted(site.url(f"/{i}")) for i in range(2)], account, 10 * LIMIT)
        assert budget.used == 0


@in_loop
async def test_a_request_that_is_given_up_fetches_nothing_more() -> None:
    is_closed = asyncio.Event()

    async def stall(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(head())
        await writer.drain()
        while not writer.transport.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.01)
        is_closed.set()

    async with origin({"/": stall}) as site, fetcher() as one:
        task = asyncio.create_task(fetch(one, site.url("/")))
        while not site.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(is_closed.wait(), 5)


@in_loop
async def test_addresses_of_this_host_are_not_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_fetch, "is_public", lambda address: True)
    assert not is_elsewhere(LOOPBACK)
    assert is_elsewhere(ipaddress.ip_address("8.8.8.8"))


@in_loop
async def test_what_is_fetched_for_nobody_is_not_counted_for_ever() -> None:
    """The request has ended, its account is closed, and a chunk still comes."""
    gate = asyncio.Event()

    async def late(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(head())
        await gate.wait()
        writer.write(b"x")
        await writer.drain()

    budget = BodyBudget(1000)
    account = BodyAccount(budget)
    async with origin({"/": late}) as site, fetcher() as one:
        task = asyncio.create_task(one.fetch([wanted(site.url("/"))], account, LIMIT))
        while not site.requests:
            await asyncio.sleep(0.01)
        account.release()
        gate.set()
        await task
    assert budget.used == 0


@in_loop
async def test_one_request_does_not_take_all_places() -> None:
    gate = asyncio.Event()

    async def wait(request: str, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        writer.write(head())

    answers: dict[str, bytes | Answer] = {f"/{i}": wait for i in range(30)}
    async with origin({**answers, "/quick": head(Content_Length="1") + b"x"}) as site, fetcher() as one:
        many = asyncio.create_task(fetch(one, *(site.url(f"/{i}") for i in range(30))))
        while len(site.requests) < MAX_OF_ONE:
            await asyncio.sleep(0.01)
        assert await fetch(one, site.url("/quick")) == {site.url("/quick"): b"x"}
        assert len(site.requests) == MAX_OF_ONE + 1
        gate.set()
        assert len(await many) == 30


@in_loop
async def test_files_below_the_folders_and_nothing_else(tmp_path: Path) -> None:
    folder, secret = tmp_path / "shared", tmp_path / "secret"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.png").write_bytes(b"good")
    (folder / "large").write_bytes(b"x" * (LIMIT + 1))
    secret.write_bytes(b"secret")
    (folder / "link").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    (folder / "inner").symlink_to(folder / "sub" / "a b.png")
    os.mkfifo(folder / "pipe")
    async with fetcher(folders=(folder,)) as one:
        for name in ("sub/a%20b.png", "inner", "sub/../inner"):
            url = f"file://{folder}/{name}"
            assert await fetch(one, url) == {url: b"good"}
        bad = ["link", "up/secret", "../secret", "%2e%2e/secret", "sub", "pipe", "missing", "a%00b", "%ff"]
        for name in bad:
            assert "no such file" in str(await refusal(one, f"file://{folder}/{name}"))
        for url in ("file:///etc/passwd", f"file://localhost{secret}"):
            assert "no such file" in str(await refusal(one, url))
        for url in (f"file://other{secret}", f"file:{secret}", "file:///a b"):
            assert (await refusal(one, url)).code == "unsupported_url"
        assert (await refusal(one, f"file://{folder}/large")).status == 413
    async with fetcher() as one:
        assert (await refusal(one, f"file://{folder}/inner")).code == "unsupported_url"


@pytest.mark.parametrize(
    ("rule", "ports"),
    [
        ("a.org", {80, 443}),
        ("*", {80, 443}),
        ("*.org", {80, 443}),
        ("A.ORG.:8443", {8443}),
        ("*.org:22", {22}),
        ("*:*", {22, 80, 443, 8443}),
        ("b.org:*", set()),
    ],
)
def test_ports_of_a_rule(rule: str, ports: set[int]) -> None:
    rules = FetchRules.of((rule,), ())
    assert {port for port in (22, 80, 443, 8443) if rules.has("a.org", port)} == ports


NO_PORTS = ["a.org:0", "a.org:08443", "a.org:65536", "*:99999"]


@pytest.mark.parametrize(
    "domain",
    ["", "http://a.org", "a.org/x", "a b", "*a.org", "a.*", "user@a.org", "a.org:", "a.org:x", "a.org:8*", *NO_PORTS],
)
def test_rules_that_name_no_host_are_refused(domain: str, tmp_path: Path) -> None:
    with pytest.raises(DisaggError, match="host name"):
        FetchRules.of((domain,), ())
    with pytest.raises(DisaggError, match="not a folder"):
        FetchRules.of((), (tmp_path / "missing",))
