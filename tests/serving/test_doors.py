"""Whose requests are served: by Host, Origin and Content-Type."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.serving.doors import Doors, is_loopback
from tests.support.fake_backend import ASK, PATH, FakeBackend, serve

OWN = socket.gethostname().lower()
HERE = Doors.of("127.0.0.1")
ALL = Doors.of("0.0.0.0")


def ask(doors: Doors, method: str = "POST", path: str = PATH, **headers: str | None) -> Any:
    """Status and code."""
    sent = {"content_type": "application/json", "host": "localhost:8000", **headers}
    named = {name.replace("_", "-"): value for name, value in sent.items() if value is not None}
    reply = serve(FakeBackend(), doors=doors).request(
        method, path, content=json.dumps(ASK) if method == "POST" else None, headers=named
    )
    return reply.status_code, reply.json().get("error", {}).get("code")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST:9",
        "127.0.0.1:8000",
        "127.1.2.3",
        "[::1]:8000",
        "a.localhost:1",
        "localhost.",
    ],
)
def test_hosts_of_a_loopback_server(host):
    assert ask(HERE, host=host) == (200, None)


@pytest.mark.parametrize("path", [PATH, "/v1/models", "/health", "/ready", "/nothing"])
@pytest.mark.parametrize(
    "host", ["evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1:8000", "localhost@evil", "a b", ""]
)
def test_names_that_were_made_to_resolve_here(host, path):
    assert ask(HERE, "POST" if path == PATH else "GET", path, host=host) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["10.1.2.3:8000", "[2001:db8::1]", "127.0.0.1", "localhost", OWN, f"{OWN}:8000"])
def test_hosts_of_a_server_on_all_interfaces(host):
    assert ask(ALL, host=host) == (200, None)
    assert ask(ALL, host="evil.example") == (403, "host_not_allowed")


def test_hosts_that_were_allowed():
    doors = Doors.of("10.1.2.3", ["api.Example", "::1"])
    for host in ("api.example", "API.EXAMPLE:443", "10.1.2.3:8000", "[::1]:1"):
        assert ask(doors, host=host) == (200, None)
    assert ask(doors, host="b.api.example") == (403, "host_not_allowed")
    for spelled in ("Api.example:8000", "api.example."):
        for host in ("api.example", "api.example:8000", "api.example."):
            assert ask(Doors.of("127.0.0.1", [spelled]), host=host) == (200, None)
    assert ask(Doors.of("127.0.0.1", ["[fe80::1]:80"]), host="[fe80::1]:8000") == (200, None)
    assert ask(Doors.of("0.0.0.0", ["*"]), host="what.ever") == (200, None)
    for bad in ("http://a", "a/b", "", "a b"):
        with pytest.raises(InputError) as caught:
            Doors.of("127.0.0.1", [bad])
        assert caught.value.param == "allow-host"


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:8000", "localhost:8000"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://localhost", "localhost:80"),
        ("https://localhost", "localhost"),
        ("http://LOCALHOST:8000", "localhost:8000"),
    ],
)
def test_pages_of_the_server_itself_may_post(origin, host):
    assert ask(HERE, host=host, origin=origin) == (200, None)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost:3000",
        "https://localhost:8000.evil",
        "null",
        "",
        "file://",
        "http://[",
        "x",
    ],
)
def test_pages_of_others_may_not(origin):
    assert ask(HERE, origin=origin) == (403, "origin_not_allowed")
    assert ask(HERE, "GET", "/v1/models", origin=origin)[0] == 200  # without CORS no page can read the answer


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 415),
        ("", 415),
        ("text/plain", 415),
        ("text/plain;application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
    ],
)
def test_a_post_says_that_it_is_json(content_type, status):
    """What a page can send without asking first (a form's types, or none) is refused."""
    assert ask(HERE, content_type=content_type)[0] == status


def test_what_is_loopback():
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "", "10.0.0.1", "example.org")] == [False] * 5
