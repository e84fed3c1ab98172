"""One server for a long time: does anything grow, is anybody served later than at the beginning?

    python tools/soak.py --requests 100000 [--plot soak.png] [--json]

Short chats from a few clients, with and without images, new and repeated ones, some of which hang up. Memory,
descriptors and threads of every process are looked at meanwhile. Ends with status 0 if every other answer was a 200,
1 otherwise; whether something grew is for the reader of the table.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen3vl_disagg.assets.drawing import NATIVE_SIZES, draw_scene
from qwen3vl_disagg.assets.scenes import random_scene
from qwen3vl_disagg.core.errors import InputError, report
from qwen3vl_disagg.launch.trace import direct
from tools.bench_machine import machine_facts, machine_line, table
from tools.bench_served import Served
from tools.bench_stats import percentile
from tools.chaos_parts.growth import Sample, lives, slope
from tools.chaos_parts.processes import descendants, measure

PATH = "/v1/chat/completions"
LOOK_S, WAIT_S = 3.0, 60.0
PICTURES, HOT = 3000, 20
"""Different images, more than the server keeps the rows of; those that come again and again."""
CACHE_MIB = 4
KINDS = {"text": 50, "image": 25, "repeated image": 15, "hang-up": 10}
"""How often each comes, of a hundred."""
THOUSAND = 1000


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    requests: int = 100_000
    world: int = 2
    """Ranks of the server, of which one encodes."""
    clients: int = 6
    seed: int = 0
    tokens: int = 4
    """Of an answer, at most."""
    plot: Path | None = None
    """Draw memory and descriptors; needs matplotlib."""
    json: bool = False
    """Print one JSON object in place of text."""


@dataclass
class Seen:
    """By all clients together. `seconds`: of each answer, in the order in which they came."""

    seconds: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    num_begun: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, limit: int) -> int | None:
        """The number of the next request; None when all have been sent."""
        with self.lock:
            if self.num_begun >= limit:
                return None
            self.num_begun += 1
            return self.num_begun - 1

    def end(self, kind: str, status: int | str, seconds: float) -> None:
        with self.lock:
            self.ends[f"{kind}: {status}"] += 1
            if status == 200:
                self.seconds.append(seconds)


def draw_pictures(seed: int, count: int) -> list[str]:
    """As data URIs."""
    rng, found = random.Random(f"soak {seed}"), list[str]()
    for _ in range(count):
        buffer = io.BytesIO()
        draw_scene(random_scene(rng), NATIVE_SIZES[0], rng).save(buffer, "PNG")
        found.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return found


def body_of(kind: str, number: int, pictures: list[str], tokens: int) -> bytes:
    """A request; its text has its number, so that no prompt is another one."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"List all cells. {number}"}]
    if kind != "text":
        index = number % HOT if kind == "repeated image" else HOT + number % (len(pictures) - HOT)
        parts.insert(0, {"type": "image_url", "image_url": {"url": pictures[index]}})
    asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "temperature": 0}
    return json.dumps({**asked, "stream": number % 2 == 0}).encode()


def client(port: int, options: SoakOptions, pictures: list[str], seen: Seen) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    while (number := seen.begin(options.requests)) is not None:
        rng = random.Random(f"{options.seed} {number}")
        [kind] = rng.choices(list(KINDS), weights=list(KINDS.values()))
        started = time.monotonic()
        try:
            asked = body_of(kind, number, pictures, options.tokens)
            connection.request("POST", PATH, asked, {"Content-Type": "application/json"})
            if kind == "hang-up":
                time.sleep(0.01 * rng.random())
                connection.close()
                seen.end(kind, "left", 0.0)
                continue
            response = connection.getresponse()
            response.read()
            seen.end(kind, response.status, time.monotonic() - started)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            seen.end(kind, type(error).__name__, 0.0)
    connection.close()


def names_of(port: int) -> dict[int, str]:
    """Process -> what it is."""
    with direct.open(f"http://127.0.0.1:{port}/debug/processes", timeout=WAIT_S) as response:
        entries = json.load(response)["processes"]
    return {entry["pid"]: entry["role"] for entry in entries}


def look(server: Served, names: dict[int, str], at: float) -> list[Sample]:
    found = []
    for process in descendants(server.process.pid).values():
        sample = measure(process, names.get(process.pid, "slots and children"), at)
        found += [] if sample is None else [sample]
    return found


