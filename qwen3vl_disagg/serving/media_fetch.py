"""Images and clips by URL, for a server that allows it: from named hosts, or files below named folders.

A URL comes from whoever may ask, so what it names must be public and of a host that the operator named: else a request
could make this server speak to what only it can reach. The host is taken apart once, by a pattern that takes nothing
strange; all its addresses are looked at, and the connection goes to one of those. Every redirect is looked at again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from ssl import SSLContext
from typing import BinaryIO
from urllib.parse import unquote, urljoin

import httpx2

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing.messages import MAX_URL_CHARS, MediaUrl
from qwen3vl_disagg.serving.body import BodyAccount
from qwen3vl_disagg.serving.fetch_rules import Address, FetchRules, is_public

Resolve = Callable[[str, int], Awaitable[list[Address]]]

MAX_HOPS = 3
"""Redirects that are followed."""
MAX_AT_ONCE, MAX_OF_ONE = 16, 4
"""Fetches of all requests, and of one; more wait."""
CONNECT_S, SILENCE_S, FETCH_S = 5.0, 5.0, 30.0
"""For a connection; without a byte; for all of one file."""
REDIRECTS = (301, 302, 303, 307, 308)
_URL = re.compile(r"(https?)://([A-Za-z0-9.-]{1,253})(?::([0-9]{1,5}))?((?:[/?][!-~]*)?)", re.ASCII | re.IGNORECASE)
"""Scheme, host, port, the rest. No user, no backslash, no blank, nothing beyond ASCII; a fragment is cut off before."""
_PORTS = {"http": 80, "https": 443}
_FILE = re.compile(r"file://(?:localhost)?(/[!-~]*)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class _Target:
    """An http(s) URL, taken apart."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str, where: str) -> _Target:
        match = _URL.fullmatch(url.partition("#")[0]) if len(url) <= MAX_URL_CHARS else None
        if match is None:
            message = "the URL must be http(s)://host[:port]/path in plain ASCII, without a user"
            raise InputError(message, param=where, code="unsupported_url")
        scheme, host, port, path = match.groups()
        scheme = scheme.lower()
        number = int(port) if port else _PORTS[scheme]
        if not 1 <= number <= 65535:
            raise InputError(f"there is no port {number}", param=where, code="unsupported_url")
        return cls(scheme, host.lower().rstrip("."), number, path if path.startswith("/") else f"/{path}")

    def at(self, address: Address) -> str:
        """The URL with this address in place of the host."""
        name = f"[{address}]" if address.version == 6 else str(address)
        return f"{self.scheme}://{name}:{self.port}{self.path}"

    @property
    def authority(self) -> str:
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


_RESOLVERS = ThreadPoolExecutor(4, thread_name_prefix="resolve")
"""Threads of their own: a name server that is silent holds one for longer than anybody waits."""


async def resolve(host: str, port: int) -> list[Address]:
    """All addresses of a host. OSError if it has none."""
    ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    found = await asyncio.get_running_loop().run_in_executor(_RESOLVERS, ask)
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


def is_elsewhere(address: Address) -> bool:
    """Whether it is public, and not one of this host's own."""
    if not is_public(address):
        return False
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as own:
        try:
            own.bind((str(address), 0))
        except OSError:
            return True
    return False


