"""Addresses of sockets as they are: an IPv4 or IPv6 address, or a name, and a port. IPv6 is written `[::1]:9000`."""

from __future__ import annotations

import ipaddress
import socket

Address = tuple[str, int]


def address_text(address: Address) -> str:
    """As in a URL, and as options take it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def family_of(host: str) -> socket.AddressFamily:
    """Of an address; a name counts as one of IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listen(host: str, port: int = 0, backlog: int | None = None) -> socket.socket:
    """A listening socket, by default on a free port. OSError if the address cannot be had. `::`, every interface, takes
    IPv4 as well."""
    family = family_of(host)
    is_both = family == socket.AF_INET6 and ipaddress.ip_address(host).is_unspecified and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=backlog, dualstack_ipv6=is_both)
