"""`recipes/bench.py pooling`: images/s from their bytes to vectors, this project and vLLM in turns."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from qwen3vl_disagg.core.errors import InputError
from tools.bench_contestants.client import ask_alone
from tools.bench_contestants.worker import Setup
from tools.bench_engine import Name, folder_to_serve, gather
from tools.bench_machine import conclude, machine_facts, spread, table

ANSWER_S = 300.0
MAX_TOKENS = 2048


def pooling(
    rounds: int = 5,
    contestants: tuple[Name, ...] = ("this", "vllm", "vllm-compiled"),
    images: int = 32,
    image_side: int = 448,
    preset: str = "mid-dense",
    threads: int = 2,
    vllm_python: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """A vector of each of many images, all in one call; contestants in turns. No image comes twice.

    Args:
        rounds: Rounds that count; one more before them warms up.
        contestants: Who takes part. Who cannot be started is left out, with the reason.
        images: How many in a call, as PNG files of noise.
        image_side: Height and width of an image in pixels.
        preset: Random weights of tools/make_checkpoint.py.
        threads: Threads of each contestant; only one works at a time.
        vllm_python: Python of an environment that has vLLM. Default: $VLLM_PYTHON.
        as_json: Print the JSON line only.
    """
    if rounds < 1 or not contestants or min(images, image_side, threads) < 1:
        raise InputError("need at least one round, contestant, image, pixel and thread")
    machine = machine_facts()
    vllm_python = vllm_python or (Path(os.environ["VLLM_PYTHON"]) if os.environ.get("VLLM_PYTHON") else None)
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        folder = folder_to_serve(stack, preset)
        pictures = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        setup = Setup(folder=str(folder), threads=threads, max_batch=32, max_tokens=MAX_TOKENS, task="embed")
        processes, records, left_out = gather(stack, contestants, setup, vllm_python, "default")
        if not processes:
            raise SystemExit("\n".join(f"{name}: {reason}" for name, reason in left_out.items()))
        for number in range(rounds + 1):
            files = [str(pictures / f"{number}-{n}.png") for n in range(images)]
            for n, file in enumerate(files):
                _write_noise(Path(file), image_side, number * images + n)
            vectors: dict[str, list[float]] = {}
            for name, process in processes.items():
                answer = ask_alone(process, list(processes.values()), ANSWER_S, do="embed", files=files)
                vectors[name] = answer.result["first"]
                if number:
                    rates.setdefault(name, []).append(images / answer.result["seconds"])
                print(f"round {number}: {name} {images / answer.result['seconds']:.2f} images/s", file=sys.stderr)
    first = next(iter(vectors.values()))
    result: dict[str, Any] = {
        "bench": "pooling",
        "machine": machine,
        "model": preset,
        "images": images,
        "image_side": image_side,
        "rounds": rounds,
        "facts": {name: record.facts for name, record in records.items()},
        "images_s": {name: spread(values) for name, values in rates.items()},
        "cosine": {name: float(np.dot(first, vector)) for name, vector in vectors.items()},
        "left_out": left_out,
    }
    best = statistics.median(next(iter(rates.values())))
    rows = [
        [name, f"{statistics.median(values):.2f}", f"{best / statistics.median(values):.2f}", f"{cosine:.5f}"]
        for (name, values), cosine in zip(rates.items(), result["cosine"].values(), strict=True)
    ]
    conclude(result, table(["", "images/s", "the first / this one", "cosine of one vector"], rows), as_json)


def _write_noise(file: Path, side: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, compress_level=1)
