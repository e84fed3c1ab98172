"""How long a server that compiles takes to be ready: with nothing compiled before, and with what that left behind."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import tyro

from tools.bench_engine import folder_to_serve
from tools.bench_machine import conclude, machine_facts, machine_line, table
from tools.bench_served import Served


def ready_seconds(world: int, options: list[str]) -> float:
    """From the launch of torchrun to `ready`."""
    started = time.perf_counter()
    with Served(world, options, ready_s=900.0):
        return time.perf_counter() - started


def start(
    ranks: int = 8,
    rounds: int = 2,
    preset: str | None = None,
    model: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Seconds until a server is ready: not compiling, compiling for the first time, and again; docs/benchmarks.md.

    The compiler's artifacts are in a new folder in each round.

    Args:
        ranks: Ranks of the server.
        rounds: Rounds.
        preset: Random weights of tools/make_checkpoint.py instead of the small checkpoint in the package.
        model: A checkpoint folder instead.
        as_json: Print the JSON line only.
    """
    if rounds < 1 or ranks < 1:
        raise SystemExit("need at least one round and one rank")
    machine = machine_facts()
    found: dict[str, list[float]] = {"off": [], "first": [], "second": []}
    with ExitStack() as stack:
        if model is None and preset is not None:
            model = folder_to_serve(stack, preset)
        options = [] if model is None else ["--model", str(model)]
        for number in range(rounds):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="compiled-"))
            for name, choice in (("off", "off"), ("first", "on"), ("second", "on")):
                found[name].append(ready_seconds(ranks, [*options, "--compile", choice]))
                print(f"round {number + 1} of {rounds}: {name} {found[name][-1]:.1f} s", file=sys.stderr)
    result = {
        "bench": "start",
        "machine": machine,
        "model": "the package's" if model is None else model.name,
        "ranks": ranks,
        "ready_s": found,
        "second_of_first": [second / first for first, second in zip(found["first"], found["second"], strict=True)],
    }
    conclude(result, report(result), as_json)


def report(result: dict[str, Any]) -> str:
    """Markdown for people."""
    machine, found = result["machine"], result["ready_s"]
    title = f"{machine_line(machine)}; {result['model']} checkpoint, {result['ranks']} ranks; seconds until ready"
    rows = [
        [str(i + 1), *(f"{found[name][i]:.1f}" for name in found), f"{ratio:.2f}"]
        for i, ratio in enumerate(result["second_of_first"])
    ]
    return f"{title}\n\n{table(['round', 'not compiling', 'first', 'second', 'second / first'], rows)}"
