"""Weight bytes and private memory of each process of a running server (started with --debug, on this machine).

python tools/rank_memory.py --url http://127.0.0.1:8000 [--model DIR]
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.core.settings import DTYPES, resolve_model_folder
from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack, Qwen3VLMoeForConditionalGeneration


@dataclass(frozen=True)
class Options:
    """Show what each process holds."""

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    """The checkpoint that the server was started with."""


def private_bytes(pid: int) -> int:
    """RssAnon of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def weight_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def main(options: Options) -> None:
    config = read_config(resolve_model_folder(options.model))
    dtype = DTYPES[config.dtype]
    with torch.device("meta"):
        weights = {
            "encode": weight_bytes(Qwen3VLMoeForConditionalGeneration(config, language_model=False), dtype),
            "language": weight_bytes(Qwen3MoeForCausalLMWithDeepStack(config), dtype),
        }
    with urllib.request.urlopen(options.url + "/debug/processes", timeout=10) as response:
        processes = json.load(response)["processes"]
    print("| process | weights | private memory (RssAnon) |\n|---|---|---|")
    for entry in sorted(processes, key=lambda entry: (entry["role"], entry.get("rank", 0))):
        name = " ".join(str(entry[key]) for key in ("role", "rank") if key in entry)
        held = f"{weights[entry['role']] / 1e6:.2f} MB" if entry["role"] in weights else "none"
        print(f"| {name} | {held} | {private_bytes(entry['pid']) / 1e6:.0f} MB |")


if __name__ == "__main__":
    main(tyro.cli(Options))
