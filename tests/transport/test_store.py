"""The rendezvous store: where it listens, and that clients find each other in it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qwen3vl_disagg.transport.store import host_store, join_store

_LISTEN = "0A"


def listening_addresses(port: int) -> set[str]:
    """Local addresses (hex, as the kernel prints them) on which `port` is listened to."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            address, hex_port = local.split(":")
            if int(hex_port, 16) == port and state == _LISTEN:
                found.add(address)
    return found


def other_own_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return None
        address = probe.getsockname()[0]
    return None if address.startswith("127.") else address


@pytest.mark.parametrize(("own", "listens"), [("127.0.0.1", "0100007F"), ("::1", "00000000000000000000000001000000")])
def test_the_store_listens_on_loopback_alone(own, listens):
    store, (host, port) = host_store(own)
    assert host == own
    assert listening_addresses(port) == {listens}
    other = other_own_address()
    if other is not None:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((other, port), timeout=2)
    del store


def test_clients_see_the_same_keys_and_count_together():
    store, address = host_store("127.0.0.1")
    clients = [join_store(address) for _ in range(2)]
    clients[0].set("a", "1")
    assert clients[1].get("a") == store.get("a") == b"1"
    assert [client.add("gpu/here/0", 1) for client in [*clients, store]] == [1, 2, 3]


def test_two_stores_on_one_host_do_not_meet():
    (first, address), (second, other) = host_store("127.0.0.1"), host_store("127.0.0.1")
    assert address != other
    first.set("a", "1")
    assert not second.check(["a"])
