"""Which steps there are, in order of what they prove. Standard library alone: this runs before any wheel is there."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_S = 600.0


@dataclass(frozen=True)
class Step:
    """`work`: module of this folder and function. `limit_s`: from its process's start to its end, then it is killed."""

    name: str
    work: str
    limit_s: float
    proves: str


STEPS = (
    Step("wheels", "machine:wheels", 15, "all that the package imports is there"),
    Step("machine", "machine:rates", 25, "versions, and the two ceilings: bytes and operations per second"),
    Step("tests", "correct:marked_tests", 75, "pytest -m gpu: kernels, attention and an engine against the CPU's"),
    Step("readme", "correct:small_checkpoint", 60, "LLM and a server with the small checkpoint: a picture, a stream"),
    Step("language", "language:speed", 80, "graphs of the whole decoder, decode and prefill"),
    Step("profile", "language:profile", 50, "kernels of a step, how busy the GPU is, where the time goes"),
    Step(
        "capture",
        "language:capture",
        70,
        "the captured step: logits of the one from Python, time of a replay",
    ),
    Step("micro", "micro:choices", 45, "experts by rows, FlexAttention by page and context, SDPA at heads of 72"),
    Step("tower", "tower:images", 45, "milliseconds of an image, alone and in a batch, eager and compiled"),
    Step("oracle", "oracle:same_weights", 90, "transformers with the same weights: tokens, logits, speed"),
    Step("leads", "leads:available", 40, "float8 products, varlen attention, memory between processes"),
)
NEEDED = ("numpy", "safetensors", "tokenizers", "jinja2", "msgspec", "PIL", "tqdm", "tyro")
"""Modules without which nothing runs."""
FOR_SERVING = ("starlette", "uvicorn", "httpx2", "prometheus_client", "llguidance")
FOR_TESTS = ("pytest", "pytest_timeout", "xdist", "hypothesis", "transformers", "torchao")

DOWNLOAD = (
    "pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d wheels "
    "tyro docstring-parser typeguard typing-extensions msgspec starlette uvicorn httpx2 httpcore2 truststore "
    "prometheus-client llguidance torchao"
)
"""Fills a folder for `--wheels`, where there is a network."""


def chosen(only: str) -> list[Step]:
    """The steps of a list with commas; all for an empty one. ValueError for a name that is none."""
    names = [name for name in only.split(",") if name]
    unknown = sorted(set(names) - {step.name for step in STEPS})
    if unknown:
        raise ValueError(f"no step {', '.join(unknown)}: there are {', '.join(step.name for step in STEPS)}")
    return [step for step in STEPS if not names or step.name in names]
