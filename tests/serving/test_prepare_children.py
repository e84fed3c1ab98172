"""Large requests are made into prompts in children: the same prompts, and nothing of this process waits for them."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.core.errors import MediaTimeout
from qwen3vl_disagg.media.child import ChildProcess
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.media.video import VideoInfo
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.serving import preparation
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.prepare_child import NICENESS, ChildSetup, answer
from qwen3vl_disagg.serving.prepared import Rules
from tests.support.asgi import Exchange
from tests.support.fake_backend import PATH, FakeBackend
from tests.support.images import png, uri

CONTEXT = 2**19


class Clips(MediaDecoder):
    """Clips whose bytes say what they are: frames, rate, width, height."""

    def probe_video(self, data: bytes, *, stop: StopSignal | None = None) -> VideoInfo:
        if data == b"slow":
            raise MediaTimeout("decoding the clip takes too long")
        num_frames, fps, width, height = data.split()
        return VideoInfo("mp4", int(width), int(height), int(num_frames), float(fps))


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    """The small checkpoint's, with a context that much text fits into."""
    folder = tmp_path_factory.mktemp("long")
    for path in resolve_model_folder(None).iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(raw))
    return Processor.from_folder(folder, read_config(folder), decoder=Clips())


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def app(processor, backend) -> Starlette:
    return create_app(backend, processor, model_name="long")


def children() -> list[int]:
    """Preparing children of this process."""
    lists = [_read(task / "children") for task in Path("/proc/self/task").iterdir()]
    pids = [int(pid) for pids in lists for pid in pids.split()]
    return [pid for pid in pids if b"serving.prepare_child" in _read(Path(f"/proc/{pid}/cmdline"))]


def _read(path: Path) -> bytes:
    """Nothing, for a thread or a process that has just ended."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def cpu_seconds(pid: int) -> float:
    """0 when it has just ended."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def is_starting(pid: int) -> bool:
    """It makes itself nice first of all."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    return bool(fields) and int(fields[16]) < NICENESS


def body_of(content: object, **fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}, ensure_ascii=False).encode()


async def ask(app: Starlette, body: bytes, **headers: str) -> Exchange:
    exchange = Exchange(app, PATH, [body], headers)
    await asyncio.wait_for(exchange.run(), 60)
    return exchange


@asynccontextmanager
async def lateness() -> AsyncIterator[list[float]]:
    """How late the loop comes back to a task that sleeps, each time."""
    late: list[float] = []

    async def watch() -> None:
        while True:
            started = time.monotonic()
            await asyncio.sleep(0.005)
            late.append(time.monotonic() - started - 0.005)

    task = asyncio.create_task(watch())
    await asyncio.sleep(0.05)
    try:
        yield late
    finally:
        task.cancel()


@pytest.mark.parametrize("word", [b"", b"video"])
def test_the_loop_turns_while_a_large_body_is_looked_through(word):
    """A body in which every fifth byte begins the word that is looked for."""
    size = 8 * 2**20
    body = bytearray((b"vide" * size)[: size - 2] + word)
    turns = 0

    async def look() -> bool:
        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(turn())
        try:
            return await preparation._speaks_of_clips(body)
        finally:
            other.cancel()

    assert asyncio.run(look()) == bool(word), "also where the word lies across two stretches"
    assert turns >= 7


WORDS = "the red circle is above it " * 4000
MIXED = [
    {"type": "text", "text": WORDS},
    {"type": "image", "image": uri(png((128, 64)))},
    {"type": "video_url", "video_url": "data:video/mp4;base64," + base64.b64encode(b"99 24 64 64").decode(), "fps": 4},
]


@pytest.mark.parametrize("content", [WORDS, MIXED], ids=["text", "media"])
def test_a_child_makes_the_same_prompt(app, backend, processor, content):
    fields = {"temperature": 0.5, "stop": ["a"], "logit_bias": {"5": 1}, "cache_salt": "s", "tools": []}
    exchange = asyncio.run(ask(app, body_of(content, **fields)))
    assert exchange.status == 200, exchange.body
    assert children(), "it was made here"
    handle = backend.handles[-1]
    alone = copy.copy(processor)
    alone.folder = None
    here = FakeBackend()
    asyncio.run(ask(create_app(here, alone, model_name="long"), body_of(content, **fields)))
    assert (handle.prompt, handle.sampling) == (here.handles[0].prompt, here.handles[0].sampling)
    assert handle.prompt.token_ids


def test_of_equal_media_a_child_sends_one(app, backend, monkeypatch):
    """A URL's bytes may stand in every part."""
    one, other = png((128, 64)), png((64, 128))
    sizes = list[int]()
    receive = ChildProcess.receive_bytes

    def noted(self: ChildProcess, size: int) -> bytes:
        sizes.append(size)
        return receive(self, size)

    monkeypatch.setattr(ChildProcess, "receive_bytes", noted)
    pictures = [one, other, one, one, other]
    content = [WORDS, *({"type": "image", "image": uri(data)} for data in pictures)]
    exchange = asyncio.run(ask(app, body_of(content)))
    assert exchange.status == 200, exchange.body
    assert backend.handles[-1].prompt.media == pictures
    assert sizes[-2:] == [len(one), len(other)]
    assert len(sizes) == 4  # behind a header and the ids


