"""The pages: a file each, no other origin, open where the rest is not. What a browser makes of them is an acceptance
test."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from qwen3vl_disagg.serving.access import ApiKeys
from tests.support.fake_backend import FakeBackend, serve

ASKED = {"/ui": {"/ready", "/v1/models", "/v1/chat/completions"}, "/ui/live": {"/debug/live", "/debug/trace"}}
"""What each page asks for."""


@pytest.fixture(params=ASKED)
def page(request):
    reply = serve(FakeBackend(), keys=ApiKeys(["secret"])).get(request.param)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    return reply


def test_it_runs_what_is_in_it_and_nothing_else(page):
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    for element in ("script", "style"):
        [text] = re.findall(f"<{element}>(.*?)</{element}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"https?://|\son[a-z]+=|\sstyle=|innerHTML|eval\(", page.text)


def test_it_asks_for_nothing_that_is_not_there(page):
    paths = set(re.findall(r'fetch\(["`]([^"`?]+)', page.text))
    assert paths == ASKED[page.request.url.path]
    used = set(re.findall(r'\$\("([a-z]+)"\)', page.text))
    assert used == set(re.findall(r'\bid="([a-z]+)"', page.text))
    assert {*re.findall(r'href="([^"]+)"', page.text)} == {*ASKED} - {page.request.url.path}


def test_what_it_asks_for_needs_the_key():
    client = serve(FakeBackend(), keys=ApiKeys(["secret"]))
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
