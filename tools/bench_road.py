"""`recipes/bench.py road`: the whole way over HTTP as a client sees it, each server alone on the machine, in turns."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

import tyro

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.launch.trace import direct
from tools.bench_contestants.llama_build import NO_BUILD, LlamaBuildError, command, convert, named_build
from tools.bench_engine import folder_to_serve
from tools.bench_load import Stream, arrivals, body, picture, send, text
from tools.bench_machine import busy_seconds, conclude, machine_facts, machine_line, table
from tools.bench_served import REPO, free_port
from tools.bench_stats import gaps, percentile

SPLIT, ONE, LLAMA = "split", "one", "llama.cpp"
OURS = {SPLIT: 2, ONE: 1}
READY_S, LEAVE_S, ANSWER_S = 400.0, 40.0, 900.0
TEXT_TOKENS = 3000
VISUAL_TOKEN_SIDE, ROOM_TOKENS, ARRIVED = 32, 512, 8
"""For llama.cpp, which divides its context beforehand: pixels along a visual token, tokens for the words of a request
and the template, and how many requests with images it works on beside the texts."""
WARM_TOKENS = 3


def command_of(name: str, others: dict[str, str], port: int, model: Path, options: Sequence[str] = ()) -> list[str]:
    """What starts a server. Our own as its README says, with `options`; of others `{port}` and `{model}` are filled
    in."""
    if name in others:
        return [part.format(port=port, model=model) for part in shlex.split(others[name])]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={OURS[name]}"]
    return [
        *launch,
        f"--master-port={free_port()}",
        str(REPO / "recipes/serve.py"),
        f"--port={port}",
        f"--model={model}",
        *options,
    ]


@contextmanager
def running(name: str, others: dict[str, str], model: Path, options: Sequence[str] = ()) -> Iterator[tuple[int, str]]:
    """A server that answers: its port, and what it calls the model. RuntimeError with the end of its log otherwise."""
    port = free_port()
    with tempfile.NamedTemporaryFile("w+", suffix=f"-{name}.log") as log:
        command = command_of(name, others, port, model, options)
        process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            end = time.monotonic() + READY_S
            while (called := name_at(port)) is None:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{name} did not come up:\n{Path(log.name).read_text()[-2000:]}")
                time.sleep(0.2)
            yield port, called
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(LEAVE_S)


def llama_command(stack: ExitStack, build: Path, folder: Path, slots: int, slot_tokens: int) -> str:
    """The command line of llama.cpp's server, `{port}` open, for the checkpoint as its converter writes it into a
    folder that goes with `stack`. LlamaBuildError."""
    out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-llama-")))
    line = shlex.join(command(build, out, "{port}", slots, slot_tokens))
    convert(build, folder, out)
    return line


def name_at(port: int) -> str | None:
    """What the server calls its model, None while it cannot be asked."""
    try:
        for path in ("ready", "health"):
            try:
                direct.open(f"http://127.0.0.1:{port}/{path}", timeout=5).close()
            except urllib.error.HTTPError as error:
                if error.code != 404:  # not every server has both
                    return None
        with direct.open(f"http://127.0.0.1:{port}/v1/models", timeout=5) as response:
            return json.load(response)["data"][0]["id"]
    except (OSError, HTTPException, ValueError, LookupError):  # it may be starting
        return None


class Requests:
    """Bodies with pictures of which none comes twice."""

    def __init__(self, model: str, side: int, seed: int) -> None:
        self._model, self._side = model, side
        self._numbers = itertools.count(1_000_003 * (seed + 1))

    def __call__(self, images: int, tokens: int) -> bytes:
        number = next(self._numbers)
        pictures = [picture(self._side, next(self._numbers)) for _ in range(images)]
        return body(text(8 if images else 40, number), pictures, tokens, model=self._model)


async def closed(port: int, make: Requests, at_once: int, count: int, images: int, tokens: int) -> dict[str, Any]:
    """`at_once` clients, each of which sends its next request when the last is answered."""
    bodies = [make(images, tokens) for _ in range(count)]
    streams: list[Stream] = []

    async def client() -> None:
        while bodies:
            streams.append(Stream(time.perf_counter()))
            await send(port, bodies.pop(), streams[-1])

    started = time.perf_counter()
    async with asyncio.timeout(ANSWER_S), asyncio.TaskGroup() as clients:
        for _ in range(at_once):
            clients.create_task(client())
    seconds = time.perf_counter() - started
    between = [gap * 1e3 for gap in gaps([stream.stamps for stream in streams])]
    return {
        "requests_s": count / seconds,
        "first_token_ms": [stream.first_token_s * 1e3 for stream in streams],
        "gaps_ms": between,
    }


async def open_loop(
    port: int, make: Requests, texts: int, images: int, rate: float, seconds: float, tokens: int, seed: int
) -> dict[str, Any]:
    """Texts that run all the time; requests with images that come whether or not those before are answered."""
    streams = [Stream(time.perf_counter()) for _ in range(texts)]
    bodies = [make(images, tokens) for _ in arrivals(rate, seconds, seed)]
    asked: list[Stream] = []
    async with asyncio.timeout(ANSWER_S), asyncio.TaskGroup() as running_texts:
        tasks = [running_texts.create_task(send(port, make(0, TEXT_TOKENS), stream)) for stream in streams]
        while min(len(stream.stamps) for stream in streams) < WARM_TOKENS:
            await asyncio.sleep(0.02)
        quiet_from = time.perf_counter()
        await asyncio.sleep(min(8.0, seconds / 3))
        opens = time.perf_counter()
        async with asyncio.TaskGroup() as arriving:
            for at, request in zip(arrivals(rate, seconds, seed), bodies, strict=True):
                await asyncio.sleep(max(0.0, opens + at - time.perf_counter()))
                asked.append(Stream(time.perf_counter()))
                arriving.create_task(send(port, request, asked[-1]))
        closes = time.perf_counter()
        ended = sum(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        if ended:
            raise RuntimeError(f"{ended} texts ended before the requests with images did: their rates say nothing")

    def between(start: float, stop: float) -> list[list[float]]:
        return [[stamp for stamp in stream.stamps if start <= stamp <= stop] for stream in streams]

    during = between(opens, closes)
    return {
        "gaps_ms": [gap * 1e3 for gap in gaps(during)],
        "quiet_gaps_ms": [gap * 1e3 for gap in gaps(between(quiet_from, opens))],
        "text_tokens_s": sum(map(len, during)) / (closes - opens),
        "first_token_ms": [stream.first_token_s * 1e3 for stream in asked],
    }


def road(
    rounds: int = 3,
    contestants: tuple[str, ...] = (SPLIT, ONE),
    other: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=COMMAND")] = (),
    at_once: tuple[int, ...] = (1, 4, 8),
    requests: int = 12,
    images: tuple[int, ...] = (1,),
    tokens: int = 32,
    texts: int = 4,
    seconds: float = 40.0,
    rate: float = 0.25,
    preset: str = "mid",
    model: Path | None = None,
    image_side: int = 448,
    llama_cpp: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """First tokens, gaps and requests/s over HTTP: clients that wait for answers, and arrivals that do not.

    Args:
        rounds: In each, every server is started, measured alone and ended, in one order and back in the next.
        contestants: Of ours: `split` (an encode and a language rank) and `one` (a process with both roles).
        other: Another server, by the command that starts it; `{port}` and `{model}` are filled in. May be repeated.
        at_once: Clients of the closed loop.
        requests: Of each closed loop.
        images: Images of a request in the open loop; 1 in the closed one.
        tokens: New tokens of a request with images.
        texts: Texts that run all the time in the open loop; 0: no open loop.
        seconds: For which requests arrive.
        rate: Images per second that arrive.
        preset: Random weights of tools/make_checkpoint.py.
        model: A checkpoint folder instead.
        image_side: Height and width of an image in pixels.
        llama_cpp: Folder in which llama.cpp was built: its server takes part as `llama.cpp`. Default: $LLAMA_CPP.
        as_json: Print the JSON line only.
    """
    others = dict(entry.partition("=")[::2] for entry in other)
    unknown = [name for name in contestants if name not in OURS]
    unknown += [name for name, line in others.items() if not line or name in (*OURS, LLAMA)]
    if unknown or not (contestants or others or named_build(llama_cpp)):
        raise InputError(f"contestants: {', '.join(OURS)}, others as NAME=COMMAND; got {', '.join(unknown) or 'none'}")
    if min(rounds, requests, tokens, *at_once, *images) < 1 or min(rate, seconds) <= 0 or texts < 0:
        raise InputError("need at least one round, request, token, client and image, and a rate above 0")
    if texts and not all(arrivals(rate / count, seconds, number) for count in images for number in range(rounds)):
        raise InputError(
            f"no request arrives within {seconds:g} s at {rate:g} images/s: more seconds, or a higher rate"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the server that runs
    machine, build, left_out = machine_facts(), named_build(llama_cpp), dict[str, str]()
    with ExitStack() as stack:
        folder = model or folder_to_serve(stack, preset)
        try:
            if build is None:
                raise LlamaBuildError(NO_BUILD)
            of_image = math.ceil(image_side / VISUAL_TOKEN_SIDE) ** 2
            slot_tokens = max(TEXT_TOKENS if texts else 0, max(1, *images) * of_image + tokens) + ROOM_TOKENS
            others[LLAMA] = llama_command(stack, build, folder, max(*at_once, texts + ARRIVED), slot_tokens)
        except LlamaBuildError as error:
            print(error, file=sys.stderr)
            left_out[LLAMA] = str(error).splitlines()[0]
        names = [*contestants, *others]
        found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in names}
        for number in range(rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                with running(name, others, folder) as (port, called):
                    make, parts = Requests(called, image_side, number), found[name]
                    asyncio.run(closed(port, make, 2, 4, 1, 4))  # warm
                    before, started = busy_seconds(), time.perf_counter()
                    for clients in at_once:
                        part = asyncio.run(closed(port, make, clients, max(requests, clients), 1, tokens))
                        parts.setdefault(f"closed {clients}", []).append(part)
                        tell(name, f"closed {clients}", part)
                    for count in images if texts else ():
                        loop = open_loop(port, make, texts, count, rate / count, seconds, tokens, number)
                        part = asyncio.run(loop)
                        parts.setdefault(f"open {count}", []).append(part)
                        tell(name, f"open {count}", part)
                    cores = (busy_seconds() - before) / (time.perf_counter() - started)
                print(f"round {number + 1} of {rounds}: {name}, {cores:.2f} cores", file=sys.stderr)
    result = {
        "bench": "road",
        "machine": machine,
        "model": preset if model is None else model.name,
        "rounds": rounds,
        "left_out": left_out,
        "servers": {name: {part: summary(values) for part, values in parts.items()} for name, parts in found.items()},
    }
    conclude(result, report(result), as_json)


def tell(name: str, part: str, measured: dict[str, Any]) -> None:
    """A long run that is stopped has said what it saw."""
    found = ", ".join(f"{key} {value:.4g}" for key, value in summary([measured]).items() if "max" not in key)
    print(f"{name}, {part}: {found}", file=sys.stderr, flush=True)


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds of rates; percentiles over all rounds' values of the rest."""
    out = {}
    for key in rounds[0]:
        if key.endswith("_s"):
            out[key] = statistics.median(one[key] for one in rounds)
        elif values := [value for one in rounds for value in one[key]]:
            stem = key.removesuffix("_ms")
            out |= {f"{stem}_p50_ms": percentile(values, 50), f"{stem}_p99_ms": percentile(values, 99)}
            out[f"{stem}_max_ms"] = max(values)
    return out