WORST = {
    "more letters than fit": (body_of("a" * 13_000_000), "context_length_exceeded", None),
    "one word": (body_of("a" * 2**19), "context_length_exceeded", None),
    "blanks": (body_of(" " * 2**19), "context_length_exceeded", None),
    "marks": (body_of("\u0301\u0316" * 2**18), "context_length_exceeded", None),
    "words": (body_of("q z " * 2**20), "context_length_exceeded", None),
    "an answer": (
        json.dumps({"messages": [{"role": "assistant", "content": "a" * 13_000_000}]}).encode(),
        "context_length_exceeded",
        None,
    ),
    "tools": (
        body_of("?", tools=[{"type": "function", "function": {"name": "f", "description": "a" * 2**24}}]),
        "context_length_exceeded",
        None,
    ),
    "numbers": (body_of("?")[:-1] + b', "x": [' + b",".join([b"9" * 4000] * 2000) + b"]}", "invalid_request", "x[0]"),
    "numbers with a point": (
        body_of("?")[:-1] + b', "x": [' + b",".join([b"0." + b"9" * 4000] * 2000) + b"]}",
        "invalid_request",
        "x[0]",
    ),
    "base64": (
        body_of([{"type": "image_url", "image_url": {"url": "data:;base64," + "QUJD" * (10 * 2**20)}}]),
        "invalid_request",
        "messages[0].content[0]",
    ),
    "base64 in many parts": (
        body_of([{"type": "image_url", "image_url": {"url": "data:;base64," + "QUJD" * 2**12}}] * 1000),
        "invalid_request",
        "messages[0].content[0]",
    ),
    "deep": (b"[" * 2**22, "invalid_json", None),
    "wide": (body_of("?")[:-1] + b', "x": [' + b"[]," * 80_000 + b"0]}", None, None),
}


@pytest.mark.parametrize("name", WORST)
def test_the_loop_goes_on_while_the_worst_is_looked_at(app, name):
    body, code, param = WORST[name]

    async def main() -> None:
        async with lateness() as late:
            exchange = await ask(app, body)
        if code is None:
            assert exchange.status == 200
        else:
            assert exchange.status in (400, 413), exchange.body[:300]
            error = exchange.json["error"]
            assert (error["code"], error["param"]) == (code, param or error["param"])
        assert max(late) < 0.5, f"{max(late):.3f} s"

    asyncio.run(main())


LONG = body_of("a" * 6 * 2**20)
"""Takes seconds."""


async def settled(app: Starlette) -> None:
    """Until a child is there, and none is being started, or still loading."""
    assert (await ask(app, body_of(WORDS))).status == 200
    used = dict[int, float]()
    async with asyncio.timeout(30):
        while any(map(is_starting, children())) or used != {pid: cpu_seconds(pid) for pid in children()}:
            used = {pid: cpu_seconds(pid) for pid in children()}
            await asyncio.sleep(0.3)