def growth(samples: list[Sample], num_requests: int, seconds: float) -> dict[str, dict[str, float]]:
    """Of each named process in the second half of the run: what it holds, and what comes to it in 100,000 requests."""
    found = {}
    per_hour = num_requests / seconds * 3600 / 100_000
    for (name, _, _), life in lives(samples).items():
        late = [sample for sample in life if sample.at >= seconds / 2]
        if name == "slots and children" or len(late) < 5:
            continue
        memory, descriptors, threads = (
            [(one.at, float(getattr(one, field))) for one in late] for field in ("anon", "descriptors", "threads")
        )
        found[name] = {
            "MiB": late[-1].anon / 2**20,
            "MiB for 100,000": slope(memory) / 2**20 / per_hour,
            "descriptors": late[-1].descriptors,
            "descriptors for 100,000": slope(descriptors) / per_hour,
            "threads": late[-1].threads,
            "threads for 100,000": slope(threads) / per_hour,
        }
    return found


def latency(seconds: list[float]) -> dict[str, dict[str, float]]:
    """Milliseconds of the second and of the last thousand answers."""
    parts = {"second thousand": seconds[THOUSAND : 2 * THOUSAND], "last thousand": seconds[-THOUSAND:]}
    return {
        name: {"p50": percentile(some, 50) * 1e3, "p99": percentile(some, 99) * 1e3} for name, some in parts.items()
    }


def draw(path: Path, samples: list[Sample], line: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(9, 6))
    for (name, _, _), life in lives(samples).items():
        if name != "slots and children":
            at = [sample.at / 60 for sample in life]
            axes[0].plot(at, [sample.anon / 2**20 for sample in life], label=name)
            axes[1].plot(at, [sample.descriptors for sample in life], label=name)
    axes[0].set_ylabel("anonymous memory, MiB")
    axes[1].set_ylabel("descriptors")
    axes[1].set_xlabel(f"minutes ({line})")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
        axis.grid(True, linewidth=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def soak(options: SoakOptions) -> dict[str, Any]:
    seen, samples, machine = Seen(), list[Sample](), machine_facts()
    pictures = draw_pictures(options.seed, PICTURES)
    settings = ["--debug", "--encode-ranks", "1", "--embedding-cache-mib", str(CACHE_MIB)]
    with Served(options.world, settings) as server:
        names, started = names_of(server.port), time.monotonic()
        threads = [
            threading.Thread(target=client, args=(server.port, options, pictures, seen), daemon=True)
            for _ in range(options.clients)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(LOOK_S)
            at = time.monotonic() - started
            samples += look(server, names, at)
            print(f"{seen.num_begun} requests in {at:.0f} s", end="\r", file=sys.stderr, flush=True)
        seconds = time.monotonic() - started
    if options.plot is not None:
        draw(options.plot, samples, machine_line(machine))
    return {
        "machine": machine,
        "requests": options.requests,
        "seconds": seconds,
        "ends": dict(sorted(seen.ends.items())),
        "ok": all(end.endswith((": 200", ": left")) for end in seen.ends),
        "latency_ms": latency(seen.seconds),
        "growth": growth(samples, options.requests, seconds),
    }


def text_of(result: dict[str, Any]) -> str:
    """Markdown for people."""
    keys = list(next(iter(result["growth"].values()), {}))
    rows = [[name, *(f"{values[key]:.1f}" for key in keys)] for name, values in result["growth"].items()]
    delays = [[name, *(f"{ms:.1f}" for ms in values.values())] for name, values in result["latency_ms"].items()]
    head = f"{machine_line(result['machine'])}: {result['requests']} requests in {result['seconds']:.0f} s"
    ends = ", ".join(f"{name} {count}" for name, count in result["ends"].items())
    tables = [table(["answers, ms", "p50", "p99"], delays), table(["second half", *keys], rows)]
    return "\n\n".join([head, ends, *tables])


def main() -> int:
    options = tyro.cli(SoakOptions, description=__doc__)
    try:
        if options.requests < 3 * THOUSAND or min(options.world - 1, options.clients, options.tokens) < 1:
            raise InputError("need 3,000 requests, two ranks, a client and a token at least")
    except InputError as error:
        return report(error)
    result = soak(options)
    print(json.dumps(result) if options.json else text_of(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
