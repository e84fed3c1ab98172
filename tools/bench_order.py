"""`recipes/bench.py order`: first tokens of short texts beside requests with many images, by two orders of serving."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen3vl_disagg.core.errors import InputError
from tools.bench_engine import folder_to_serve
from tools.bench_load import Stream, arrivals, send
from tools.bench_machine import conclude, machine_facts, machine_line, table
from tools.bench_road import ANSWER_S, Requests, running
from tools.bench_stats import percentile

ORDERS = {"first come": ("--first-token-target-ms=off",), "as due": ()}
SMALL, LARGE = "small", "large"
WARM = 6


def kinds(count: int, share: float, seed: int) -> list[str]:
    """Of that many requests the share is large, to the nearest whole number and at least one, anywhere among them."""
    num_large = min(count, max(1, round(count * share)))
    mixed = [LARGE] * num_large + [SMALL] * (count - num_large)
    random.Random(seed).shuffle(mixed)
    return mixed


async def capacity(port: int, bodies: Sequence[bytes], at_once: int) -> float:
    """Requests/s of clients that send their next request when the last is answered."""
    waiting = list(bodies)

    async def client() -> None:
        while waiting:
            await send(port, waiting.pop(), Stream(time.perf_counter()))

    started = time.perf_counter()
    async with asyncio.timeout(ANSWER_S), asyncio.TaskGroup() as clients:
        for _ in range(at_once):
            clients.create_task(client())
    return len(bodies) / (time.perf_counter() - started)


async def first_tokens(port: int, times: Sequence[float], bodies: Sequence[bytes]) -> list[float]:
    """Milliseconds to each one's first token; they come at their times, whether or not those before are answered."""
    streams: list[Stream] = []
    async with asyncio.timeout(ANSWER_S), asyncio.TaskGroup() as arriving:
        opens = time.perf_counter()
        for at, request in zip(times, bodies, strict=True):
            await asyncio.sleep(max(0.0, opens + at - time.perf_counter()))
            streams.append(Stream(time.perf_counter()))
            arriving.create_task(send(port, request, streams[-1]))
    return [stream.first_token_s * 1e3 for stream in streams]


def order(
    rounds: int = 3,
    server: Literal["split", "one"] = "split",
    load: float = 0.8,
    share: float = 0.1,
    images: int = 8,
    tokens: int = 16,
    seconds: float = 90.0,
    at_once: int = 16,
    requests: int = 60,
    rate: float | None = None,
    preset: str = "mid",
    model: Path | None = None,
    image_side: int = 448,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Open loop of many short texts and a few requests with many images, first come first served and as they are due.

    Args:
        rounds: In each, a server of either order is started, measured and ended, in one order and back in the next.
        server: `split` (an encode and a language rank) or `one` (a process with both roles).
        load: Part of the capacity at which requests arrive.
        share: Part of the requests that have images.
        images: Of each of these.
        tokens: New tokens of a request.
        seconds: For which requests arrive, the same ones for both orders.
        at_once: Clients of the closed loop that measures the capacity, once, with the server that serves as they come.
        requests: Of that loop.
        rate: Requests/s that arrive, in place of `load` times the capacity.
        preset: Random weights of tools/make_checkpoint.py.
        model: A checkpoint folder instead.
        image_side: Height and width of an image in pixels.
        as_json: Print the JSON line only.
    """
    if min(rounds, images, tokens, at_once, requests) < 1 or min(load, seconds) <= 0 or not 0 < share < 1:
        raise InputError("need at least one round, image, token, client and request, a load, and a share below 1")
    if rate is not None and (rate <= 0 or not all(arrivals(rate, seconds, number) for number in range(rounds))):
        raise InputError(f"no request arrives within {seconds:g} s at {rate:g} requests/s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the server that runs
    machine, found = machine_facts(), {name: {SMALL: list[float](), LARGE: list[float]()} for name in ORDERS}
    with ExitStack() as stack:
        folder = model or folder_to_serve(stack, preset)
        for number in range(rounds):
            for name in list(ORDERS) if number % 2 == 0 else list(ORDERS)[::-1]:
                with running(server, {}, folder, ORDERS[name]) as (port, called):
                    make = Requests(called, image_side, 2 * number + (name == "as due"))

                    def bodies(mixed: Sequence[str], make: Requests = make) -> list[bytes]:
                        return [make(images if kind == LARGE else 0, tokens) for kind in mixed]

                    asyncio.run(capacity(port, bodies(kinds(WARM, share, number)), 2))
                    if rate is None:
                        most = asyncio.run(capacity(port, bodies(kinds(requests, share, number)), at_once))
                        rate = load * most
                        print(f"{most:.2f} requests/s at most, {rate:.2f} arrive", file=sys.stderr, flush=True)
                    times = arrivals(rate, seconds, number)
                    mixed = kinds(len(times), share, number)
                    for kind, ms in zip(mixed, asyncio.run(first_tokens(port, times, bodies(mixed))), strict=True):
                        found[name][kind].append(ms)
                print(f"round {number + 1} of {rounds}: {name}, {len(times)} requests", file=sys.stderr, flush=True)
    result = {
        "bench": "order",
        "machine": machine,
        "model": preset if model is None else model.name,
        "server": server,
        "rounds": rounds,
        "requests_s": rate,
        "orders": {name: summary(of_kinds) for name, of_kinds in found.items()},
    }
    conclude(result, report(result), as_json)


def summary(of_kinds: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds to first tokens."""
    out: dict[str, float] = {}
    for kind, values in of_kinds.items():
        out[f"{kind} mean"] = statistics.fmean(values)
        out |= {f"{kind} p{percent}": percentile(values, percent) for percent in (50, 99)}
    return out | {"longest": max(max(values) for values in of_kinds.values())}


def report(result: dict[str, Any]) -> str:
    """Markdown for people: the orders, and what the second is of the first."""
    head = f"{machine_line(result['machine'])}; {result['model']}, {result['server']}, {result['rounds']} rounds"
    before, after = result["orders"].values()
    rows = [[name, *(f"{value:.0f}" for value in found.values())] for name, found in result["orders"].items()]
    rows.append(["ratio", *(f"{after[key] / before[key]:.2f}" for key in before)])
    lines = table(["first token, ms", *before], rows)
    return f"{head}, {result['requests_s']:.2f} requests/s\n\n{lines}"
