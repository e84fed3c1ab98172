"""Which hosts a request may be for, and which pages may send one: a browser on the same machine reaches loopback too.

A page of a foreign site can have its own name resolve to 127.0.0.1 (DNS rebinding): `Host` then shows that name. It can
also post to 127.0.0.1 without that, and the browser says in `Origin` whose page it is.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from qwen3vl_disagg.core.errors import InputError

ANY = "*"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::\d{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`, a name or an address."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


@dataclass(frozen=True)
class Doors:
    """`names`: hosts that are accepted, in lower case. `any_address`: also every IP address, which nobody can have
    resolve to another one. `origins`: whose pages may send requests and read the answers, beside the server's own."""

    names: frozenset[str]
    any_address: bool
    origins: frozenset[str] = frozenset()

    @classmethod
    def of(cls, host: str, allowed: Iterable[str] = (), origins: Iterable[str] = ()) -> Doors:
        """For a server that listens on `host`. InputError for a name in `allowed` that can be no host, and for one in
        `origins` that can be no origin.

        On loopback: its names and addresses. Elsewhere: any address, and this machine's names.
        """
        names = {"localhost", host.lower()}
        if not is_loopback(host):
            own = socket.gethostname().lower()
            names |= {own, own.partition(".")[0]}
        for name in allowed:
            found = name.lower() if name == ANY or _address(name) else _name_of(name)
            if found is None:
                raise InputError(f"--allow-host {name}: must be a host name, an address or {ANY}", param="allow-host")
            names.add(found.strip("[]"))
        return cls(frozenset(names), not is_loopback(host), frozenset(map(_origin_of, origins)))

    def check(self, method: str, headers: Headers) -> None:
        """InputError 403 for a host that is not served, and where a page of another origin sends something."""
        host = headers.get("host")
        if host is not None and not self._is_served(host):
            message = "this server is not addressed by that Host (see its option --allow-host)"
            raise InputError(message, status=403, code="host_not_allowed")
        origin = headers.get("origin")
        if origin is None or method in _SAFE_METHODS or not self.origins.isdisjoint((ANY, origin)):
            return
        if not _is_same(origin, host):
            raise InputError("pages of other origins may not send requests", status=403, code="origin_not_allowed")

    def _is_served(self, host: str) -> bool:
        if ANY in self.names:
            return True
        name = _name_of(host)
        if name is None:
            return False
        if name in self.names or name.endswith(".localhost"):  # RFC 6761, 6.3
            return True
        address = _address(name)
        return address is not None and (self.any_address or address.is_loopback)


def _name_of(host: str) -> str | None:
    """Without port, brackets and the dot of the root, in lower case; None for what can be no host."""
    found = _HOST.fullmatch(host.lower())
    return None if found is None else found[1].strip("[]").removesuffix(".")


def _origin_of(text: str) -> str:
    """As browsers spell it. InputError for what is no origin."""
    if text == ANY:
        return ANY
    try:
        parts = urlsplit(text.lower())
        is_whole = parts.scheme in _DEFAULT_PORTS and not (parts.path.strip("/") or parts.query or parts.fragment)
        name = _name_of(parts.netloc) if is_whole else None
    except ValueError:
        name = None
    if name is None:
        message = f"--allow-origin {text}: must be http or https, :// and a host, as in https://app.example, or {ANY}"
        raise InputError(message, param="allow-origin")
    return f"{parts.scheme}://{parts.netloc.removesuffix(_DEFAULT_PORTS[parts.scheme])}"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _is_same(origin: str, host: str | None) -> bool:
    """Whether an `Origin` is the host and port that the request is for. Behind a proxy the scheme may be another."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return False
    port = _DEFAULT_PORTS.get(parts.scheme)
    if port is None or host is None or not parts.netloc:
        return False
    return parts.netloc.removesuffix(port) == host.lower().removesuffix(port)
