"""Who listens where: what the options for addresses and tokens mean. IPv4. Never all interfaces."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

from qwen3vl_disagg.core.environment import TOKEN
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.transport.control import Address

LOOPBACK = "127.0.0.1"
MAX_TOKEN_CHARS = 256


def parse_address(text: str, param: str) -> Address:
    """`HOST:PORT` -> one IPv4 address and a port. InputError, which names the option."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) >= 1 << 16:
        raise InputError(f"--{param} {text}: must be HOST:PORT", param=param)
    return one_address(host, param), int(port)


def one_address(host: str, param: str) -> str:
    """The IPv4 address of a name or of itself. InputError for none, and for one that means every interface."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(f"--{param} {host}: no IPv4 address of that name", param=param) from None
    address = str(found[0][4][0])
    if ipaddress.ip_address(address).is_unspecified:
        raise InputError(f"--{param} {host}: must be one address, not every interface", param=param)
    return address


def own_address(option: str | None, hub: Address) -> str:
    """What this host's listeners bind to: the one given, or else the one from which the hub is reached.

    Nothing is sent. InputError if the one given is none of this host's, or no way leads to the hub.
    """
    if option is not None:
        address = one_address(option, "address")
        try:
            socket.create_server((address, 0)).close()
        except OSError as error:
            raise InputError(
                f"--address {option}: not one of this host's ({error.strerror})", param="address"
            ) from None
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(hub)
        except OSError as error:
            raise InputError(f"no way to {hub[0]} ({error.strerror}); give --address", param="address") from None
        return str(probe.getsockname()[0])


def given_token(option: str | None, env: Mapping[str, str]) -> str | None:
    """What ranks show one another, from the option or else the environment. InputError for what can be none."""
    token = env.get(TOKEN) if option is None else option
    if token is not None and not token:
        raise InputError("--token: must not be empty, it would let anybody in", param="token")
    if token is not None and (len(token) > MAX_TOKEN_CHARS or not (token.isascii() and token.isprintable())):
        where = TOKEN if option is None else "--token"
        raise InputError(f"{where}: must be up to {MAX_TOKEN_CHARS} printable ASCII characters", param="token")
    return token