async def start(app: Starlette, body: bytes, **headers: str) -> tuple[Exchange, asyncio.Task[None], int]:
    """A request whose child is at work, and that child."""
    await settled(app)
    before = {pid: cpu_seconds(pid) for pid in children()}
    exchange = Exchange(app, PATH, [body], headers)
    task = asyncio.create_task(exchange.run())
    async with asyncio.timeout(30):
        while True:
            await asyncio.sleep(0.02)
            busy = [pid for pid in before if pid in children() and cpu_seconds(pid) > before[pid] + 0.3]
            if busy:
                return exchange, task, busy[0]


def test_a_child_ends_with_its_request(app):
    async def main() -> None:
        exchange, task, pid = await start(app, LONG)
        exchange.leave()
        await asyncio.wait_for(task, 2)
        async with asyncio.timeout(2):
            while pid in children():
                await asyncio.sleep(0.02)
        after = await ask(app, body_of(WORDS))
        assert after.status == 200

    asyncio.run(main())


def test_a_child_that_is_killed_is_our_fault(app):
    async def main() -> None:
        exchange, task, pid = await start(app, LONG)
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(task, 10)
        assert (exchange.status, exchange.json["error"]["code"]) == (500, "preparation_failed")
        assert (await ask(app, body_of(WORDS))).status == 200

    asyncio.run(main())


def test_a_child_that_says_nothing_more_ends_with_its_request_s_time(app):
    async def main() -> None:
        exchange, task, pid = await start(app, LONG, **{"x-request-timeout-ms": "5000"})
        os.kill(pid, signal.SIGSTOP)
        await asyncio.wait_for(task, 10)
        assert (exchange.status, exchange.json["error"]["code"]) == (504, "deadline_exceeded")
        async with asyncio.timeout(2):
            while pid in children():
                await asyncio.sleep(0.02)
        assert (await ask(app, body_of(WORDS))).status == 200

    asyncio.run(main())


@pytest.mark.slow
def test_one_that_died_between_requests_is_no_fault(app):
    async def main() -> None:
        await settled(app)
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        while children():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # its memory goes before its pipes
        assert (await ask(app, body_of(WORDS))).status == 200

    asyncio.run(main())


def test_one_that_dies_with_a_request_that_it_has_not_begun_is_no_fault(app):
    """The whole body is in its pipe."""

    async def main() -> None:
        await settled(app)
        stopped = children()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        task = asyncio.create_task(ask(app, body_of(WORDS)))
        await asyncio.sleep(0.5)
        assert not task.done()
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
        assert (await task).status == 200

    asyncio.run(main())


@pytest.mark.slow
def test_a_deadline_is_a_504(app):
    async def main() -> None:
        await settled(app)
        started = time.monotonic()
        exchange = await ask(app, LONG, **{"x-request-timeout-ms": "300"})
        assert (exchange.status, exchange.json["error"]["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - started < 2

    asyncio.run(main())


def test_what_the_parents_decoder_says_reaches_the_client(app):
    part = {"type": "video_url", "video_url": "data:;base64," + base64.b64encode(b"slow").decode()}
    exchange = asyncio.run(ask(app, body_of([{"type": "text", "text": WORDS}, part])))
    error = exchange.json["error"]
    assert (exchange.status, error["code"], error["param"]) == (504, "media_timeout", "messages[0].content[1]")


@pytest.mark.parametrize("body", [b'{"messages": 7}', b"{", body_of("?", top_p=7), body_of(WORDS)])
def test_a_child_keeps_no_body(processor, body):
    setup = ChildSetup(
        folder="",
        video_outer_wrapper=False,
        max_model_len=CONTEXT,
        task="generate",
        fetches=False,
        rules=Rules(model_names=["long"]),
    )
    held = bytearray(body)
    assert answer(held, "chat", processor, setup, -1, -1)
    assert not held


def test_small_requests_have_no_child(app, backend, monkeypatch):
    monkeypatch.setattr(preparation.Preparation, "_in_child", lambda *_: 1 / 0)
    image = body_of([{"type": "image", "image": uri(png() + os.urandom(500_000))}])
    for body in (body_of("?"), image):
        assert asyncio.run(ask(app, body)).status == 200
