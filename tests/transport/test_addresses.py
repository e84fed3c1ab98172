"""Addresses and tokens of the command lines: what is taken, and what is refused by name."""

from __future__ import annotations

import ipaddress
import socket
import sys
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.cluster import slots
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.transport.addresses import Unreachable, given_token, one_address, own_address, parse_address
from qwen3vl_disagg.transport.sockets import address_text, listen
from recipes import encode, serve

JOIN = ["--join", "127.0.0.1:9"]
TWO_NODES = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
TWO_NODES |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2", "Q3VL_TOKEN": "t"}


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        ":80",
        "127.0.0.1:",
        "127.0.0.1:x",
        "127.0.0.1:-1",
        "127.0.0.1:65536",
        "::1",
        "::1:80",
        "[::1]",
        "[::1]80",
        "[]:80",
        "[[::1]]:80",
        "a:b:80",
        "[::1]:1_0",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(InputError, match="must be HOST:PORT") as caught:
        parse_address(text, "hub")
    assert caught.value.param == "hub"


HOSTS = [
    "0.0.0.0",
    "0",
    "[::]",
    "[::ffff:0.0.0.0]",
    "no-such-host.invalid",
    "h" * 300,
    "[fe80::1]",
    "[fe80::1%lo]",
    "[::g]",
]


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_not_one_address(host):
    with pytest.raises(InputError, match="--hub"):
        parse_address(f"{host}:80", "hub")


def test_names_become_addresses():
    assert parse_address("localhost:80", "hub") == ("127.0.0.1", 80)
    assert parse_address("127.0.0.2:0", "hub") == ("127.0.0.2", 0)
    assert parse_address("[::1]:80", "hub") == ("::1", 80)
    assert parse_address("[0:0::1]:80", "hub") == ("::1", 80)
    assert parse_address("[::ffff:127.0.0.1]:80", "hub") == ("127.0.0.1", 80)
    assert one_address("[::1]", "address") == one_address("::1", "address") == "::1"


@given(st.ip_addresses(), st.integers(0, 65535))
def test_an_address_is_read_as_it_is_written(address, port):
    own = getattr(address, "ipv4_mapped", None) or address
    text = address_text((str(address), port))
    if own.is_unspecified or (own.version == 6 and own.is_link_local):
        with pytest.raises(InputError, match=r"not every interface|link-local"):
            parse_address(text, "hub")
        return
    host, read_port = parse_address(text, "hub")
    assert (ipaddress.ip_address(host), read_port) == (own, port)
    assert parse_address(address_text((host, port)), "hub") == (host, port)
    assert urlsplit(f"http://{text}").port == port


@given(st.text("0123456789abcdef:.[]%", max_size=24))
def test_whatever_is_written_is_one_address_or_a_refusal(text):
    try:
        host, port = parse_address(text, "hub")
    except InputError:
        return
    assert str(ipaddress.ip_address(host)) == host
    assert 0 <= port <= 65535


def test_a_link_local_address_is_refused_by_name():
    with pytest.raises(InputError, match="--address fe80::1%lo: a link-local address"):
        own_address("fe80::1%lo", ("::1", 9))


def test_both_kinds_are_bound_and_reached():
    for host, other in [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("::", "::1")]:
        with listen(host) as sock, socket.create_connection((other, sock.getsockname()[1]), 5) as peer:
            assert peer.getpeername()[0] == other


def test_the_own_address_is_the_one_that_faces_the_hub():
    assert own_address(None, ("127.0.0.1", 9)) == "127.0.0.1"
    assert own_address("127.0.0.3", ("127.0.0.1", 9)) == "127.0.0.3"
    assert own_address(None, ("::1", 9)) == own_address("::1", ("::1", 9)) == "::1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            with pytest.raises(Unreachable, match="no way to"):
                own_address(None, ("192.0.2.1", 9))
        else:
            assert own_address(None, ("192.0.2.1", 9)) == probe.getsockname()[0]


def test_an_address_of_another_host_is_refused():
    with pytest.raises(InputError, match="not one of this host"):
        own_address("192.0.2.1", ("127.0.0.1", 9))


@pytest.mark.parametrize(("own", "hub"), [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
def test_ranks_of_both_kinds_cannot_be_in_one_job(own, hub):
    with pytest.raises(InputError, match=f"--address {own}: the hub is at {hub}: one is IPv4, the other IPv6"):
        own_address(own, (hub, 9))


def test_the_token_s_sources():
    assert given_token("a", {"Q3VL_TOKEN": "b"}) == "a"
    assert given_token(None, {"Q3VL_TOKEN": "b"}) == "b"
    assert given_token(None, {}) is None
    for value in ("a" * 257, "a\n", "\udc80", "\u00e9"):
        with pytest.raises(InputError, match="Q3VL_TOKEN: must be up to 256 printable"):
            given_token(None, {"Q3VL_TOKEN": value})
        with pytest.raises(InputError, match="--token: must be up to 256 printable"):
            given_token(value, {})
    for option, env in [("", {}), (None, {"Q3VL_TOKEN": ""})]:
        with pytest.raises(InputError, match="must not be empty"):
            given_token(option, env)


@pytest.mark.parametrize(
    ("script", "args", "env", "words"),
    [
        (encode, JOIN, {}, "--token or Q3VL_TOKEN: the server's token is needed"),
        (encode, ["--join", "127.0.0.1", "--token", "t"], {}, "--join 127.0.0.1: must be HOST:PORT"),
        (encode, ["--join", "0.0.0.0:9", "--token", "t"], {}, "not every interface"),
        (encode, [*JOIN, "--token", "t", "--address", "192.0.2.1"], {}, "not one of this host's"),
        (encode, [*JOIN, "--token", "t", "--model", "/no/such"], {}, "--model /no/such: no such folder"),
        (encode, [*JOIN, "--token", "t", "--embedding-cache-mib", "-1"], {}, "--embedding-cache-mib -1"),
        (serve, ["--hub", "127.0.0.1:0"], {}, "--hub without --token or Q3VL_TOKEN: nobody could join"),
        (serve, ["--hub", "0.0.0.0:0", "--token", "t"], {}, "not every interface"),
        (encode, ["--join", "::1:9", "--token", "t"], {}, "--join ::1:9: must be HOST:PORT, with IPv6 [HOST]:PORT"),
        (encode, ["--join", "[fe80::1%lo]:9", "--token", "t"], {}, "a link-local address"),
        (serve, ["--hub", "[2001:db8::1]:0", "--token", "t", "--port", "0"], {}, "listen on [2001:db8::1]:0"),
        (serve, ["--hub", "192.0.2.1:0", "--token", "t", "--port", "0"], {}, "cannot listen on 192.0.2.1:0"),
        (serve, ["--token", ""], {}, "--token: must not be empty"),
        (serve, [], TWO_NODES, "2 nodes need --hub HOST:PORT, an address of node 0"),
        (serve, ["--hub", "127.0.0.1:0"], TWO_NODES, "--hub 127.0.0.1:0: other nodes cannot know the port"),
    ],
)
def test_bad_arguments_end_with_2_and_one_line(script, args, env, words, monkeypatch, capsys):
    monkeypatch.delenv("Q3VL_TOKEN", raising=False)
    monkeypatch.setattr(slots, "die_with_parent", lambda parent: None)
    monkeypatch.setattr(sys, "argv", ["script", *args])
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert script.main() == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert len([line for line in said.err.splitlines() if not line.startswith("at ")]) == 1  # beside a start's own
