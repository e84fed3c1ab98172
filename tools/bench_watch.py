"""`recipes/bench.py watch`: what it costs to be watched, over HTTP: spans on disk, a live page, and a Prometheus."""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.launch.trace import direct
from tools.bench_burst import watch
from tools.bench_engine import folder_to_serve
from tools.bench_load import Stream, send
from tools.bench_machine import conclude, machine_facts, machine_line, table
from tools.bench_road import ANSWER_S, SPLIT, TEXT_TOKENS, WARM_TOKENS, Requests, closed, running

WATCHED, ALONE, CONTROL = "watched", "alone", "alone, too"
SCRAPE_S = 5.0
"""Three times as often as Prometheus does by itself."""


class Load(NamedTuple):
    """See `what_watching_costs`."""

    texts: int
    seconds: float
    at_once: int
    requests: int
    tokens: int


@asynccontextmanager
async def watched(port: int) -> AsyncIterator[None]:
    """A live page is open, and a Prometheus asks."""

    def ask() -> None:
        direct.open(f"http://127.0.0.1:{port}/metrics", timeout=10).read()

    async def scrape() -> None:
        while True:
            await asyncio.to_thread(ask)
            await asyncio.sleep(SCRAPE_S)

    tasks = [asyncio.create_task(scrape()), asyncio.create_task(watch(port, []))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ended:
            if not isinstance(end, asyncio.CancelledError):
                raise RuntimeError("whoever watched gave up") from end if isinstance(end, Exception) else None


async def decode(port: int, make: Requests, texts: int, seconds: float) -> float:
    """Tokens/s of texts that run together."""
    streams = [Stream(time.perf_counter()) for _ in range(texts)]
    async with asyncio.timeout(ANSWER_S), asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(port, make(0, TEXT_TOKENS), stream)) for stream in streams]
        while min(len(stream.stamps) for stream in streams) < WARM_TOKENS:
            await asyncio.sleep(0.02)
        opens = time.perf_counter()
        await asyncio.sleep(seconds)
        closes = time.perf_counter()
        if any(task.done() for task in tasks):
            raise RuntimeError("a text ended before its time")
        for task in tasks:
            task.cancel()
    return sum(opens <= stamp <= closes for stream in streams for stamp in stream.stamps) / (closes - opens)


async def measure(port: int, make: Requests, *, is_watched: bool, load: Load) -> dict[str, float]:
    async def both() -> dict[str, float]:
        tokens_s = await decode(port, make, load.texts, load.seconds)
        part = await closed(port, make, load.at_once, load.requests, 1, load.tokens)
        return {"tokens/s": tokens_s, "requests/s": part["requests_s"]}

    if not is_watched:
        return await both()
    async with watched(port):
        return await both()


def what_watching_costs(
    rounds: int = 7,
    texts: int = 8,
    seconds: float = 8.0,
    at_once: int = 4,
    requests: int = 16,
    tokens: int = 16,
    preset: str = "mid",
    model: Path | None = None,
    image_side: int = 448,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """The rates of three equal servers, measured by turns: one is watched, two are not and say what chance does.

    Args:
        rounds: In each all servers, another one first each time.
        texts: That run together, for tokens/s.
        seconds: For which they do.
        at_once: Clients that send their next request when the last is answered, for requests/s.
        requests: With one image each.
        tokens: New tokens of these.
        preset: Random weights of tools/make_checkpoint.py.
        model: A checkpoint folder instead.
        image_side: Height and width of an image in pixels.
        as_json: Print the JSON line only.
    """
    if min(rounds, texts, at_once, requests, tokens) < 1 or seconds <= 0:
        raise InputError("need at least one round, text, client, request and token, and some seconds")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the servers that run
    machine, load = machine_facts(), Load(texts, seconds, at_once, requests, tokens)
    found: dict[str, list[dict[str, float]]] = {ALONE: [], CONTROL: [], WATCHED: []}
    with ExitStack() as stack:
        folder = model or folder_to_serve(stack, preset)
        spans = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-watch-"))
        options = {ALONE: (), CONTROL: (), WATCHED: ("--spans", spans, "--log-format", "json")}
        servers = {name: stack.enter_context(running(SPLIT, {}, folder, more)) for name, more in options.items()}
        makes = {name: Requests(called, image_side, i) for i, (name, (_, called)) in enumerate(servers.items())}
        names = list(servers)
        for number in range(-1, rounds):  # the first one warms them
            for name in names[number % len(names) :] + names[: number % len(names)]:
                measured = asyncio.run(measure(servers[name][0], makes[name], is_watched=name == WATCHED, load=load))
                if number >= 0:
                    found[name].append(measured)
                    said = ", ".join(f"{value:.4g} {key}" for key, value in measured.items())
                    print(f"round {number + 1} of {rounds}: {name}: {said}", file=sys.stderr, flush=True)
    result = {
        "bench": "watch",
        "machine": machine,
        "model": preset if model is None else model.name,
        "rounds": rounds,
        "servers": found,
        "ratios": {name: {key: ratio(found, key, name) for key in found[ALONE][0]} for name in (CONTROL, WATCHED)},
    }
    conclude(result, report(result), as_json)


def ratio(found: dict[str, list[dict[str, float]]], key: str, name: str = WATCHED) -> dict[str, float]:
    """This server by the one that is alone, of each round: neighbours in time. Median, least and most."""
    ratios = [w[key] / a[key] for w, a in zip(found[name], found[ALONE], strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def report(result: dict[str, Any]) -> str:
    """Markdown for people."""
    keys = list(result["ratios"][WATCHED])
    rows = [
        [name, *(f"{statistics.median(one[key] for one in values):.2f}" for key in keys)]
        for name, values in result["servers"].items()
    ]
    for name, of_name in result["ratios"].items():
        said = (f"{r['median']:.3f} ({r['least']:.3f} .. {r['most']:.3f})" for r in of_name.values())
        rows.append([f"{name} / {ALONE}, median of rounds", *said])
    head = f"{machine_line(result['machine'])}; {result['model']}, {result['rounds']} rounds"
    return f"{head}\n\n{table(['', *keys], rows)}"
