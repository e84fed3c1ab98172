"""Two keys at one server: what one has sent is in no cache for the other, by what ranks count, and by the clock."""

from __future__ import annotations

import io
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

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


NUM_TRIES = 200
NUM_COMMON = 32
"""Tokens with which all prompts may begin."""
WORDS = ["red", "blue", "green", "circle", "square", "star", "left", "right", "above", "below", "the", "is"]


def question(number: int) -> dict[str, Any]:
    """A picture and a text of some hundred words that no other number has from its first word on."""
    chance = random.Random(number)
    picture, buffer = Image.new("RGB", (448, 448), (number % 256, number // 256, 7)), io.BytesIO()
    picture.save(buffer, "PNG")
    text = f"{number} " + " ".join(chance.choices(WORDS, k=300))
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": uri(buffer.getvalue())}}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}


def chance_of_less(these: Sequence[float], those: Sequence[float]) -> float:
    """How often one of these is less than one of those, a half where there is no difference: Mann and Whitney's U as a
    share of all pairs."""
    return statistics.fmean((a < b) + (a == b) / 2 for a in these for b in those)


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_the_clock_does_not_tell_what_another_key_has_sent(tmp_path):
    """Times of questions that the other key has sent, that nobody has, and that the same key has: the first two do not
    differ beyond three standard errors of U, and the third, by the same measure, does."""
    file = tmp_path / "keys"
    file.write_text("sk-one\nsk-two\n")
    kinds = ("sent by the other", "sent by nobody", "sent by itself")
    seen: dict[str, list[float]] = {kind: [] for kind in kinds}
    with Server(2, "--api-key-file", str(file)) as server:

        def ask(key: str, number: int) -> tuple[float, bool]:
            """Seconds until the answer, and whether it speaks of something cached."""
            body, headers = question(number), {"Authorization": f"Bearer {key}"}
            started = time.perf_counter()
            reply = post_json(f"{server.url}/v1/chat/completions", body, headers=headers)
            took = time.perf_counter() - started
            assert reply.status == 200, reply.data
            timings = reply.json["timings"]
            [item] = timings["items"]
            return took, item["cached"] or timings["cached_tokens"] > NUM_COMMON

        for number in range(20):
            ask("sk-two", 5000 + number)
        order, chance = list(kinds), random.Random(1)
        for number in range(NUM_TRIES):
            others, nobodys, own = 3 * number, 3 * number + 1, 3 * number + 2
            ask("sk-one", others)
            ask("sk-two", own)
            chance.shuffle(order)
            for kind in order:
                took, is_cached = ask("sk-two", {kinds[0]: others, kinds[1]: nobodys, kinds[2]: own}[kind])
                seen[kind].append(took)
                assert is_cached == (kind == kinds[2]), (kind, number)
    error = (2 * NUM_TRIES + 1) ** 0.5 / (12**0.5 * NUM_TRIES)
    shares = {kind: chance_of_less(seen[kind], seen[kinds[1]]) for kind in kinds}
    for kind in kinds:
        low, middle, high = (1e3 * value for value in statistics.quantiles(seen[kind], n=4))
        print(
            f"\n{kind:18} median {middle:6.2f} ms ({low:.2f} to {high:.2f}), faster: {shares[kind]:.3f} +- {error:.3f}"
        )
    assert abs(shares[kinds[0]] - 0.5) < 3 * error
    assert shares[kinds[2]] > 0.9
