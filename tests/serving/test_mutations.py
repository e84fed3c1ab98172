"""Good bodies of every route, broken at random: an answer or a 4xx with its envelope, and the server goes on.

Routes go to a model that they are for, some to one that they are not for. In this process, over the application alone:
a request takes a millisecond or two. Some also over sockets.
"""

from __future__ import annotations

import asyncio
import copy
import http.client
import json
import random
from typing import Any

import pytest

from qwen3vl_disagg.core.sampling_params import OPTIONS
from qwen3vl_disagg.processing.request_fields import FIELDS
from tests.support import http_attacks as attacks
from tests.support.asgi import Exchange
from tests.support.fake_backend import ASK, PATH
from tests.support.fake_ranks import in_loop
from tests.support.http import post_json
from tests.support.images import png, uri
from tests.support.pooling import EachTask
from tests.support.running import RunningApp

MANY = pytest.mark.acceptance
NUM_OF_BATCH, AT_ONCE = 10_000, 8
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "string", "pattern": "^x+$"}}}
IMAGE = {"type": "image_url", "image_url": {"url": uri(png((32, 32))), "detail": "low"}}
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": uri(png())[22:]}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": "red", "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
    {"role": "user", "content": [{"type": "video_url", "video_url": [uri(png()), uri(png())]}, "and this?"]},
]
SAMPLED = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["a"], "logit_bias": {"5": 1.0}}
BLOCKS = [
    {"role": "user", "content": [BLOCK, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [BLOCK], "is_error": False}]},
]
ANTHROPIC_TOOL = {"name": "f", "description": "d", "input_schema": SCHEMA}
ITEMS = [
    {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE["image_url"]["url"], "detail": "auto"}]},
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "3"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "red", "annotations": []}]},
    {"role": "user", "content": "so?"},
]
SHOWN = {"text": "what?", "image": uri(png()), "video": [uri(png()), uri(png())], "fps": 1.0, "max_frames": 4}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (PATH, {"model": "tiny", "messages": TURNS, "tools": [TOOL], "tool_choice": "auto", "max_tokens": 9, **SAMPLED}),
    (PATH, {"messages": TURNS[:2], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}),
    (PATH, {"messages": TURNS[:2], "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    (PATH, {"messages": TURNS[4:], "mm_processor_kwargs": {"max_pixels": 4096}, "add_generation_prompt": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "max_tokens": 3, "n": 1, **SAMPLED}),
    ("/v1/completions", {"prompt": [[1, 2, 3], [4]], "max_tokens": 0, "echo": True, "logprobs": 1, "stream": False}),
    (
        "/v1/responses",
        {
            "input": ITEMS,
            "instructions": "be brief",
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
            "reasoning": {"effort": None},
            "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
            "max_output_tokens": 20,
            "metadata": {"k": "v"},
            "include": [],
        },
    ),
    ("/v1/responses", {"input": "what?", "stream": True, "store": False, "temperature": 0.1}),
    (
        "/v1/messages",
        {"model": "tiny", "max_tokens": 9, "system": [{"type": "text", "text": "s"}], "messages": BLOCKS}
        | {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}},
    ),
    ("/v1/messages", {"max_tokens": 9, "messages": BLOCKS[:1], "stream": True, "stop_sequences": ["a"], "top_k": 3}),
    ("/v1/messages/count_tokens", {"messages": BLOCKS, "tools": [ANTHROPIC_TOOL], "system": "s"}),
    ("/tokenize", {"prompt": "what?", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": TURNS, "tools": [TOOL], "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/v1/embeddings", {"model": "tiny", "input": ["a", SHOWN], "dimensions": 8, "encoding_format": "base64"}),
    ("/v1/embeddings", {"input": [[1, 2, 3], [4]], "user": "me", "cache_salt": "s"}),
    ("/v1/embeddings", {"messages": TURNS[4:], "instruction": "so", "mm_processor_kwargs": {"max_pixels": 4096}}),
    ("/v1/rerank", {"query": SHOWN, "documents": ["a", SHOWN], "top_n": 1, "return_documents": True}),
    ("/v1/score", {"text_1": "q", "text_2": ["a", "b"], "instruction": "so"}),
    ("/v1/score", {"queries": ["q", SHOWN], "documents": {"content": [IMAGE, {"type": "text", "text": "a"}]}}),
]
NAMES = [name for table in FIELDS.values() for name in table]
NAMES += [*OPTIONS, "role", "type", "content", "url", "text", "n", "input", "prompt"]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e-320),
    *("", "a", "\0", "\ud800", "\U0010ffff", "<|image_pad|>", "<|im_end|>", "</think>", "user", "auto", "0", "1e999"),
    *("data:", "data:image/png;base64,", uri(png()[:40]), uri(b"x" * 99), "http://127.0.0.1/", "file:///etc/passwd"),
    *([], {}, [[]], [None], [[[[[[[[]]]]]]]], {"": {}}, {"type": "text"}, {"$ref": "#"}, {"type": "json_schema"}),
    *(["a"] * 300, list(range(300)), "a" * 3000, {"a": {"a": {"a": {"a": {}}}}}, IMAGE, BLOCK, CALL, TOOL, SCHEMA),
]
PIECES = [
    b"",
    b"\x00",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"NaN",
    b"1e400",
    b"-",
    b"\\u",
    b"\xed\xa0",
]
LINES = [*PIECES, b"\r\n", b" ", b"\n", b"\r", b";", b"\t"]


