"""`recipes/bench.py overload`: more requests than a server can answer, for minutes, over HTTP."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from qwen3vl_disagg.core.errors import InputError
from tools.bench_engine import folder_to_serve
from tools.bench_load import LoadError, Stream, arrivals, send
from tools.bench_machine import conclude, machine_facts, machine_line, table
from tools.bench_road import SPLIT, Requests, closed, running
from tools.bench_stats import percentile
from tools.chaos_parts.growth import Sample
from tools.chaos_parts.processes import look, measure
from tools.soak import names_of

SAMPLE_S = 2.0
IMAGES = 1
PATIENCE_S, PATIENT_S = 600.0, 5.0
"""A client that obeys Retry-After gives up after so long; one begins every so often."""


@dataclass
class Seen:
    """Of those that ask once. `ends`: by status; `seconds` of each answer, `first_s` to its first token."""

    ends: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)


async def ask_once(port: int, request: bytes, seen: Seen) -> None:
    stream = Stream(time.perf_counter())
    try:
        await send(port, request, stream)
    except LoadError as error:
        seen.ends[error.status or "broken off"] += 1
        return
    seen.ends["200"] += 1
    seen.seconds.append(stream.finished - stream.sent)
    seen.first_s.append(stream.first_token_s)
    seen.finished.append(stream.finished)


async def ask_until_answered(port: int, request: bytes) -> tuple[int, float] | None:
    """By a client that does what it is told: how often it asked, and for how long. None when its patience is over."""
    started, num_tries = time.perf_counter(), 0
    while time.perf_counter() - started < PATIENCE_S:
        num_tries += 1
        try:
            await send(port, request, Stream(time.perf_counter()))
        except LoadError as error:
            if error.retry_after_s is None:
                raise
            await asyncio.sleep(error.retry_after_s)
        else:
            return num_tries, time.perf_counter() - started
    return None


@asynccontextmanager
async def sampled(port: int) -> AsyncIterator[list[Sample]]:
    """The frontend's memory and descriptors meanwhile."""
    [pid] = [pid for pid, role in (await asyncio.to_thread(names_of, port)).items() if role == "frontend"]
    samples: list[Sample] = []

    async def sample() -> None:
        while True:
            process = look(pid)
            found = None if process is None else measure(process, "frontend", time.perf_counter())
            samples.extend([] if found is None else [found])
            await asyncio.sleep(SAMPLE_S)

    task = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        task.cancel()


async def overload(port: int, make: Requests, *, rate: float, seconds: float, tokens: int) -> dict[str, Any]:
    """Requests arrive at `rate`/s whatever happens to those before; beside them a client that obeys every 5 s."""
    seen, times = Seen(), arrivals(rate, seconds, 0)
    patient: list[asyncio.Task[tuple[int, float] | None]] = []
    async with sampled(port) as samples, asyncio.TaskGroup() as group:
        opens = time.perf_counter()

        async def obedient() -> None:
            while time.perf_counter() - opens < seconds - PATIENT_S:
                patient.append(group.create_task(ask_until_answered(port, make(IMAGES, tokens))))
                await asyncio.sleep(PATIENT_S)

        group.create_task(obedient())
        for at in times:
            await asyncio.sleep(max(0.0, opens + at - time.perf_counter()))
            group.create_task(ask_once(port, make(IMAGES, tokens), seen))
        closes = opens + seconds
        await asyncio.sleep(max(0.0, closes - time.perf_counter()))
        in_time = sum(stamp <= closes for stamp in seen.finished)
        obeyed_in_time = [task for task in patient if task.done() and task.result() is not None]
    obeyed = [task.result() for task in patient]
    served = [one for one in obeyed if one is not None]
    return {
        "arrived": len(times),
        "ends": dict(sorted(seen.ends.items())),
        "requests_s": (in_time + len(obeyed_in_time)) / seconds,
        "first_token_s": _spread(seen.first_s),
        "seconds": _spread(seen.seconds),
        "patient": {
            "clients": len(patient),
            "answered": len(served),
            "tries": _spread([float(num_tries) for num_tries, _ in served]),
            "seconds": _spread([took for _, took in served]),
        },
        "frontend_mib": [round(sample.anon / 2**20, 1) for sample in samples],
        "frontend_descriptors": [sample.descriptors for sample in samples],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"p50": percentile(values, 50), "p99": percentile(values, 99)} if values else {}


def overloaded(
    times: float = 3.0,
    seconds: float = 600.0,
    at_once: int = 12,
    requests: int = 60,
    tokens: int = 16,
    preset: str = "mid",
    model: Path | None = None,
    image_side: int = 448,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """What a server still answers of more than it can, beside what it can, measured before and after.

    Args:
        times: As many requests arrive as it can answer, times this.
        seconds: For so long.
        at_once: Clients of the closed loop that says what it can.
        requests: Of that loop, each time.
        tokens: New tokens of each request.
        preset: Random weights of tools/make_checkpoint.py.
        model: A checkpoint folder instead.
        image_side: Height and width of an image in pixels.
        as_json: Print the JSON line only.
    """
    if min(at_once, requests, tokens) < 1 or not (seconds > 0 and times > 0):
        raise InputError("need at least one client, request and token, some seconds, and requests that arrive")
    machine = machine_facts()
    with ExitStack() as stack:
        folder = model or folder_to_serve(stack, preset)
        port, called = stack.enter_context(running(SPLIT, {}, folder, ("--debug",)))
        make = Requests(called, image_side, 0)

        def capacity() -> float:
            found: float = asyncio.run(closed(port, make, at_once, requests, IMAGES, tokens))["requests_s"]
            print(f"capacity: {found:.3g} requests/s", file=sys.stderr, flush=True)
            return found

        capacity()  # warms it
        before = capacity()
        found = asyncio.run(overload(port, make, rate=times * before, seconds=seconds, tokens=tokens))
        after = capacity()
    result = {
        "bench": "overload",
        "machine": machine,
        "model": preset if model is None else model.name,
        "times": times,
        "wall_s": seconds,
        "capacity_s": [before, after],
        **found,
        "goodput": found["requests_s"] / ((before + after) / 2),
    }
    conclude(result, report(result), as_json)


def report(result: dict[str, Any]) -> str:
    """Markdown for people."""
    before, after = result["capacity_s"]
    memory, patient = result["frontend_mib"], result["patient"]
    half = max(1, len(memory) // 2)
    rows = [
        ["requests/s that it can (before, after)", f"{before:.2f}, {after:.2f}"],
        ["requests/s answered meanwhile", f"{result['requests_s']:.2f}"],
        ["of what it can", f"{result['goodput']:.3f}"],
        ["ends of those that ask once", ", ".join(f"{end}: {count}" for end, count in result["ends"].items())],
        ["their first token, s", _said(result["first_token_s"])],
        ["clients that obey Retry-After: answered", f"{patient['answered']} of {patient['clients']}"],
        ["their tries", _said(patient["tries"])],
        ["their seconds", _said(patient["seconds"])],
        ["frontend's memory, MiB: most in each half", f"{max(memory[:half]):.0f}, {max(memory[half:] or memory):.0f}"],
        ["its descriptors, most", str(max(result["frontend_descriptors"]))],
    ]
    head = f"{machine_line(result['machine'])}; {result['model']}, {result['times']:g} x for {result['wall_s']:g} s"
    return f"{head}\n\n{table(['', ''], rows)}"


def _said(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in spread.items()) or "none"
