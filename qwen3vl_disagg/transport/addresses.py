"""Who listens where: what the options for addresses and tokens mean. Never all interfaces."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping

from qwen3vl_disagg.core.environment import TOKEN
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.transport.sockets import Address, family_of, listen

LOOPBACK = "127.0.0.1"
MAX_TOKEN_CHARS = 256
_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})")
_NOT_NOW = (socket.EAI_AGAIN,)


class Unreachable(InputError):
    """No way to an address, or nobody to ask for it, now: the arguments may be right."""


def parse_address(text: str, param: str) -> Address:
    """`HOST:PORT`, for IPv6 `[HOST]:PORT` -> one address and a port. InputError, which names the option."""
    found = _ADDRESS.fullmatch(text)
    if not found or int(found[3]) >= 1 << 16:
        hint = ", with IPv6 [HOST]:PORT" if text.count(":") > 1 else ""
        raise InputError(f"--{param} {text}: must be HOST:PORT{hint}", param=param)
    return one_address(found[1] or found[2], param), int(found[3])


def one_address(host: str, param: str) -> str:
    """The address of a name or of itself; of a name that has both kinds, that of IPv4. InputError for none, and for one
    that means every interface or something else on every host; Unreachable where a name cannot be asked for now."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = socket.getaddrinfo(bare, None, socket.AF_UNSPEC, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        kind = Unreachable if getattr(error, "errno", None) in _NOT_NOW else InputError
        raise kind(f"--{param} {host}: no address of that name", param=param) from None
    by_family = {family: str(where[0]) for family, _, _, _, where in reversed(found)}
    address = ipaddress.ip_address(by_family.get(socket.AF_INET) or by_family[socket.AF_INET6])
    if address.version == 6 and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_unspecified:
        raise InputError(f"--{param} {host}: must be one address, not every interface", param=param)
    if address.version == 6 and address.is_link_local:
        problem = "a link-local address means one thing on each interface; ranks need one that is the same for all"
        raise InputError(f"--{param} {host}: {problem}", param=param)
    return str(address)


def own_address(option: str | None, hub: Address) -> str:
    """What this host's listeners bind to: the one given, or else the one from which the hub is reached.

    Nothing is sent. InputError if the one given is none of this host's, or of another kind than the hub's; Unreachable
    if no way leads to the hub.
    """
    if option is not None:
        address = one_address(option, "address")
        if family_of(address) != family_of(hub[0]):
            problem = f"the hub is at {hub[0]}: one is IPv4, the other IPv6"  # groups of ranks cannot be of both
            raise InputError(f"--address {option}: {problem}", param="address")
        try:
            listen(address).close()
        except OSError as error:
            raise InputError(
                f"--address {option}: not one of this host's ({error.strerror})", param="address"
            ) from None
        return address
    with socket.socket(family_of(hub[0]), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(hub)
        except OSError as error:
            raise Unreachable(f"no way to {hub[0]} ({error.strerror}); give --address", param="address") from None
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
