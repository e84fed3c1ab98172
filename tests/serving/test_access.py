"""API keys: what they guard, what shows them, and that two of them share no cache."""

from __future__ import annotations

import hmac
import logging

import pytest

from qwen3vl_disagg.core.environment import API_KEY
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import HttpOptions
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.doors import Doors
from tests.support.fake_backend import ASK, PATH, FakeBackend, serve
from tests.support.images import png, uri

KEYS = ("sk-first", "sk-second")
SHOWN = {"Authorization": "Bearer sk-first"}
OTHER = {"x-api-key": "sk-second"}
LOOK = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri(png())}}, "what?"]}]}


@pytest.fixture(scope="module")
def client():
    return serve(FakeBackend(), keys=ApiKeys(KEYS), debug=True)


PLACES = [
    ("POST", PATH),
    ("GET", PATH),
    ("OPTIONS", PATH),
    ("GET", "/v1/models"),
    ("HEAD", "/v1/models"),
    ("GET", "/debug/processes"),
    ("GET", "/"),
    ("GET", "/nothing"),
    ("DELETE", "/v1"),
    ("FOO", "/metrics"),
    ("GET", "/metrics"),
    ("GET", "/health/"),
    ("GET", "/healthz"),
    ("GET", "//health"),
    ("GET", "/ready/../v1/models"),
    ("GET", "/v1/models?/health"),
    ("GET", "/v1/models;/ready"),
    ("GET", "/%2fhealth"),
    ("GET", "/HEALTH"),
]


@pytest.mark.parametrize(("method", "path"), PLACES)
def test_everything_is_guarded(client, method, path):
    reply = client.request(method, path, content=b"{" if method == "POST" else None)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in reply.headers
    if method != "HEAD":
        error = reply.json()["error"]
        assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "authentication_error", None)
    assert client.request(method, path, content=b"{" if method == "POST" else None, headers=SHOWN).status_code != 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/%68ealth"])
def test_how_the_server_is_needs_no_key(client, path):
    assert client.get(path).status_code == 200
    assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [
        ({"Authorization": "Bearer sk-first"}, True),
        ({"Authorization": "bearer   sk-second "}, True),
        ({"X-Api-Key": "sk-first"}, True),
        ({"Authorization": "Bearer wrong", "x-api-key": "sk-second"}, True),
        ({"Authorization": "sk-first"}, False),
        ({"Authorization": "Basic sk-first"}, False),
        ({"Authorization": "Bearer"}, False),
        ({"Authorization": "Bearer "}, False),
        ({"Authorization": "Bearer sk-firs"}, False),
        ({"Authorization": "Bearer sk-first2"}, False),
        ({"Authorization": "Bearer sk-first,sk-second"}, False),
        ({"Authorization": "Bearer SK-FIRST"}, False),
        ({"x-api-key": ""}, False),
        ({"x-api-key": b"sk-f\xefrst"}, False),
        ({"api-key": "sk-first"}, False),
        ({"Cookie": "api_key=sk-first"}, False),
    ],
)
def test_how_a_key_is_shown(client, headers, is_let_in):
    assert client.get("/v1/models", headers=headers).status_code == (200 if is_let_in else 401)


