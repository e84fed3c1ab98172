"""llama.cpp as the user built it: its server's command, and checkpoints in its format by the source of that build."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tools.bench_contestants.llama_convert import MODEL, PROJECTOR

REPO = Path(__file__).resolve().parent.parent.parent
CONVERT_S = 1800.0
NO_BUILD = "no build of llama.cpp given (--llama-cpp or LLAMA_CPP)"
TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class LlamaBuildError(Exception):
    """The folder is no build, or its converter did not take the checkpoint."""


def named_build(folder: Path | None) -> Path | None:
    """The folder of a build that the user names, by the option or by $LLAMA_CPP."""
    named = folder or os.environ.get("LLAMA_CPP")
    return Path(named).resolve() if named else None


def server(build: Path) -> Path:
    """The server's program. LlamaBuildError without one."""
    program = build / "bin" / "llama-server"
    if not program.is_file():
        raise LlamaBuildError(f"{build}: no bin/llama-server; --llama-cpp names the folder given to `cmake -B`")
    return program


def source(build: Path) -> Path:
    """Where the converter is that belongs to a build, as cmake noted it."""
    cache = build / "CMakeCache.txt"
    found = re.search(r"^CMAKE_HOME_DIRECTORY:\w+=(.+)$", cache.read_text() if cache.is_file() else "", re.MULTILINE)
    if not found or not (Path(found[1]) / "convert_hf_to_gguf.py").is_file():
        raise LlamaBuildError(f"{build}: its CMakeCache.txt names no source with convert_hf_to_gguf.py")
    return Path(found[1])


def convert(build: Path, checkpoint: Path, folder: Path) -> None:
    """Write `checkpoint` into `folder` in its own dtype. LlamaBuildError with the converter's last words."""
    config = json.loads((checkpoint / "config.json").read_text())
    dtype = TYPES.get(config.get("dtype") or config.get("torch_dtype"), "auto")
    script = [sys.executable, "-B", "-m", "tools.bench_contestants.llama_convert"]
    paths = [str(source(build)), str(checkpoint.resolve()), str(folder)]
    done = subprocess.run(
        [*script, *paths, dtype],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=CONVERT_S,
    )
    if done.returncode:
        raise LlamaBuildError(f"{checkpoint} was not converted for llama.cpp\n{done.stdout[-2000:]}")


def command(build: Path, folder: Path, port: int | str, slots: int, slot_tokens: int) -> list[str]:
    """What serves a converted checkpoint to `slots` requests at once, each of up to `slot_tokens`."""
    return [
        str(server(build)),
        *("--model", str(folder / MODEL), "--mmproj", str(folder / PROJECTOR)),
        *("--host", "127.0.0.1", "--port", str(port), "--offline", "--no-ui"),
        *("--parallel", str(slots), "--ctx-size", str(slots * slot_tokens)),
    ]


def tower_seconds(log: str) -> list[float]:
    """How long the vision tower took, each time, in a log with times (minutes.seconds.milliseconds.microseconds)."""
    found, began = list[float](), None
    for line in log.splitlines():
        if not (stamp := re.match(r"\D{0,8}(\d+)\.(\d\d)\.(\d{3})\.(\d{3}) ", line)):
            continue
        minutes, seconds, thousandths, millionths = map(int, stamp.groups())
        now = minutes * 60 + seconds + thousandths / 1e3 + millionths / 1e6
        if "encoding mtmd batch" in line:
            began = now
        elif "decoding image batch" in line and began is not None:
            found.append(now - began)
            began = None
    return found
