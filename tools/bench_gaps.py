"""Gaps between the tokens of running text requests while requests with images arrive: split against colocated."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from tools.bench_engine import folder_to_serve
from tools.bench_load import Stream, arrivals, body, picture, send, text
from tools.bench_machine import busy_seconds, conclude, cpu_seconds, machine_facts, machine_line, table
from tools.bench_served import Served
from tools.bench_stats import gaps, percentile

COLOURS = {"split": "#4c78a8", "colocated": "#e45756"}
WARM_TOKENS = 3
START_S, DRAIN_S = 300.0, 600.0
TEXT_WORDS = 40
SPLIT, COLOCATED = "split", "colocated"


@dataclass(frozen=True, kw_only=True)
class Load:
    """The same for both systems. `rate`: requests with images per second."""

    texts: int
    text_tokens: int
    images: int
    image_tokens: int
    side: int
    seconds: float
    quiet_s: float
    rate: float
    seed: int

    def text_body(self, number: int) -> bytes:
        return body(text(TEXT_WORDS, self.seed + number), [], self.text_tokens)

    def image_body(self, number: int) -> bytes:
        """Request `number` of a run whose seed is `seed`: no picture comes twice, so nothing is cached."""
        first = 1_000_003 * (self.seed + 1) + number * self.images
        pictures = [picture(self.side, first + i) for i in range(self.images)]
        return body(text(4, self.seed + number), pictures, self.image_tokens)


@dataclass
class System:
    """One or several servers that share the requests evenly."""

    name: str
    servers: Sequence[Served]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def port(self, number: int) -> int:
        return self.servers[number % len(self.servers)].port

    def ranks(self) -> dict[str, int]:
        """Rank processes by name."""
        return {
            (f"{role} {i}" if len(self.servers) > 1 else role): pid
            for i, server in enumerate(self.servers)
            for role, pid in server.pids().items()
        }


def start(stack: ExitStack, model: Path, chunk_tokens: int | None) -> dict[str, System]:
    """Both systems on the same two cores: each colocated server gets one, the split's ranks share them."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed")
    options = ["--model", str(model), "--debug"]
    if chunk_tokens is not None:
        options += ["--chunk-tokens", str(chunk_tokens)]
    split = Served(2, [*options, "--encode-ranks", "1"], cores)
    stack.callback(split.close)
    both = [split]
    for core in cores:
        # One image at a time through the tower, as in a system that schedules images between decode steps.
        both.append(Served(1, [*options, "--vision-batch-tokens", "0"], [core]))
        stack.callback(both[-1].close)
    for server in both:
        server.wait_ready()
    return {SPLIT: System(SPLIT, both[:1]), COLOCATED: System(COLOCATED, both[1:])}


def encode_seconds(server: Served, images: int, side: int, repeats: int = 3) -> float:
    """CPU seconds of an encode rank per image, from requests that come one at a time; the first one warms up."""
    pid, used = server.pids()["encode"], 0.0
    for number in range(repeats + 1):
        request = body("ba", [picture(side, 77 + number * images + i) for i in range(images)], 1, stream=False)
        before = cpu_seconds({pid})
        server.post(request)
        used += cpu_seconds({pid}) - before if number else 0.0
    return used / (repeats * images)


async def run_round(system: System, load: Load) -> dict[str, Any]:
    """Text requests alone, then with requests with images until the last of those is answered."""
    texts: list[Stream] = []
    async with asyncio.TaskGroup() as running:
        tasks = []
        for number in range(load.texts):
            texts.append(Stream(time.perf_counter()))
            tasks.append(running.create_task(send(system.port(number), load.text_body(number), texts[-1])))
        async with asyncio.timeout(START_S):
            while min(len(stream.stamps) for stream in texts) < WARM_TOKENS:
                await asyncio.sleep(0.02)
        quiet = time.perf_counter()
        await asyncio.sleep(load.quiet_s)
        ranks = system.ranks()
        opened, before = time.perf_counter(), {name: cpu_seconds({pid}) for name, pid in ranks.items()}
        busy = busy_seconds()
        async with asyncio.timeout(load.seconds + DRAIN_S):
            answered = await send_images(system, load)
        closed, busy = time.perf_counter(), busy_seconds() - busy
        used = {name: (cpu_seconds({pid}) - before[name]) / (closed - opened) for name, pid in ranks.items()}
        ended = sum(stream.finished > 0 for stream in texts)
        for task in tasks:
            task.cancel()
    during = [within(stream.stamps, opened, closed) for stream in texts]
    return {
        "gaps_ms": [gap * 1e3 for gap in gaps(during)],
        "quiet_gaps_ms": [gap * 1e3 for gap in gaps([within(s.stamps, quiet, opened) for s in texts])],
        "first_token_ms": [stream.first_token_s * 1e3 for stream in answered],
        "requests": len(answered),
        "requests_s": len(answered) / (closed - opened),
        "text_tokens_s": sum(map(len, during)) / (closed - opened),
        "seconds": closed - opened,
        "text_requests_ended": ended,
        "cores": used,
        "machine_cores": busy / (closed - opened),
    }


