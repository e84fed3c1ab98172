"""Media by URL through the application: prompts as of their bytes, in this process and in a child."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3vl_disagg.processing.messages import put_fetched, urls_in
from qwen3vl_disagg.serving.app import create_app
from tests.support.asgi import Exchange
from tests.support.fake_backend import PATH, FakeBackend, tiny_processor
from tests.support.fake_ranks import in_loop
from tests.support.images import png, uri
from tests.support.media_origin import Answer, fetcher, head, origin


def turn(*parts: dict[str, Any]) -> bytes:
    content = [*parts, {"type": "text", "text": "what?"}]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()


@pytest.mark.parametrize("blanks", [0, 2**20], ids=["in this process", "in a child"])
@in_loop
async def test_a_picture_by_url_is_the_picture_of_its_bytes(blanks: int) -> None:
    processor = tiny_processor()
    data, backend = png((64, 96)), FakeBackend()
    answers = {"/a.png": head(Content_Length=str(len(data))) + data, "/bad": head(404)}
    async with origin(answers) as site, fetcher() as one:
        app = create_app(backend, processor, model_name="m", fetcher=one)
        places = [site.url("/a.png"), uri(data)]
        for spelling in (lambda url: {"url": url}, lambda url: url):
            for url in places:
                part = {"type": "image_url", "image_url": spelling(url)}
                exchange = Exchange(app, PATH, [turn(part) + b" " * blanks])
                await exchange.run()
                assert exchange.status == 200, exchange.body
        prompts = [handle.prompt for handle in backend.handles]
        assert len({tuple(prompt.token_ids) for prompt in prompts}) == 1
        assert {prompt.media[0] for prompt in prompts} == {data}
        for url, code in [
            (site.url("/bad"), "media_fetch_failed"),
            (site.url("/a.png", "evil.org"), "unsupported_url"),
            ("file:///etc/passwd", "unsupported_url"),
            ("ftp://pictures.example.org/a.png", "unsupported_url"),
        ]:
            exchange = Exchange(app, PATH, [turn({"type": "image_url", "image_url": {"url": url}}) + b" " * blanks])
            await exchange.run()
            assert exchange.status == 400
            assert (exchange.json["error"]["code"], exchange.json["error"]["param"]) == (code, "messages[0].content[0]")


@pytest.mark.parametrize("blanks", [0, 2**20], ids=["in this process", "in a child"])
@in_loop
async def test_many_urls_and_long_ones_and_one_many_times(blanks: int) -> None:
    data = png((64, 64))
    answers: dict[str, bytes | Answer] = {
        f"/{i}?{'x' * 1200}": head(Content_Length=str(len(data))) + data for i in range(130)
    }
    async with origin(answers) as site, fetcher() as one:
        app = create_app(FakeBackend(), tiny_processor(), model_name="m", fetcher=one)

        async def ask(urls: list[str]) -> Exchange:
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            exchange = Exchange(app, PATH, [turn(*parts) + b" " * blanks])
            await exchange.run()
            return exchange

        exchange = await ask([site.url(path) for path in answers])
        assert exchange.status == 200, exchange.body
        assert len(site.requests) == len(answers)
        exchange = await ask([site.url("/0?" + "x" * 1200)] * 1025)  # fetched once, and then they are too many
        assert "more than 1024" in exchange.json["error"]["message"]
        assert len(site.requests) == len(answers) + 1
        exchange = await ask([f"http://a.org/{i}" for i in range(1025)])
        assert (exchange.status, "more than 1024 URLs" in exchange.json["error"]["message"]) == (400, True)
        exchange = await ask(["http://a.org/" + "x" * 5000])
        assert (exchange.status, exchange.json["error"]["code"]) == (400, "unsupported_url")
        assert len(site.requests) == len(answers) + 1


@in_loop
async def test_frames_by_url_and_a_server_that_fetches_nothing() -> None:
    messages = [{"content": [{"type": "video_url", "video_url": ["http://a.org/1", "data:,x", "https://a.org/2"]}]}]
    assert [(one.url, one.what) for one in urls_in(messages)] == [
        ("http://a.org/1", "frame"),
        ("https://a.org/2", "frame"),
    ]
    put_fetched(messages, {"http://a.org/1": b"1", "https://a.org/2": b"2"})
    first, other, second = messages[0]["content"][0]["video_url"]
    assert (first.data, other, second.data) == (b"1", "data:,x", b"2")
    assert not urls_in(messages)
    async with origin({}) as site:
        app = create_app(FakeBackend(), tiny_processor(), model_name="m")
        exchange = Exchange(app, PATH, [turn({"type": "image_url", "image_url": {"url": site.url("/")}})])
        await exchange.run()
        assert (exchange.status, exchange.json["error"]["code"]) == (400, "unsupported_url")
        assert not site.requests