class MediaFetcher:
    """Fetches what the URLs of a request name, all at once. `close` it in the end.

    `resolver` and `is_allowed` are for tests, which have no internet; `verify` for hosts with a certificate of their
    own.
    """

    def __init__(
        self,
        rules: FetchRules,
        *,
        resolver: Resolve = resolve,
        is_allowed: Callable[[Address], bool] = is_elsewhere,
        verify: SSLContext | bool = True,
        fetch_s: float = FETCH_S,
    ) -> None:
        self.rules = rules
        self._resolve, self._is_allowed, self._fetch_s = resolver, is_allowed, fetch_s
        self._places = asyncio.Semaphore(MAX_AT_ONCE)
        # A connection is never used twice: the pool knows it by its address, and two hosts may have the same.
        self._client = httpx2.AsyncClient(
            verify=verify,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx2.Timeout(SILENCE_S, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=MAX_AT_ONCE, max_keepalive_connections=0),
        )
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch(self, urls: Sequence[MediaUrl], account: BodyAccount, max_bytes: int) -> Mapping[str, bytes]:
        """URL -> its bytes, which `account` takes, `max_bytes` together at most.

        InputError naming the place of the first that cannot be had; OverloadedError.
        """
        left, own_places = max_bytes, asyncio.Semaphore(MAX_OF_ONE)

        def take(num_bytes: int, where: str) -> None:
            nonlocal left
            left -= num_bytes
            if left < 0:
                message = f"the images and clips by URL have more than {max_bytes} bytes"
                raise InputError(message, param=where, status=413)
            account.take(num_bytes)

        async def one(wanted: MediaUrl) -> bytes:
            async with own_places, self._places:
                return await self._one(wanted, take)

        account.hold()
        once = {wanted.url: wanted for wanted in urls}
        tasks = {url: asyncio.ensure_future(one(wanted)) for url, wanted in once.items()}
        try:
            return {url: await task for url, task in tasks.items()}
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            account.let_go()

    async def _one(self, wanted: MediaUrl, take: Callable[[int, str], None]) -> bytes:
        if wanted.url[:5].lower() == "file:":
            with await asyncio.to_thread(self._open, wanted) as file:
                take(os.fstat(file.fileno()).st_size, wanted.where)
                data = await asyncio.to_thread(file.read, wanted.limit + 1)
            if len(data) > wanted.limit:  # it has grown meanwhile
                raise _too_large(wanted)
            return data
        try:
            async with asyncio.timeout(self._fetch_s):
                return await self._hops(wanted, take)
        except TimeoutError:
            raise _failed(f"took longer than {self._fetch_s:g} s", wanted) from None

    async def _hops(self, wanted: MediaUrl, take: Callable[[int, str], None]) -> bytes:
        target = _Target.of(wanted.url, wanted.where)
        for _ in range(MAX_HOPS + 1):
            addresses = await self._addresses(target, wanted)
            answer = await self._get(target, addresses, wanted, take)
            if isinstance(answer, bytes):
                return answer
            try:
                place = urljoin(str(target), answer)
            except ValueError:  # no URL at all
                raise _failed("a redirect leads nowhere", wanted) from None
            following = _Target.of(place, wanted.where)
            if (target.scheme, following.scheme) == ("https", "http"):
                raise _failed("a redirect leads from https to http", wanted)
            target = following
        raise _failed(f"more than {MAX_HOPS} redirects", wanted)

    async def _addresses(self, target: _Target, wanted: MediaUrl) -> list[Address]:
        """Where to connect to. InputError unless the host is allowed and all that it resolves to is public."""
        if not self.rules.has(target.host, target.port):
            message = f"this server does not fetch from {target.authority[-80:]}"
            raise InputError(message, param=wanted.where, code="unsupported_url")
        try:
            async with asyncio.timeout(CONNECT_S):
                found = await self._resolve(target.host, target.port)
        except (OSError, UnicodeError, TimeoutError):
            raise _failed("the host has no address", wanted) from None
        if not found or not all(map(self._is_allowed, found)):
            raise InputError("the URL's host is not a public one", param=wanted.where, code="unsupported_url")
        return list(dict.fromkeys(found))

    async def _get(
        self, target: _Target, addresses: list[Address], wanted: MediaUrl, take: Callable[[int, str], None]
    ) -> bytes | str:
        """The file, or where a redirect leads; from the first address that takes the connection."""
        for address in addresses:
            try:
                return await self._get_at(target, address, wanted, take)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
            except httpx2.TimeoutException:
                raise _failed("its host fell silent", wanted) from None
            except (httpx2.HTTPError, httpx2.InvalidURL):
                raise _failed("its host does not answer well", wanted) from None
        raise _failed("its host cannot be reached", wanted)

    async def _get_at(
        self, target: _Target, address: Address, wanted: MediaUrl, take: Callable[[int, str], None]
    ) -> bytes | str:
        headers = {"Host": target.authority, "Accept": "image/*, video/*, */*;q=0.1", "Accept-Encoding": "identity"}
        names = {"sni_hostname": target.host}
        async with self._client.stream("GET", target.at(address), headers=headers, extensions=names) as answer:
            if answer.status_code in REDIRECTS:
                place = answer.headers.get("location", "")
                if not place or len(place) > MAX_URL_CHARS:
                    raise _failed("a redirect leads nowhere", wanted)
                return place
            if answer.status_code != 200:
                raise _failed(f"status {answer.status_code}", wanted)
            if answer.headers.get("content-encoding", "identity").lower() != "identity":
                raise _failed("it comes compressed", wanted)
            length = answer.headers.get("content-length", "0")
            if length.isdecimal() and int(length[:20]) > wanted.limit:
                raise _too_large(wanted)
            data = bytearray()
            async for chunk in answer.aiter_raw():
                if len(data) + len(chunk) > wanted.limit:
                    raise _too_large(wanted)
                take(len(chunk), wanted.where)
                data += chunk
            return bytes(data)

    def _open(self, wanted: MediaUrl) -> BinaryIO:
        """A file below one of the folders. What leads out of them, also by links, is as if it were not there."""
        match = _FILE.fullmatch(wanted.url) if len(wanted.url) <= MAX_URL_CHARS else None
        if not self.rules.folders or match is None:
            raise InputError("a file: URL must be file:///path", param=wanted.where, code="unsupported_url")
        missing = InputError("there is no such file in the folders of this server", param=wanted.where)
        try:
            path = Path(unquote(match[1], errors="strict")).resolve(strict=True)
            if not self._is_below(path) or not path.is_file():  # to open a device may do something
                raise missing
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError, RuntimeError):
            raise missing from None
        try:
            # What was opened counts, not what the name meant a moment before.
            opened, found = Path(os.readlink(f"/proc/self/fd/{handle}")), os.fstat(handle)
            if not self._is_below(opened) or not stat.S_ISREG(found.st_mode):
                raise missing
            if found.st_size > wanted.limit:
                raise _too_large(wanted)
            return open(handle, "rb")
        except BaseException:
            os.close(handle)
            raise

    def _is_below(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self.rules.folders)


def _failed(why: str, wanted: MediaUrl) -> InputError:
    return InputError(f"the {wanted.what} could not be fetched: {why}", param=wanted.where, code="media_fetch_failed")


def _too_large(wanted: MediaUrl) -> InputError:
    message = f"the {wanted.what} is larger than the limit of {wanted.limit} bytes"
    return InputError(message, param=wanted.where, status=413)
