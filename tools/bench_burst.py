"""`recipes/bench.py burst`: what ranks do while images arrive, and how long running texts wait for their next token."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.launch.trace import direct
from tools.bench_engine import folder_to_serve
from tools.bench_load import Stream, send
from tools.bench_machine import conclude, machine_facts, machine_line, table
from tools.bench_road import ANSWER_S, ONE, OURS, SPLIT, TEXT_TOKENS, WARM_TOKENS, Requests, running
from tools.bench_stats import percentile

LANES = {
    "preprocess": ("encode rank", "decode image"),
    "encode": ("encode rank", "encode"),
    "send": ("encode rank", "send rows"),
    "prefill": ("language rank", "prefill"),
    "decode": ("language rank", "decode"),
}
"""Spans that are drawn: of which kind of rank, and how they are called."""
LOOK_S, TAIL_S = 0.5, 1.0
GREY = "#9a9a9a"


class Load(NamedTuple):
    """`texts` that run all the time, alone for `quiet_s`, then `images` requests with an image, one every `every_s`."""

    texts: int
    images: int
    every_s: float
    quiet_s: float
    tokens: int


class Bar(NamedTuple):
    """What a rank did: a name of `LANES`, seconds since the first image was sent, and for which requests."""

    name: str
    start: float
    stop: float
    requests: list[str]


def bars(told: Sequence[dict[str, Any]], zero: float) -> list[Bar]:
    """Of the answers of `/debug/live`, those that `LANES` name; `zero` on the clock of these."""
    spans = [span for answer in told for _, span in answer["spans"]]
    return [Bar(s[0], s[2] - zero, s[3] - zero, s[4]) for s in spans if s[0] in LANES]


def waits(stamps: Sequence[Sequence[float]], zero: float) -> list[tuple[float, float]]:
    """(seconds since `zero` at which a token came, milliseconds since the token before it), in order of time."""
    found = [(late - zero, (late - early) * 1e3) for times in stamps for early, late in pairwise(times)]
    return sorted(found)


def figures(found: Sequence[tuple[float, float]], first_tokens: Sequence[float], stop: float) -> dict[str, float]:
    """Of the waits before the first image (quiet) and from it until `stop`, and of the images' first tokens in ms."""
    quiet = [ms for at, ms in found if at < 0]
    during = [ms for at, ms in found if 0 <= at <= stop]
    if not quiet or not during:
        raise RuntimeError("no token came before the images did, or none while they were answered")
    return {
        "quiet gap p99": percentile(quiet, 99),
        "gap p50": percentile(during, 50),
        "gap p99": percentile(during, 99),
        "longest gap": max(during),
        "text tokens/s": len(during) / stop,
        "first token p50": percentile(first_tokens, 50),
        "seconds": stop,
    }


def _live(port: int, after: int) -> dict[str, Any]:
    with direct.open(f"http://127.0.0.1:{port}/debug/live?after={after}", timeout=10) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


async def watch(port: int, told: list[dict[str, Any]]) -> None:
    """Add to `told` what the ranks did, again and again, until cancelled; then once more."""
    after = 0

    async def look() -> None:
        nonlocal after
        told.append(await asyncio.to_thread(_live, port, after))
        after = told[-1]["next"]

    try:
        while True:
            await look()
            await asyncio.sleep(LOOK_S)
    finally:
        await look()


async def burst(port: int, make: Requests, load: Load) -> tuple[dict[str, float], list[tuple[float, float]], list[Bar]]:
    """The figures of a load, its texts' waits, and what was done meanwhile."""
    streams = [Stream(time.perf_counter()) for _ in range(load.texts)]
    bodies = [make(1, load.tokens) for _ in range(load.images)]
    asked: list[Stream] = []
    told: list[dict[str, Any]] = []
    async with asyncio.timeout(ANSWER_S), asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(port, make(0, TEXT_TOKENS), stream)) for stream in streams]
        while min(len(stream.stamps) for stream in streams) < WARM_TOKENS:
            await asyncio.sleep(0.02)
        watching = group.create_task(watch(port, told))
        await asyncio.sleep(load.quiet_s)
        zero = time.perf_counter()
        async with asyncio.TaskGroup() as arriving:
            for number, request in enumerate(bodies):
                await asyncio.sleep(max(0.0, zero + number * load.every_s - time.perf_counter()))
                asked.append(Stream(time.perf_counter()))
                arriving.create_task(send(port, request, asked[-1]))
        stop = time.perf_counter() - zero
        await asyncio.sleep(TAIL_S)
        if any(task.done() for task in tasks):
            raise RuntimeError("a text ended before the images were answered")
        for task in (*tasks, watching):
            task.cancel()
    found = waits([[at for at in s.stamps if at >= zero - load.quiet_s] for s in streams], zero)
    # Spans are on the monotonic clock of the host, which may be another one than that of the stamps.
    done = bars(told, zero + time.monotonic() - time.perf_counter())
    return figures(found, [s.first_token_s * 1e3 for s in asked], stop), found, done


