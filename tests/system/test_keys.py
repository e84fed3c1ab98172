"""Two keys at one server: what one has sent is in no cache for the other, by what ranks count."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.http import post_json, request
from tests.support.images import png, uri
from tests.support.server import Server

TEXT = "the red circle is above the blue square " * 8
BODY = {
    "messages": [
        {"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": uri(png())}}, "what is it?"]}
    ],
    "max_tokens": 1,
}


@pytest.mark.slow  # starts a server
def test_two_keys_share_no_cache(tmp_path):
    file = tmp_path / "keys"
    file.write_text("sk-one\nsk-two\n")
    with Server(1, "--api-key-file", str(file)) as server:

        def ask(key: str, **fields: Any) -> tuple[int, bool, int]:
            """Tokens found in pages, whether the tower's rows were there, and the number of its run."""
            headers = {"Authorization": f"Bearer {key}"}
            reply = post_json(f"{server.url}/v1/chat/completions", BODY | fields, headers=headers)
            assert reply.status == 200, reply.data
            timings = reply.json["timings"]
            [item] = timings["items"]
            return timings["cached_tokens"], item["cached"], item["batch"]

        assert ask("sk-one") == (0, False, 1)
        cached, *_ = ask("sk-one")
        assert cached > len(TEXT.split())
        assert ask("sk-two") == (0, False, 2)
        assert ask("sk-two")[0] == cached
        assert ask("sk-one", cache_salt="mine") == (0, False, 3)
        assert ask("sk-two", cache_salt="mine") == (0, False, 4)
        assert request(f"{server.url}/v1/models").status == 401
        assert request(f"{server.url}/ready").status == 200
        assert "sk-" not in server.output()
