"""Kernels of the published models for sm_90, compiled without a GPU: `python -m tools.gpu_compile.command`.

Each model is compiled in a process of its own, with the Triton kernels of the expert layer and without them. The table
has the launches of a layer in a step (docs/gpu_check.md); exit status 1 if a kernel needs more shared memory than
a block can have. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

LIMIT_S = 560.0


def compile_here(model: str) -> None:
    """The child: a line of JSON for each step."""
    from tools.gpu_compile.pretend import have_an_h200

    have_an_h200()
    from tools.gpu_compile.layers import make

    for made in make(model):
        print(json.dumps(made.to_json()), flush=True)


def compiled(model: str, *, has_kernels: bool, limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
    """What a child made of a model. RuntimeError with the end of its words if it does not come to its end."""
    command = [sys.executable, "-m", "tools.gpu_compile.command", "--child", model]
    env = {**os.environ, "Q3VL_KERNELS": "on" if has_kernels else "off"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{model}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    lines = ["| model | tokens | launches before | after | largest shared memory | of |", "|---|---|---|---|---|---|"]
    for old, new in zip(before, after, strict=True):
        most = max(old, new, key=lambda made: made["shared"])
        shared = f"{most['shared'] / 1024:.1f} KiB | `{most['shared_name'][:40]}`"
        counts = f"{old['num_launches']} | {new['num_launches']}"
        lines.append(f"| {new['model']} | {new['step']} | {counts} | {shared} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["30b-a3b"], help="presets; NAME/8: the experts of one of 8 ranks")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--names", action="store_true", help="also what is launched, by name")
    options = parser.parse_args(arguments)
    if options.child:
        compile_here(options.models[0])
        return 0
    fits = True
    for model in options.models:
        before, after = (compiled(model, has_kernels=has_kernels) for has_kernels in (False, True))
        print(table(before, after), flush=True)
        if options.names:
            print(json.dumps([made["launches"] for made in (*before, *after)], indent=1))
        fits &= all(made["shared"] <= 227 * 1024 for made in (*before, *after))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
