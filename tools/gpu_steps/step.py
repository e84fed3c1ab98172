"""One step, in its process: `python -m tools.gpu_steps.step MODULE:FUNCTION --result FILE [--dry-run] [--wheels DIR]`.

A step is a function that gets a `Check`. What it finds it says at once; what goes wrong in a part of it is found, too,
and the parts after it still run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_steps.runner import NEEDS_GPU, write_json


@dataclass
class Check:
    """`is_dry`: on the CPU, with a small model. `result`: where findings are written, anew with each of them."""

    result: Path
    is_dry: bool
    wheels: Path | None = None
    found: dict[str, Any] = field(default_factory=dict)
    errors: int = 0

    @property
    def out(self) -> Path:
        """The folder of all steps."""
        return self.result.parent

    @property
    def device(self) -> str:
        return "cpu" if self.is_dry else "cuda"

    def say(self, **findings: Any) -> None:
        self.found |= findings
        for name, value in findings.items():
            print(f"{name}: {value}", flush=True)
        write_json(self.result, self.found)

    def needs_gpu(self, name: str) -> bool:
        """Whether the part goes on; on the CPU it ends here, and that is said."""
        if self.is_dry:
            self.say(**{name: NEEDS_GPU})
        return not self.is_dry

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What fails in it is noted, with its place in the log, and costs the step its success and nothing else."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.errors += 1
            self.say(**{name: {"error": f"{type(error).__name__}: {str(error)[:500]}"}})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--wheels", type=Path)
    options = parser.parse_args(arguments)
    check, started = Check(options.result, options.dry_run, options.wheels), time.monotonic()
    module, _, function = options.work.partition(":")
    check.say()
    with check.part("step"):
        where = module if "." in module else f"tools.gpu_steps.{module}"
        getattr(importlib.import_module(where), function)(check)
    check.say(inside_s=round(time.monotonic() - started, 2))
    return 1 if check.errors else 0


if __name__ == "__main__":
    sys.exit(main())
