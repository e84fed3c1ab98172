"""Prompts that are made for nobody any more: the thread is free at once, and no body stays in memory uncounted."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable

import pytest

from qwen3vl_disagg.core.errors import OverloadedError, PreparationFailed
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.processing import media_plan
from qwen3vl_disagg.serving import intake, preparation, prepared
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.known_grammars import CheckLine
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.preparation import LONG_CHECK_S, MAX_LONG_CHECKS, SHORT_CHECK_S
from qwen3vl_disagg.serving.prepared import Prepared
from tests.support.asgi import Exchange
from tests.support.fake_backend import PATH, FakeBackend, tiny_processor
from tests.support.images import png, uri

FEW = Limits(prepare_threads=1, clip_threads=1, grammar_threads=1)


async def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


def images(count: int) -> list[str]:
    """So many, each of bytes of its own."""
    return [uri(png() + number.to_bytes(2)) for number in range(count)]


def body_of(content: object, **fields: object) -> list[bytes]:
    return [json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()]


def with_frames(count: int) -> list[bytes]:
    return body_of([{"type": "video", "video": images(count)}])


def with_images(count: int) -> list[bytes]:
    return body_of([{"type": "image_url", "image_url": {"url": url}} for url in images(count)])


@pytest.fixture
def slow(monkeypatch) -> list[bytes]:
    """Looking at an image takes 0.1 s; what was looked at."""
    seen: list[bytes] = []
    probe = media_plan.probe_image

    def slow_probe(data: bytes):
        seen.append(data)
        time.sleep(0.1)
        return probe(data)

    monkeypatch.setattr(media_plan, "probe_image", slow_probe)
    return seen


@pytest.mark.parametrize("how", ["leaves", "out of time"])
@pytest.mark.parametrize("make", [with_frames, with_images])
def test_the_thread_of_a_request_that_ended_is_free_at_once(slow, how, make):
    async def main() -> None:
        app = create_app(FakeBackend(), tiny_processor(), model_name="tiny", limits=FEW)
        timeout_ms = "500" if how == "out of time" else "60000"
        exchange = Exchange(app, PATH, make(16), {"x-request-timeout-ms": timeout_ms})
        task = asyncio.create_task(exchange.run())
        await until(lambda: len(slow) > 0)
        if how == "leaves":
            exchange.leave()
        await asyncio.wait_for(task, 1)
        assert exchange.status == (504 if how == "out of time" else None)
        ended, num_seen = time.monotonic(), len(slow)
        after = Exchange(app, PATH, make(2))
        await asyncio.wait_for(after.run(), 5)
        assert after.status == 200
        assert len(slow) <= num_seen + 1 + 2, "what has begun is looked at to its end, and no more"
        assert time.monotonic() - ended < 1.0

    asyncio.run(main())


def test_requests_with_clips_keep_nobody_else_waiting(monkeypatch):
    entered, go = threading.Event(), threading.Event()
    prepare = tiny_processor().prepare

    def held_up(messages, **options):
        if any(part["type"] == "video" for part in messages[0]["content"] if isinstance(part, dict)):
            entered.set()
            go.wait(10)
        return prepare(messages, **options)

    monkeypatch.setattr(tiny_processor(), "prepare", held_up)

    async def main() -> None:
        app = create_app(FakeBackend(), tiny_processor(), model_name="tiny", limits=FEW)
        clips = [Exchange(app, PATH, with_frames(2)) for _ in range(3)]
        tasks = [asyncio.create_task(clip.run()) for clip in clips]
        try:
            await asyncio.to_thread(entered.wait, 5)
            for body in (body_of("what is it?"), with_images(2)):
                other = Exchange(app, PATH, body)
                await asyncio.wait_for(other.run(), 5)
                assert other.status == 200
        finally:
            go.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert [clip.status for clip in clips] == [200] * 3

    asyncio.run(main())


@pytest.mark.parametrize("part", [{"type": "text", "text": "?"}, {"type": "video", "video": images(2)}])
def test_bodies_are_counted_for_as_long_as_they_are_held(part, monkeypatch):
    entered, go = threading.Event(), threading.Event()
    bodies: list[bytearray] = []
    parsed: list[dict] = []
    read_body, parse_json, make = intake.read_body, prepared.parse_json, tiny_processor().prepare

    async def noted(*args):
        bodies.append(await read_body(*args))
        return bodies[-1]

    def noted_json(body):
        parsed.append(parse_json(body))
        return parsed[-1]

    def held_up(*args, **options):
        entered.set()
        go.wait(10)
        return make(*args, **options)

    monkeypatch.setattr(intake, "read_body", noted)
    monkeypatch.setattr(prepared, "parse_json", noted_json)
    monkeypatch.setattr(tiny_processor(), "prepare", held_up)
    body = body_of([part], pad="data:" + "x" * 10**6)

    async def main() -> None:
        app = create_app(FakeBackend(), tiny_processor(), model_name="tiny", limits=FEW)
        [budget] = [route.endpoint._intake._budget for route in app.routes if route.path == PATH]
        first = Exchange(app, PATH, body, {"x-request-timeout-ms": "400"})
        others = [Exchange(app, PATH, body, {"x-request-timeout-ms": "50"}) for _ in range(5)]
        tasks = [asyncio.create_task(first.run())]
        try:
            await asyncio.to_thread(entered.wait, 5)
            tasks += [asyncio.create_task(other.run()) for other in others]
            await asyncio.wait_for(asyncio.gather(*tasks), 5)
            assert [one.status for one in (first, *others)] == [504] * 6
            assert budget.used == len(body[0]), "one thread has what was in one body, and nobody has the others"
            assert [len(held) for held in bodies[1:]] == [0] * 5
            assert not any(parsed[1:]), "no thread will come by for these"
        finally:
            go.set()
        await until(lambda: budget.used == 0)
        assert not any(bodies)
        after = Exchange(app, PATH, body)
        await asyncio.wait_for(after.run(), 5)
        assert after.status == 200
        assert budget.used == 0

    asyncio.run(main())


class Checks:
    """Children of which a grammar that is `hard` takes all the time it may; its second check ends with `go`, and so
    does the first of one that is `slow`."""

    def __init__(self) -> None:
        self.go, self.num_short, self.num_long = threading.Event(), 0, 0

    def warm_up(self) -> None:
        pass

    def prepare(self, *_: object) -> Prepared:
        raise PreparationFailed

    def check_grammar(self, grammar: Grammar, *, cpu_s: float, in_reasoning: bool, stop: StopSignal) -> bool:
        self.num_short += cpu_s == SHORT_CHECK_S
        if grammar.text.startswith("slow"):
            self.go.wait(10)
        if not grammar.text.startswith("hard"):
            return True
        if cpu_s == LONG_CHECK_S:
            self.num_long += 1
            self.go.wait(10)
        return grammar.text.startswith("hard, good") and cpu_s == LONG_CHECK_S


def test_a_grammar_that_takes_long_is_waited_for_only_by_its_like(monkeypatch):
    """It has a second turn, for which few may wait; one that was too much there too is a 400."""
    checks = Checks()
    monkeypatch.setattr(intake, "PreparePool", lambda *_, **__: checks)

    async def main() -> None:
        app = create_app(FakeBackend(), tiny_processor(), model_name="tiny", limits=FEW)

        def ask(regex: str) -> tuple[Exchange, asyncio.Task[None]]:
            exchange = Exchange(app, PATH, body_of("what is it?", regex=regex))
            return exchange, asyncio.create_task(exchange.run())

        hard = [ask(f"hard, {'good' if number == 1 else 'bad'} {number}") for number in range(MAX_LONG_CHECKS + 2)]
        try:
            await until(lambda: sum(task.done() for _, task in hard) == 2)
            refused = [exchange for exchange, task in hard if task.done()]
            assert [exchange.status for exchange in refused] == [429, 429]
            assert all("retry-after" in exchange.headers for exchange in refused)
            for number in range(4):
                easy, task = ask(f"easy {number}")
                await asyncio.wait_for(task, 5)
                assert easy.status == 200
            assert checks.num_long == 1, "one at a time"
        finally:
            checks.go.set()
        await asyncio.wait_for(asyncio.gather(*(task for _, task in hard)), 10)
        assert sorted(exchange.status or 0 for exchange, _ in hard) == [200, 400, 400, 429, 429]
        for number in range(MAX_LONG_CHECKS + 1):
            again, task = ask(f"hard, bad {number}")
            await asyncio.wait_for(task, 5)
            assert (again.status, again.json["error"]["code"]) == (400, "grammar_too_complex"), "there is room again"

    asyncio.run(main())


def test_those_who_wait_for_a_check_are_bounded():
    """Equal ones count once, until the last of them has left."""
    line = CheckLine(0.1, num_threads=1, max_waiting=2)
    for digest in (b"a", b"b", b"b"):
        line.enter(digest)
    line.leave(b"b")
    with pytest.raises(OverloadedError):
        line.enter(b"c")
    line.leave(b"b")
    line.enter(b"c")


@pytest.mark.parametrize(("kind", "status"), [("good", 200), ("bad", 400)])
def test_equal_ones_at_once_have_one_check_and_one_verdict(monkeypatch, kind, status):
    checks = Checks()
    monkeypatch.setattr(intake, "PreparePool", lambda *_, **__: checks)

    async def main() -> None:
        app = create_app(FakeBackend(), tiny_processor(), model_name="tiny", limits=FEW)
        equal = [Exchange(app, PATH, body_of("what is it?", regex=f"hard, {kind}")) for _ in range(8)]
        tasks = [asyncio.create_task(exchange.run()) for exchange in equal]
        try:
            await until(lambda: checks.num_long > 0)
            await asyncio.sleep(0.1)
        finally:
            checks.go.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert [exchange.status for exchange in equal] == [status] * 8
        assert (checks.num_short, checks.num_long) == (1, 1)

    asyncio.run(main())


def test_those_who_wait_for_a_first_check_are_bounded_over_http(monkeypatch):
    checks = Checks()
    monkeypatch.setattr(intake, "PreparePool", lambda *_, **__: checks)
    monkeypatch.setattr(preparation, "MAX_SHORT_CHECKS", 2)

    async def main() -> None:
        app = create_app(FakeBackend(), tiny_processor(), model_name="tiny", limits=FEW)
        new = [Exchange(app, PATH, body_of("what is it?", regex=f"slow {number}")) for number in range(3)]
        tasks = [asyncio.create_task(exchange.run()) for exchange in new]
        try:
            await until(lambda: any(task.done() for task in tasks))
        finally:
            checks.go.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert sorted(exchange.status or 0 for exchange in new) == [200, 200, 429]

    asyncio.run(main())