def draw(path: Path, runs: dict[str, tuple[dict[str, float], list[tuple[float, float]], list[Bar]]], line: str) -> None:
    """The servers under one another: the lanes of their ranks, a colour for each request with an image, and below them
    the wait for each token of the texts. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    heights = [1.5, 1.0] * len(runs)
    figure, axes = plt.subplots(2 * len(runs), 1, sharex=True, figsize=(11, 3.9 * len(runs)), height_ratios=heights)
    top = 1.15 * max(ms for _, found, _ in runs.values() for _, ms in found)
    first = min(found[0][0] for _, found, _ in runs.values())
    last = max(values["seconds"] for values, _, _ in runs.values()) + TAIL_S / 2
    for i, (name, (values, found, done)) in enumerate(runs.items()):
        lanes, under = axes[2 * i], axes[2 * i + 1]
        of_images = dict.fromkeys(
            r for bar in sorted(done, key=lambda b: b.start) if bar.name == "encode" for r in bar[3]
        )
        colour_of = {request: colours[number % len(colours)] for number, request in enumerate(of_images)}
        rows = list(LANES)[::-1]
        for bar in done:
            own = [colour_of[r] for r in bar.requests if r in colour_of]
            parts = own if own and bar.name != "decode" else [GREY]
            height = 0.8 / len(parts)
            for n, colour in enumerate(parts):
                bottom = rows.index(bar.name) - 0.4 + n * height
                lanes.barh(
                    bottom,
                    bar.stop - bar.start,
                    left=bar.start,
                    height=height,
                    align="edge",
                    color=colour,
                    edgecolor=colour,
                    linewidth=0.5,
                )
        lanes.set_yticks(range(len(rows)), [f"{LANES[row][0]}: {LANES[row][1]}" for row in rows], fontsize=8)
        lanes.set_ylim(-0.6, len(rows) - 0.4)
        what = "an encode rank and a language rank" if name == SPLIT else "both in one process"
        title = f"{name}, {what}: longest wait {values['longest gap']:.0f} ms"
        lanes.set_title(f"{title}, {values['text tokens/s']:.0f} tokens/s of text", loc="left", fontsize=10)
        under.vlines([at for at, _ in found], 0, [ms for _, ms in found], color="#4c78a8", linewidth=0.8)
        under.axhline(values["quiet gap p99"], color="black", linestyle=":", linewidth=0.8)
        under.text(last, values["quiet gap p99"], "quiet p99 ", ha="right", va="bottom", fontsize=7)
        under.set_ylim(0, top)
        under.set_ylabel("wait for a\ntoken, ms", fontsize=8)
        for axis in (lanes, under):
            axis.axvspan(0, values["seconds"], color="#f5f0e6", zorder=0)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    axes[-1].set_xlim(first, last)
    axes[-1].set_xlabel(f"seconds since the first image ({line})", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def burst_of_images(
    servers: tuple[str, ...] = (SPLIT, ONE),
    texts: int = 8,
    images: int = 12,
    every_ms: float = 150.0,
    quiet_seconds: float = 2.0,
    tokens: int = 16,
    preset: str = "mid",
    model: Path | None = None,
    image_side: int = 448,
    picture: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Running texts, and a burst of requests with an image each; what each rank did meanwhile as a picture.

    Args:
        servers: `split` (an encode and a language rank) and `one` (a process with both roles), alone one after the
            other.
        texts: That run all the time.
        images: Requests with one image each.
        every_ms: Between two of these.
        quiet_seconds: Of texts alone, before the first image.
        tokens: New tokens of a request with an image.
        preset: Random weights of tools/make_checkpoint.py.
        model: A checkpoint folder instead.
        image_side: Height and width of an image in pixels.
        picture: PNG or SVG to write; needs matplotlib.
        as_json: Print the JSON line only.
    """
    unknown = [name for name in servers if name not in OURS]
    if unknown or not servers:
        raise InputError(f"servers: {', '.join(OURS)}; got {', '.join(unknown) or 'none'}")
    if min(texts, images, tokens) < 1 or every_ms < 0 or quiet_seconds <= 0:
        raise InputError("need at least one text, image and token, and a quiet time before the images")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the server that runs
    machine, runs = machine_facts(), dict[str, tuple[dict[str, float], list[tuple[float, float]], list[Bar]]]()
    load = Load(texts, images, every_ms / 1e3, quiet_seconds, tokens)
    with ExitStack() as stack:
        folder = model or folder_to_serve(stack, preset)
        for number, name in enumerate(servers):
            with running(name, {}, folder) as (port, called):
                make = Requests(called, image_side, number)
                asyncio.run(burst(port, make, load._replace(images=2, quiet_s=0.5)))  # warm
                runs[name] = asyncio.run(burst(port, make, load))
            print(f"{name}: longest gap {runs[name][0]['longest gap']:.0f} ms", file=sys.stderr, flush=True)
    if picture is not None:
        draw(
            picture,
            runs,
            f"{preset if model is None else model.name}, {machine['cpu']}, {machine['cores']} cores, {machine['date']}",
        )
    result = {
        "bench": "burst",
        "machine": machine,
        "model": preset if model is None else model.name,
        "servers": {name: values for name, (values, _, _) in runs.items()},
    }
    conclude(result, report(result), as_json)


def report(result: dict[str, Any]) -> str:
    """Markdown for people."""
    keys = list(next(iter(result["servers"].values())))
    rows = [[name, *(f"{values[key]:.0f}" for key in keys)] for name, values in result["servers"].items()]
    head = f"{machine_line(result['machine'])}; {result['model']}"
    return f"{head}\n\n{table(['', *keys], rows)}\n\nMilliseconds where nothing else is said."
