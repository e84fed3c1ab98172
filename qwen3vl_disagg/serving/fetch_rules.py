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
_RULE = re.compile(r"\*|(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*")


@dataclass(frozen=True)
class FetchRules:
    """What the operator allows. `domains`: hosts; `*.a.org` for all below a.org, `*` for all. `folders`: for `file:`
    URLs."""

    domains: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()

    @classmethod
    def of(cls, domains: Iterable[str], folders: Iterable[Path]) -> FetchRules:
        """InputError for what is no host, and for a folder that is not there."""
        hosts = []
        for domain in domains:
            host = domain.lower().rstrip(".")
            if not _RULE.fullmatch(host):
                message = f"{domain!r} is not a host name (example.org, or *.example.org for all below it)"
                raise InputError(message, param="allow_media_domain")
            hosts.append(host)
        found = []
        for folder in folders:
            if not folder.is_dir():
                raise InputError(f"{folder} is not a folder", param="allow_media_path")
            found.append(folder.resolve())
        return cls(tuple(hosts), tuple(found))

    def __bool__(self) -> bool:
        return bool(self.domains or self.folders)

    def has_host(self, host: str) -> bool:
        return any(rule in ("*", host) or (rule.startswith("*.") and host.endswith(rule[1:])) for rule in self.domains)


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
