"""Runs the steps one after another, each under its limit, and writes down what each found as soon as it is known.

Files in the output folder: `STEP.json`, which the step itself writes anew with each finding, `STEP.log`, and
`report.json`, written anew after each step. A step that is killed leaves what it had found.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.gpu_steps.plan import TOTAL_S, Step

REPO = Path(__file__).resolve().parent.parent.parent
NEEDS_GPU = "skipped: needs a GPU"
END_S = 5.0
"""Between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Outcome:
    """`status`: passed, failed, `timed out` or `no time`. `found`: finding -> value, or an error, or why not."""

    name: str
    status: str
    seconds: float
    found: Mapping[str, Any]

    @property
    def skipped(self) -> list[str]:
        return [name for name, value in self.found.items() if value == NEEDS_GPU]

    @property
    def errors(self) -> list[str]:
        return [
            f"{name}: {value['error']}"
            for name, value in self.found.items()
            if isinstance(value, dict) and "error" in value
        ]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and on the disk."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def environment(out: Path) -> dict[str, str]:
    """Of the steps: this tree, the wheels beside it, and the compiler's artifacts in the folder, for all steps."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    mine = {name: str(out / "cache" / folder) for name, folder in caches.items()}
    paths = [str(REPO), str(out / "site"), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {
        **mine,
        **offline,
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def end_group(process: subprocess.Popen[bytes]) -> None:
    """The step and what it started: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            continue


def run_step(step: Step, out: Path, arguments: Sequence[str], limit_s: float) -> Outcome:
    """One process; whatever becomes of it, an outcome."""
    result = out / f"{step.name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.gpu_steps.step", step.work, "--result", str(result), *arguments]
    started = time.monotonic()
    with (out / f"{step.name}.log").open("wb") as log:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, cwd=REPO, env=environment(out), start_new_session=True, **streams)
        try:
            status = "passed" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            end_group(process)
    found = json.loads(result.read_text()) if result.exists() else {}
    return Outcome(step.name, status, time.monotonic() - started, found)


def run(steps: Sequence[Step], out: Path, arguments: Sequence[str], facts: Mapping[str, Any]) -> list[Outcome]:
    """All steps, in `TOTAL_S` altogether; the report is complete after each."""
    out.mkdir(parents=True, exist_ok=True)
    ends, outcomes = time.monotonic() + TOTAL_S, list[Outcome]()
    for step in steps:
        left_s = min(step.limit_s, ends - time.monotonic() - END_S)
        print(f"{step.name}: {step.proves} (up to {max(left_s, 0):.0f} s)", flush=True)
        outcome = run_step(step, out, arguments, left_s) if left_s > 0 else Outcome(step.name, "no time", 0.0, {})
        outcomes.append(outcome)
        write_json(out / "report.json", {**facts, "steps": [asdict(each) for each in outcomes]})
        print(f"    {outcome.status} in {outcome.seconds:.1f} s", flush=True)
    return outcomes


def line_of(value: Any) -> str:
    """A finding on one line."""
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {line_of(each)}" for name, each in value.items())
    return str(value)


def table(outcomes: Sequence[Outcome]) -> str:
    """Steps, and below each what it found."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.name:10} {outcome.status:10} {outcome.seconds:7.1f} s")
        lines += [f"    {name:34} {line_of(value)[:200]}" for name, value in outcome.found.items()]
    counts = {status: sum(each.status == status for each in outcomes) for status in ("passed", "failed", "timed out")}
    skipped = sum(len(outcome.skipped) for outcome in outcomes)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return "\n".join([*lines, f"{len(outcomes)} steps: {summary}; {skipped} findings {NEEDS_GPU}"])
