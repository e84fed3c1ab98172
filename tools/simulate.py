"""Run the transfer's state machines under a virtual clock and network, with faults, and check every invariant.

    python tools/simulate.py --schedules 10000 --seed 7
    python tools/simulate.py --schedules 1000 --seed 7 --table --json
    python tools/simulate.py --mutant list
    python tools/simulate.py --schedules 1000 --seed 0 --mutant double-free

Ends with status 0 when clean, 1 at the first violation, with the line that replays it, 2 for bad arguments.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen3vl_disagg.core.errors import DisaggError, InputError, report
from tools.simulation.runner import fault_table, mutant_names, simulate


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    schedules: int = 1000
    """How many fault schedules to run."""
    seed: int = 0
    first: int = 0
    """Number of the first schedule, to replay one."""
    mutant: str | None = None
    """Plant this bug first; `list` names them all."""
    table: bool = False
    """Print how often each fault hit a session in each state, as a Markdown table."""
    json: bool = False
    """Print one JSON object in place of text."""


def main() -> int:
    options = tyro.cli(SimulateOptions, description=__doc__)
    try:
        return _run(options)
    except DisaggError as error:
        return report(error)


def _run(options: SimulateOptions) -> int:
    if options.schedules < 1 or options.first < 0:
        raise InputError("--schedules must be at least 1 and --first at least 0", param="schedules")
    if options.mutant == "list":
        print("\n".join(mutant_names()))
        return 0
    with tqdm(total=options.schedules, unit="schedule", disable=not sys.stderr.isatty()) as bar:
        result = simulate(options.schedules, options.seed, options.mutant, first=options.first, on_progress=bar.update)
    rate = result.events / max(result.seconds, 1e-9)
    figures: dict[str, Any] = {
        "schedules": result.schedules,
        "events": result.events,
        "violations": 0 if result.violation is None else 1,
        "events_per_second": round(rate),
    }
    if result.others:
        passed_over = ", ".join(f"{name} {count} times" for name, count in sorted(result.others.items()))
        print(f"passed over, as this bug does not name them: {passed_over}", file=sys.stderr)
    if result.violation is not None:
        print(f"violation: {result.violation.violation}\nreplay: {result.replay}", file=sys.stderr)
        figures |= {"violation": result.violation.violation, "replay": result.replay}
    if options.table:
        print(fault_table(result))
    if options.json:
        print(msgspec.json.encode(figures).decode())
    else:
        print(
            f"{result.schedules} schedules, {result.events} events, {figures['violations']} violations, "
            f"{rate:,.0f} events/s; {result.answered} requests answered, {result.failed} ended with a typed error"
        )
    return 0 if result.violation is None else 1


if __name__ == "__main__":
    sys.exit(main())
