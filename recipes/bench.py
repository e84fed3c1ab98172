"""Measure this machine and this checkout; the ceiling first, one JSON line last.

    python recipes/bench.py transfer [--megabytes 1 4 16 64] [--rounds 40] [--json]
    python recipes/bench.py overlap [--rounds 5] [--picture overlap.png]
    python recipes/bench.py engine [--vllm-python PYTHON] [--llama-cpp DIR] [--rounds 5] [--picture DIR]
    python recipes/bench.py host [--contexts 1024 32768 131072] [--sequences 32]
    python recipes/bench.py grammars [--batch 8] [--bound 0 4]
    python recipes/bench.py gaps [--rounds 2] [--picture DIR]
    python recipes/bench.py burst [--picture FILE.png]
    python recipes/bench.py road [--rounds 3] [--other NAME=COMMAND] [--llama-cpp DIR]
    python recipes/bench.py order [--rounds 3] [--model DIR]
    python recipes/bench.py repeat [--rounds 7]
    python recipes/bench.py pooling [--vllm-python PYTHON] [--rounds 5]
    python recipes/bench.py start [--ranks 8] [--rounds 2]
    python recipes/bench.py parallel [--model DIR] [--ranks 1 2 3 6]
    python recipes/bench.py watch [--rounds 7] [--model DIR]
    python recipes/bench.py overload [--seconds 600] [--model DIR]
    python recipes/bench.py splits [--model DIR] [--splits 1+1 1+3 2+4] [--out FILE.json]

docs/benchmarks.md
have figures and say how to read them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen3vl_disagg.core.errors import InputError, report
from tools.bench_burst import burst_of_images
from tools.bench_engine import engine
from tools.bench_gaps import gaps_under_load
from tools.bench_grammars import grammars
from tools.bench_host import host
from tools.bench_order import order
from tools.bench_overlap import overlap
from tools.bench_overload import overloaded
from tools.bench_parallel import parallel
from tools.bench_pooling import pooling
from tools.bench_repeat import repeat
from tools.bench_road import road
from tools.bench_split import splits
from tools.bench_start import start
from tools.bench_transfer import transfer
from tools.bench_watch import what_watching_costs

SUBCOMMANDS: dict[str, Callable[..., Any]] = {
    "transfer": transfer,
    "overlap": overlap,
    "engine": engine,
    "host": host,
    "grammars": grammars,
    "gaps": gaps_under_load,
    "burst": burst_of_images,
    "road": road,
    "order": order,
    "repeat": repeat,
    "pooling": pooling,
    "start": start,
    "parallel": parallel,
    "splits": splits,
    "watch": what_watching_costs,
    "overload": overloaded,
}


def main() -> None:
    app = tyro.extras.SubcommandApp()
    for name, function in SUBCOMMANDS.items():
        app.command(name=name)(function)
    try:
        app.cli(description=__doc__)
    except InputError as error:
        sys.exit(report(error))


if __name__ == "__main__":
    main()
