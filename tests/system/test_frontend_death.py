"""The frontend is killed under load: everybody hears of it, and who asks again with a key gets the answer that was
under way, not another one."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Server

PATH = "/v1/chat/completions"
NUM_TOKENS = 250
LIMIT_S = 60.0


@dataclass
class Try:
    """One exchange: the status, the body's events or its one object, and whether it was whole."""

    status: int
    said: list[dict[str, Any]] = field(default_factory=list)

    @property
    def error(self) -> dict[str, Any] | None:
        return next((one["error"] for one in self.said if "error" in one), None)


def ask(server: Server, body: dict[str, Any], key: str | None) -> Try:
    """An AssertionError for an answer that is cut."""
    headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)
    try:
        connection.request("POST", PATH, json.dumps(body).encode(), headers)
        response = connection.getresponse()
        text = response.read().decode()
    except (http.client.IncompleteRead, http.client.RemoteDisconnected, ConnectionResetError) as cut:
        raise AssertionError(f"cut: {cut!r}") from cut
    finally:
        connection.close()
    if "event-stream" not in response.headers.get("content-type", ""):
        return Try(response.status, [json.loads(text)])
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ") and "[DONE]" not in line]
    return Try(response.status, [json.loads(line) for line in lines])


def body_of(entry: Asked, *, is_stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": entry.content()}]
    fixed = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True}
    return {"messages": messages, "stream": is_stream, **fixed}


def token_ids(tried: Try) -> list[int]:
    return [t for one in tried.said for choice in one.get("choices", ()) for t in choice.get("token_ids") or []]


def check_deaths(tmp_path, world: int, encode_ranks: int, num_deaths: int) -> None:
    asked = ask_scenes(tmp_path, seed=77, count=6)
    sampling = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    expected = [answer.token_ids for answer in LLM().chat([entry.messages() for entry in asked], sampling)]
    with Server(world, "--encode-ranks", str(encode_ranks)) as server, ThreadPoolExecutor(16) as pool:
        num_same, num_kept, deaths = 0, 0, 0
        for death in range(num_deaths):
            [frontend] = [p["pid"] for p in server.processes() if p["role"] == "frontend"]
            bodies = [body_of(entry, is_stream=i % 2 == 0) for i, entry in enumerate(asked)]
            keyed = [pool.submit(ask, server, body, f"k{death}-{i}") for i, body in enumerate(bodies)]
            plain = [pool.submit(ask, server, body, None) for body in bodies[:3]]
            time.sleep(0.3 + 0.25 * (death % 4))
            os.kill(frontend, signal.SIGKILL)
            deaths += 1
            for future in plain:
                tried = future.result(LIMIT_S)
                assert tried.error is None or tried.error["code"] in ("interrupted", "unavailable"), tried.error
                assert tried.error is not None or token_ids(tried) in expected
            for i, (future, body) in enumerate(zip(keyed, bodies, strict=True)):
                first = future.result(LIMIT_S)
                last, end = first, time.monotonic() + LIMIT_S
                while last.error is not None and time.monotonic() < end:
                    assert last.error["code"] in ("interrupted", "unavailable"), last.error
                    time.sleep(0.2)
                    last = ask(server, body, f"k{death}-{i}")
                assert last.error is None, last.error
                assert token_ids(last) == expected[i]
                if token_ids(first) and first.error is not None:
                    begun = first.said[0]["id"]
                    num_kept += 1
                    num_same += last.said[0]["id"] == begun
                again = ask(server, body, f"k{death}-{i}")
                assert token_ids(again) == expected[i]
                assert again.said[0]["id"] == last.said[0]["id"]
        print(f"{deaths} deaths: {num_kept} streams had begun, {num_same} of them went on")
        assert num_kept
        assert num_same == num_kept
        server.remember_pids()
    assert not server.alive()


def test_who_asks_again_gets_the_answer_that_was_under_way(tmp_path):
    check_deaths(tmp_path, 2, 1, 2)


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_fifty_deaths(tmp_path):
    check_deaths(tmp_path, 4, 2, 50)
