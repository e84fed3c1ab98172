"""The side of a contestant: load once, then answer one measurement after another.

Standard library only, because a contestant may live in another Python environment. Commands come as JSON lines on
stdin and answers leave on what was stdout; whatever the contestant's libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a contestant is told before it loads. `is_random`: the folder has no weights, make them on the device."""

    folder: str
    device: str = "cpu"
    threads: int = 2
    compile: str = "auto"
    quantize: str = "none"
    is_random: bool = False
    max_batch: int = 32
    max_tokens: int = 2048
    task: str = "generate"
    """`embed`: nothing but `embed` is asked."""
    llama_cpp: str = ""
    """Folder of a build of llama.cpp, for the contestant of that name."""


class Contestant(Protocol):
    """Times are `time.perf_counter` seconds. Nothing is kept from one call to the next: no prompt comes twice."""

    def facts(self) -> dict[str, Any]:
        """Versions and options, for the record."""

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """Generate greedily without end tokens; when each request's tokens came."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from the request to its only token."""

    def vision(self, grid: tuple[int, int, int], patch_dim: int, seed: int) -> float:
        """Seconds of the vision tower over one image, from patches in memory to rows; noise serves as the image."""

    def embed(self, files: list[str]) -> dict[str, Any]:
        """A vector of each of these images: `seconds` from their bytes on, and the `first` vector."""


def serve(load: Callable[[Setup], Any]) -> None:
    """Load with the Setup in argv[1], then answer until stdin ends. The first line out says that it is loaded.

    A command names a method by its entry `do`; its other entries are the arguments.
    """
    commands, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def say(work: Callable[[], Any]) -> None:
        try:
            line = {"result": work()}
        except Exception as error:
            traceback.print_exc()
            line = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(line), file=answers)

    loaded: list[Any] = []

    def start() -> dict[str, Any]:
        started = time.perf_counter()
        loaded.append(load(Setup(**json.loads(sys.argv[1]))))
        return {"load_s": time.perf_counter() - started, **loaded[0].facts()}

    say(start)
    for line in commands:
        command = json.loads(line)
        method = getattr(loaded[0], command.pop("do"))
        say(partial(method, **command))