def within(stamps: Sequence[float], opens: float, closes: float) -> list[float]:
    return [stamp for stamp in stamps if opens <= stamp <= closes]


async def send_images(system: System, load: Load) -> list[Stream]:
    """Send each request at its time, whether or not those before are answered; all of them, once answered."""
    times = arrivals(load.rate, load.seconds, load.seed)
    requests = [load.image_body(number) for number in range(len(times))]
    records: list[Stream] = []
    started = time.perf_counter()
    async with asyncio.TaskGroup() as running:
        for number, (at, request) in enumerate(zip(times, requests, strict=True)):
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            records.append(Stream(time.perf_counter()))
            running.create_task(send(system.port(number), request, records[-1]))
    return records


def gaps_under_load(
    rounds: int = 2,
    preset: str = "mid",
    model: Path | None = None,
    texts: int = 8,
    text_tokens: int = 3000,
    images: int = 4,
    image_tokens: int = 16,
    image_side: int = 448,
    seconds: float = 60.0,
    quiet_seconds: float = 10.0,
    busy: float = 0.6,
    rate: float | None = None,
    chunk_tokens: int | None = None,
    seed: int = 0,
    picture: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Gaps between tokens of running text requests while requests with images arrive; docs/benchmarks.md.

    `split` is one encode and one language rank, `colocated` two processes with both roles and half of the requests
    each.

    Args:
        rounds: Rounds; in each, both systems have one turn under the same arrivals.
        preset: Random weights of tools/make_checkpoint.py.
        model: A checkpoint folder instead.
        texts: Text requests that run all the time.
        text_tokens: Tokens for each of them: they must outlast the load.
        images: Images in each request that arrives.
        image_tokens: Tokens for each of those.
        image_side: Height and width of the images in pixels.
        seconds: How long requests with images arrive.
        quiet_seconds: How long the text requests run before that.
        busy: Part of the time for which the arrivals keep one encode rank busy.
        rate: Requests with images per second, instead of `busy`.
        chunk_tokens: Of both systems; their default if not given.
        seed: Of arrivals and contents.
        picture: Folder for the picture.
        as_json: Print the JSON line only.
    """
    if rounds < 1 or texts < 1 or images < 1 or min(busy, seconds) <= 0:
        raise SystemExit("need at least one round, text request and image, and a load above 0")
    machine = machine_facts()
    with ExitStack() as stack:
        if model is None:
            model = folder_to_serve(stack, preset)
        systems = start(stack, model, chunk_tokens)
        per_image = encode_seconds(systems[SPLIT].servers[0], images, image_side)
        rate = rate or busy / (images * per_image)
        print(f"{per_image * 1e3:.0f} ms of CPU per image, {rate:.3f} requests/s", file=sys.stderr)
        for number in range(rounds):
            load = Load(
                texts=texts,
                text_tokens=text_tokens,
                images=images,
                image_tokens=image_tokens,
                side=image_side,
                seconds=seconds,
                quiet_s=quiet_seconds,
                rate=rate,
                seed=seed + number,
            )
            for name in (SPLIT, COLOCATED) if number % 2 == 0 else (COLOCATED, SPLIT):
                systems[name].rounds.append(asyncio.run(run_round(systems[name], load)))
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
    result = {
        "bench": "gaps",
        "machine": machine,
        "model": preset if model.name == preset else model.name,
        "encode_ms_per_image": per_image * 1e3,
        "rate": rate,
        "texts": texts,
        "images": images,
        "image_side": image_side,
        "seconds": seconds,
        "rounds": rounds,
        "systems": {name: merge(system.rounds) for name, system in systems.items()},
    }
    if picture is not None:
        pooled = {name: pool(system.rounds, "gaps_ms") for name, system in systems.items()}
        print(draw(pooled, picture), file=sys.stderr)
    conclude(result, report(result), as_json)


def tail(values: Sequence[float]) -> dict[str, float]:
    """Half of the values are not above p50, 99 % not above p99."""
    found = {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values)} if values else {}
    return {**found, "count": len(values)}


def pool(rounds: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The values of all rounds."""
    return [value for one in rounds for value in one[key]]


def merge(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tails over the values of all rounds together, and of each round; means of what is one number a round."""

    def mean(key: str) -> float:
        return statistics.fmean(one[key] for one in rounds)

    lists = ("gaps_ms", "quiet_gaps_ms", "first_token_ms")
    return {
        **{key: tail(pool(rounds, key)) for key in lists},
        "requests": sum(one["requests"] for one in rounds),
        **{key: mean(key) for key in ("requests_s", "text_tokens_s", "machine_cores")},
        "cores": {name: statistics.fmean(one["cores"][name] for one in rounds) for name in rounds[0]["cores"]},
        "text_requests_ended": sum(one["text_requests_ended"] for one in rounds),
        "rounds": [{**{key: tail(one[key]) for key in lists}, "seconds": one["seconds"]} for one in rounds],
    }


def report(result: Mapping[str, Any]) -> str:
    """Markdown for people."""
    systems, machine, side = result["systems"], result["machine"], result["image_side"]

    def tails(entry: Mapping[str, Any]) -> list[str]:
        return [f"{entry[name]:.0f}" if name in entry else "-" for name in ("p50", "p99", "max")]

    rows = [
        [
            name,
            *tails(entry["gaps_ms"]),
            *tails(entry["quiet_gaps_ms"]),
            *tails(entry["first_token_ms"])[:2],
            f"{entry['requests_s']:.3f}",
            f"{entry['text_tokens_s']:.1f}",
        ]
        for name, entry in systems.items()
    ]
    shares = [
        [
            name,
            ", ".join(f"{rank} {cores:.2f}" for rank, cores in entry["cores"].items()),
            f"{entry['machine_cores']:.2f}",
        ]
        for name, entry in systems.items()
    ]
    ended = [
        f"{entry['text_requests_ended']} text requests of `{name}` ended before the load did: give them more tokens."
        for name, entry in systems.items()
        if entry["text_requests_ended"]
    ]
    head = ["", *(f"gap {name} ms" for name in ("p50", "p99", "max"))]
    head += [*(f"quiet {name} ms" for name in ("p50", "p99", "max")), "first token p50 ms", "p99 ms"]
    return "\n\n".join(
        [
            f"{machine_line(machine)}; {result['model']}; {result['texts']} text requests; "
            f"{result['rate']:.3f} requests/s with {result['images']} images of {side} x {side} each for "
            f"{result['seconds']:.0f} s, {result['rounds']} rounds",
            "Gaps between tokens of the text requests, under load and before it (quiet); time to the first token of "
            "the requests with images:",
            table([*head, "requests/s", "text tokens/s"], rows),
            "Cores that the ranks and the whole machine used:",
            table(["", "ranks", "machine"], shares),
            *ended,
        ]
    )


def draw(gaps_ms: Mapping[str, Sequence[float]], folder: Path) -> Path:
    """Which part of the gaps is longer than x: the further left and down, the better. Returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, values in gaps_ms.items():
        points = sorted(values)
        parts = [1 - i / len(points) for i in range(len(points))]
        axis.step(points, parts, where="pre", label=name, color=COLOURS.get(name), linewidth=1.8)
        axis.plot(points[-1], parts[-1], "o", color=COLOURS.get(name), markersize=4)
    axis.axhline(0.01, color="#888888", linestyle=":", linewidth=1)
    axis.text(0.995, 0.0105, "1 in 100", ha="right", va="bottom", fontsize=8, transform=axis.get_yaxis_transform())
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left=1.0)  # below are tokens that a step of the server sent together
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("gap between tokens of running text requests, ms")
    axis.set_ylabel("part of the gaps that is longer")
    axis.set_title("while requests with images arrive", loc="left", fontsize=10)
    axis.grid(which="major", color="#eeeeee")
    axis.legend(frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gaps.png"
    figure.savefig(path, dpi=130)
    return path