def report(result: dict[str, Any]) -> str:
    """Markdown for people: a table for each part."""
    columns = {
        "closed": ("requests_s", "first_token_p50_ms", "gaps_p50_ms", "gaps_p99_ms", "gaps_max_ms"),
        "open": (
            *("gaps_p50_ms", "gaps_p99_ms", "gaps_max_ms", "quiet_gaps_p99_ms"),
            *("text_tokens_s", "first_token_p50_ms"),
        ),
    }
    pieces = [f"{machine_line(result['machine'])}; {result['model']}, {result['rounds']} rounds"]
    parts = dict.fromkeys(part for server in result["servers"].values() for part in server)
    for part in parts:
        kind, number = part.split()
        what = f"{number} at a time" if kind == "closed" else f"arrivals of {number} images"
        keys = columns[kind]
        head = [what, *(key.replace("_s", "/s").replace("_", " ").removesuffix(" ms") for key in keys)]
        rows = [
            [name, *(f"{server[part].get(key, float('nan')):.{2 if key == 'requests_s' else 0}f}" for key in keys)]
            for name, server in result["servers"].items()
            if part in server
        ]
        pieces.append(table(head, rows))
    pieces += ["Milliseconds where nothing else is said."]
    return "\n\n".join(pieces + [f"Left out: {name}: {reason}" for name, reason in result["left_out"].items()])