def mutated(chance: random.Random) -> tuple[str, bytes]:
    """A route, and a body for it with one to four things that are wrong, or may be."""
    path, body = chance.choice(BODIES)
    value = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 2, 4))):
        value = break_value(value, chance)
    data = json.dumps(value, ensure_ascii=chance.random() < 0.7).encode("utf-8", "surrogatepass")
    if chance.random() < 0.2:
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice((0, 1, 1, 2, 50, len(data))))
        data = data[:start] + chance.choice(PIECES) * chance.choice((1, 1, 1, 200)) + data[end:]
    return (chance.choice(BODIES)[0] if chance.random() < 0.05 else path), data


def break_value(root: Any, chance: random.Random) -> Any:
    """Something below it is another value, gone, twice there, or beside something new."""
    places = [*containers(root)]
    if not places:
        return copy.deepcopy(chance.choice(VALUES))
    place = chance.choice(places)
    keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
    new = copy.deepcopy(chance.choice(VALUES))
    kind = chance.random() if keys else 1.0
    if kind < 0.45:
        place[chance.choice(keys)] = new
    elif kind < 0.6:
        del place[chance.choice(keys)]
    elif kind < 0.7:
        other = chance.choice(places)  # of another place, as it is
        place[chance.choice(keys)] = copy.deepcopy(other)
    elif isinstance(place, list):
        place.insert(chance.randrange(len(place) + 1), copy.deepcopy(chance.choice(place)) if kind < 0.85 else new)
    else:
        place[chance.choice(NAMES)] = new
    return root


def containers(value: Any) -> list[Any]:
    found, left = [], [value]
    while left:
        one = left.pop()
        if isinstance(one, dict | list):
            found.append(one)
            left += one.values() if isinstance(one, dict) else one
    return found


def check(path: str, status: int | None, data: bytes, body: bytes) -> None:
    assert status == 200 or (status is not None and 400 <= status < 500), (path, status, data[:300], body)
    if status != 200:
        told = json.loads(data)
        error = told["error"]
        if path.startswith("/v1/messages"):
            assert (told["type"], {"type", "message"} <= set(error)) == ("error", True), told
        else:
            assert set(error) == {"message", "type", "param", "code"}, told
        assert "Traceback" not in error["message"]
        assert " at 0x" not in error["message"]


@pytest.fixture(scope="module")
def each_task(tmp_path_factory):
    return EachTask(tmp_path_factory.mktemp("models"))


async def run_batch(each_task: EachTask, seed: int, count: int) -> tuple[dict[int, int], dict[str, int]]:
    """How often each status came, and how often a route answered."""
    chance, seen, answered = random.Random(seed), dict[int, int](), dict[str, int]()
    apps = [*each_task.apps.values()]

    async def client() -> None:
        nonlocal count
        while count > 0:
            count -= 1
            path, body = mutated(chance)
            exchange = Exchange(chance.choice(apps) if chance.random() < 0.05 else each_task, path, [body])
            await asyncio.wait_for(exchange.run(), 60)
            check(path, exchange.status, exchange.body, body)
            assert exchange.status is not None
            seen[exchange.status] = seen.get(exchange.status, 0) + 1
            answered[path] = answered.get(path, 0) + (exchange.status == 200)

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    for path, good in BODIES:
        exchange = Exchange(each_task, path, [json.dumps(good).encode()])
        await exchange.run()
        assert exchange.status == 200, (path, exchange.body)
    return seen, answered


@in_loop
async def test_broken_bodies(each_task) -> None:
    seen, answered = await run_batch(each_task, seed=0, count=600)
    assert seen[200] > 50
    assert seen[400] > 200
    assert set(answered) == {path for path, _ in BODIES}
    assert all(answered.values())


@MANY
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_hundred_thousand_broken_bodies(each_task, seed: int) -> None:
    seen, answered = asyncio.run(run_batch(each_task, seed, NUM_OF_BATCH))
    print(f"\nseed {seed}: {dict(sorted(seen.items()))}, answered {answered}")
    assert sum(seen.values()) == NUM_OF_BATCH


@MANY
@pytest.mark.timeout(900)
def test_broken_bodies_and_broken_http_over_sockets(each_task) -> None:
    chance, seen = random.Random(99), dict[int, int]()
    with RunningApp(each_task) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        for _ in range(4000):
            path, body = mutated(chance)
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            check(path, answer.status, answer.read(), body)
            seen[answer.status] = seen.get(answer.status, 0) + 1
        connection.close()
        good = json.dumps(ASK).encode()
        whole = f"{attacks.HEAD}Connection: close\r\nContent-Length: {len(good)}\r\n\r\n".encode() + good
        for _ in range(1000):
            data = bytearray(whole)
            for _ in range(chance.choice((1, 2, 4))):
                start = chance.randrange(len(data))
                data[start : start + chance.choice((0, 1, 3))] = chance.choice(
                    [*PIECES, b"\r\n", b" ", b"\n", b"\r", b";"]
                )
            with running.connect() as sock:
                sock.sendall(data)
                sock.shutdown(1)
                line = sock.makefile("rb").readline()
            assert not line or line.split()[1][:1] in (b"2", b"4"), (line, data)
        assert post_json(running.url + PATH, ASK).status == 200
    print(f"\nover sockets: {dict(sorted(seen.items()))}")
