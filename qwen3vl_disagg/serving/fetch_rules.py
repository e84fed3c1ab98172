"""What may be fetched for a client: from which hosts and addresses, and below which folders."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_disagg.core.errors import InputError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
CLOUDS = [ipaddress.ip_network(name) for name in ("192.0.0.0/24", "168.63.129.16/32")]
"""Where hosts of Oracle's and Microsoft's clouds ask about themselves; `ipaddress` takes parts of it for public."""
PORTS = (80, 443)
"""Where no rule names one: other services of a host are nobody's pictures."""
MAX_PORT = 65535
_RULE = re.compile(r"(\*|(?:\*\.)?[a-z0-9-]+(?:\.[a-z0-9-]+)*)\.?(?::(\*|[1-9][0-9]{0,4}))?")


@dataclass(frozen=True)
class FetchRules:
    """What the operator allows. `domains`: hosts, `*.a.org` for all below a.org, `*` for all; each with a port, `*` for
    any, empty for `PORTS`. `folders`: for `file:` URLs."""

    domains: tuple[tuple[str, str], ...] = ()
    folders: tuple[Path, ...] = ()

    @classmethod
    def of(cls, domains: Iterable[str], folders: Iterable[Path]) -> FetchRules:
        """InputError for what is no host, and for a folder that is not there."""
        hosts = []
        for domain in domains:
            match = _RULE.fullmatch(domain.lower())
            if match is None or ((match[2] or "*") != "*" and int(match[2]) > MAX_PORT):
                examples = f"example.org, *.example.org for all below it, example.org:8443; ports from 1 to {MAX_PORT}"
                message = f"{domain!r} is not a host name ({examples})"
                raise InputError(message, param="allow_media_domain")
            hosts.append((match[1], match[2] or ""))
        found = []
        for folder in folders:
            if not folder.is_dir():
                raise InputError(f"{folder} is not a folder", param="allow_media_path")
            found.append(folder.resolve())
        return cls(tuple(hosts), tuple(found))

    def __bool__(self) -> bool:
        return bool(self.domains or self.folders)

    def has(self, host: str, port: int) -> bool:
        return any(
            (name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:])))
            and (port in PORTS if not of_port else of_port in ("*", str(port)))
            for name, of_port in self.domains
        )


def is_public(address: Address) -> bool:
    """Whether anybody on the internet reaches this address, also the one that it has inside (IPv4 in IPv6)."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = (address.ipv4_mapped, address.sixtofour, *(address.teredo or ()))
        if address.is_site_local or not all(is_public(one) for one in inner if one is not None):
            return False
    if any(address in network for network in CLOUDS):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved
