"""Encode ranks that die over images, or for reasons of their own: real processes, and each request's answer."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.server import Server

pytestmark = pytest.mark.acceptance


def picture(seed: int) -> bytes:
    image = Image.new("RGB", (128, 128), (seed * 53 % 256, seed * 101 % 256, 90))
    image.paste((seed * 30 % 256, 255 - seed, 17), (seed % 60, 20, seed % 60 + 50, 90))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def content(data: bytes) -> list[dict[str, Any]]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]


def expected(count: int) -> list[list[int]]:
    conversations = [[{"role": "user", "content": content(picture(n))}] for n in range(count)]
    return [result.token_ids for result in LLM().chat(conversations, SamplingParams(max_new_tokens=8))]


def encode_pid(server: Server) -> int | None:
    return next((entry["pid"] for entry in server.processes() if entry["role"] == "encode"), None)


def settled_deaths(server: Server, num_encode: int) -> int:
    """Deaths so far, once every encode rank is back: the slot says so after the hub has seen the end."""
    end = time.monotonic() + 60
    while sum(entry["role"] == "encode" for entry in server.processes()) < num_encode and time.monotonic() < end:
        time.sleep(0.05)
    return server.output().count("killed by SIGKILL")


def test_sixty_images_on_one_encode_rank_that_is_killed_five_times_within_four_seconds():
    answers = expected(60)
    with Server(3, "--encode-ranks", "1") as server, ThreadPoolExecutor(60) as pool:
        started = time.monotonic()
        asked = [pool.submit(server.chat, content(picture(n)), max_tokens=8) for n in range(60)]
        killed = set[int]()
        time.sleep(0.2)
        while len(killed) < 5 and time.monotonic() - started < 30:
            pid = encode_pid(server)
            if pid is not None and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                last = time.monotonic() - started
            time.sleep(0.02)
        replies = [task.result() for task in asked]
        print(f"{len(killed)} kills within {last:.1f} s, all answered after {time.monotonic() - started:.1f} s")
    assert len(killed) == 5
    assert [status for status, _ in replies] == [200] * 60
    assert [answer["choices"][0]["token_ids"] for _, answer in replies] == answers


@pytest.mark.parametrize("num_encode", [1, 2])
def test_a_poisoned_image_beside_twenty_good_ones_fails_alone(num_encode):
    answers, poison = expected(20), picture(100)
    digest = hashlib.sha256(poison).hexdigest()
    env = {"Q3VL_FAULT": f"in-tower:@{digest[:16]}:kill"}
    with (
        Server(num_encode + 2, "--encode-ranks", str(num_encode), env=env) as server,
        ThreadPoolExecutor(21) as pool,
    ):
        started = time.monotonic()
        asked = [pool.submit(server.chat, content(picture(n)), max_tokens=8) for n in range(10)]
        bad = pool.submit(server.chat, content(poison), max_tokens=8)
        asked += [pool.submit(server.chat, content(picture(n)), max_tokens=8) for n in range(10, 20)]
        status, answer = bad.result()
        replies = [task.result() for task in asked]
        answered_after = time.monotonic() - started
        deaths = settled_deaths(server, num_encode)
        print(f"{deaths} deaths, all answered after {answered_after:.1f} s")
        assert (status, answer["error"]["code"]) == (400, "harmful_media"), answer
        assert answer["error"]["param"] == "messages[0].content[0]"
        assert [status for status, _ in replies] == [200] * 20
        assert [answer["choices"][0]["token_ids"] for _, answer in replies] == answers
        assert deaths <= 5
        for stream in (False, True):  # again, in other requests: refused before it comes to a rank
            status, answer = server.chat([*content(poison), *content(picture(1))], stream=stream)
            assert (status, answer["error"]["code"]) == (400, "harmful_media")
        assert server.chat(content(picture(30)), max_tokens=2)[0] == 200
        assert settled_deaths(server, num_encode) == deaths
