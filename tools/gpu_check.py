"""What a machine with a GPU has to show, in ten minutes and one command: `python tools/gpu_check.py --out DIR`.

Steps run one after another, each a process with a limit of its own, and `DIR/report.json` is complete after each; at
the end comes a table. `--dry-run` rehearses all of it on the CPU with a small model: what needs a GPU says so. Standard
library alone until the wheels are installed. docs/gpu_check.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.gpu_steps.plan import chosen
from tools.gpu_steps.runner import run, table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the report; default: a new one")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a small model")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder with the wheels that this machine lacks")
    parser.add_argument("--only", default="", metavar="STEP,..", help="these steps alone")
    options = parser.parse_args(arguments)
    try:
        steps = chosen(options.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels {options.wheels}: no such folder")
    out = (options.out or Path(tempfile.mkdtemp(prefix="gpu-check-"))).resolve()
    passed_on = ["--dry-run"] * options.dry_run
    passed_on += [] if options.wheels is None else ["--wheels", str(options.wheels.resolve())]
    facts = {"at": time.strftime("%Y-%m-%d %H:%M:%S"), "host": platform.node(), "is_dry_run": options.dry_run}
    outcomes = run(steps, out, passed_on, facts)
    print(table(outcomes))
    print(f"{out / 'report.json'}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