def test_all_keys_are_compared_whichever_fits(monkeypatch):
    compared, compare_digest = [], hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare_digest(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    client = serve(FakeBackend(), keys=ApiKeys(["a", "bb", "ccc"]))
    for key in ("a", "bb", "ccc", "x" * 500):
        compared.clear()
        client.get("/v1/models", headers={"x-api-key": key})
        assert len(compared) == 3
        assert {len(side) for pair in compared for side in pair} == {32}, "digests: lengths say nothing"


def test_two_keys_share_no_content_addresses():
    backend = FakeBackend()
    client = serve(backend, keys=ApiKeys(KEYS))
    bodies = [LOOK, {**LOOK, "cache_salt": "s"}]
    for headers in (SHOWN, SHOWN, OTHER):
        for body in bodies:
            assert client.post(PATH, json=body, headers=headers).status_code == 200
    salts = [handle.sampling.cache_salt for handle in backend.handles]
    assert all(salts)
    assert salts[:2] == salts[2:4]
    assert len({*salts}) == 4
    for handle in backend.handles:
        [item] = handle.prompt.items
        assert item.salt == handle.sampling.cache_salt
        assert "sk-" not in item.salt
    open_backend = FakeBackend()
    serve(open_backend).post(PATH, json=LOOK)
    assert open_backend.handles[0].sampling.cache_salt == open_backend.handles[0].prompt.items[0].salt == ""


def test_where_keys_come_from(tmp_path):
    file = tmp_path / "keys"
    file.write_text("in-file\n  another \r\n\n")
    options = HttpOptions(api_key=("typed",), api_key_file=file)
    client = serve(FakeBackend(), keys=ApiKeys.given(options, {API_KEY: "from-env  and-more"}))
    for key in ("typed", "in-file", "another", "from-env", "and-more"):
        assert client.get("/v1/models", headers={"x-api-key": key}).status_code == 200
    assert not ApiKeys.given(HttpOptions(), {})
    assert "typed" not in repr(options)


@pytest.mark.parametrize("key", ["", "a b", "a\n", "schlüssel", "x" * 513])
def test_what_is_no_key(key):
    with pytest.raises(InputError) as caught:
        ApiKeys([key])
    assert not key or key not in str(caught.value)


def test_a_source_without_keys_does_not_open_the_server(tmp_path):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.write_text("\n \n")
    other.write_bytes("é".encode())
    for options, environ in (
        (HttpOptions(api_key_file=empty), {}),
        (HttpOptions(api_key_file=other), {}),
        (HttpOptions(api_key_file=tmp_path / "none"), {}),
        (HttpOptions(api_key_file=tmp_path), {}),
        (HttpOptions(api_key=("",)), {}),
        (HttpOptions(), {API_KEY: ""}),
        (HttpOptions(), {API_KEY: "  "}),
    ):
        with pytest.raises(InputError):
            ApiKeys.given(options, environ)


def test_keys_are_not_logged(caplog):
    caplog.set_level(logging.DEBUG)
    client = serve(FakeBackend(lambda prompt, sampling: [0.0, KeyError("secret")]), keys=ApiKeys(KEYS))
    for headers in (SHOWN, {"Authorization": "Bearer sk-wrong"}):
        client.post(PATH, json=ASK, headers=headers)
    assert "failed" in caplog.text
    assert "sk-" not in caplog.text


# ---- other origins ----

PAGE = "https://app.example"
DOORS = Doors.of("127.0.0.1", (), [PAGE, "http://LOCALHOST:80/"])
FIRST = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Host": "localhost"}
FROM_PAGE = {"Origin": PAGE, "Host": "localhost"}


def page_client(doors: Doors = DOORS, backend: FakeBackend | None = None):
    return serve(backend or FakeBackend(), keys=ApiKeys(KEYS), doors=doors)


def test_a_preflight_needs_no_key():
    asked = {**FIRST, "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os"}
    reply = page_client().options(PATH, headers=asked)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"]
    assert "x-request-id" in reply.headers
    assert "access-control-allow-credentials" not in reply.headers


def test_a_preflight_of_another_page_is_refused():
    reply = page_client().options(PATH, headers={**FIRST, "Origin": "https://evil.example"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in reply.headers
    assert page_client().options(PATH, headers={"Host": "localhost"}).status_code == 401, "no preflight"


def test_a_page_of_an_allowed_origin_reads_answers_and_errors():
    client = page_client()
    good = {**FROM_PAGE, **SHOWN}
    broken = page_client(backend=FakeBackend(lambda prompt, sampling: [0.0, ZeroDivisionError()]))
    for reply, status in (
        (client.post(PATH, json=ASK, headers=good), 200),
        (client.post(PATH, json={**ASK, "stream": True}, headers=good), 200),
        (client.post(PATH, json={}, headers=good), 400),
        (client.post(PATH, json=ASK, headers=FROM_PAGE), 401),
        (client.get("/nothing", headers=good), 404),
        (client.post("/v1/models", headers=good), 405),
        (broken.post(PATH, json=ASK, headers=good), 500),
        (client.get("/v1/models", headers={**good, "Origin": "http://localhost"}), 200),
    ):
        assert reply.status_code == status
        assert reply.headers["access-control-allow-origin"] == reply.request.headers["origin"]
        assert "X-Request-ID" in reply.headers["access-control-expose-headers"]
        assert "Origin" in reply.headers["vary"]


def test_pages_of_others_stay_out():
    client = page_client()
    for origin in ("https://evil.example", "null", "http://app.example", "https://app.example:444"):
        reply = client.post(PATH, json=ASK, headers={**FROM_PAGE, **SHOWN, "Origin": origin})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in reply.headers
    reply = page_client().post(PATH, json=ASK, headers={**FROM_PAGE, **SHOWN, "Host": "evil.example"})
    assert reply.json()["error"]["code"] == "host_not_allowed"


def test_any_page_may():
    client = page_client(Doors.of("127.0.0.1", (), ["*"]))
    reply = client.post(PATH, json=ASK, headers={**FROM_PAGE, **SHOWN, "Origin": "null"})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize(
    "bad", ["", "app.example", "ftp://a", "https://", "https://a/b", "https://a?b", "https://[", "x:*"]
)
def test_what_is_no_origin(bad):
    with pytest.raises(InputError) as caught:
        Doors.of("127.0.0.1", (), [bad])
    assert caught.value.param == "allow-origin"
