"""Weight bytes and private memory of each process of a running server (started with --debug, on this machine).

python tools/rank_memory.py --url http://127.0.0.1:8000
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from qwen3vl_disagg.launch.trace import direct


@dataclass(frozen=True)
class Options:
    """Show what each process holds: weights as it says itself, private memory as the kernel does."""

    url: str = "http://127.0.0.1:8000"


def private_bytes(pid: int) -> int:
    """RssAnon of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def main(options: Options) -> None:
    with direct.open(options.url + "/debug/processes", timeout=10) as response:
        processes = json.load(response)["processes"]
    print("| process | bytes of weights | private memory (RssAnon) |\n|---|---|---|")
    for entry in sorted(processes, key=lambda entry: (entry["role"], entry.get("rank", 0))):
        name = " ".join(str(entry[key]) for key in ("role", "rank") if key in entry)
        held = f"{entry['weight_bytes']:,}" if "weight_bytes" in entry else "none"
        print(f"| {name} | {held} | {private_bytes(entry['pid']) / 1e6:.0f} MB |")


if __name__ == "__main__":
    main(tyro.cli(Options))
