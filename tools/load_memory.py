"""What loading by slices reads and holds: a large checkpoint made on the spot, loaded as ranks side by side.

    python tools/load_memory.py --folder /tmp/large [--ranks 4] [--layers 4] [--quantize int8]

The checkpoint has the sizes of 30B-A3B with fewer layers. It is written if the folder is not there yet (4 layers: about
6.5 GB), and left behind. Each rank is a process of its own, as under torchrun, and holds its experts as it does when it
serves; its memory is what the kernel counts, looked at every few milliseconds. Exit status 1 if a rank held more than
1.2 of its shard and 1 GiB. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen3vl_disagg.checkpoint import Checkpoint, ExpertLayout, load, load_language_model, open_checkpoint
from qwen3vl_disagg.checkpoint.layouts import checkpoint_name
from qwen3vl_disagg.core.devices import DTYPES
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.parallel.expert_parallel import ExpertShards
from qwen3vl_disagg.plan.presets import PRESETS
from qwen3vl_disagg.transport.gloo import expert_mesh
from tools.checkpoints import write_checkpoint

SAMPLE_S = 0.002
MEET_S = 120.0
FACTOR, EXTRA = 1.2, 2**30
"""A rank's private memory may be as much as this times its shard, and this much."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure loading by slices."""

    folder: Path
    """Where the checkpoint is, or is to be."""
    ranks: int = 4
    layers: int = 4
    """Decoder layers of a checkpoint to be written, 3 at least."""
    layout: ExpertLayout = "hub"
    """How its experts are stored."""
    quantize: Literal["none", "int8"] = "none"
    rank: int | None = None
    """Load as this rank and print one JSON line: what is run for each of them."""
    store: Path | None = None
    """With --rank: the file by which the ranks meet."""


class RandomWeights(Mapping[str, Tensor]):
    """Published names -> random weights, each made when it is looked up."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            model = Qwen3VLMoeForConditionalGeneration(config)
        self._shapes = {checkpoint_name(name): parameter.shape for name, parameter in model.named_parameters()}
        self._dtype = DTYPES[config.dtype]
        self._generator = torch.Generator().manual_seed(0)

    def __getitem__(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], dtype=self._dtype).normal_(std=0.02, generator=self._generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@dataclass
class Peak:
    """The most bytes that a process had: `private` (RssAnon) and `mapped` pages of files (RssFile)."""

    private: int = 0
    mapped: int = 0

    def look(self, pid: int) -> None:
        """Look at the process once more; one that has ended has nothing."""
        sizes = memory_of(pid)
        self.private, self.mapped = max(self.private, sizes.private), max(self.mapped, sizes.mapped)


def memory_of(pid: int) -> Peak:
    """What a process has now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (li.partition(":") for li in lines) if "Rss" in name
    }
    return Peak(sizes.get("RssAnon", 0), sizes.get("RssFile", 0))


def large_config(layers: int) -> ModelConfig:
    """30B-A3B with fewer layers, and hardly a vision tower: language ranks do not read it."""
    config = PRESETS["30b-a3b"]
    return replace(
        config,
        text=replace(config.text, num_hidden_layers=layers),
        vision=replace(config.vision, depth=3, deepstack_visual_indexes=(0, 1, 2)),
    )


def load_as_rank(options: Options, rank: int) -> dict[str, float]:
    """Load, and say what that took."""
    opened: list[Checkpoint] = []

    def remember(folder: Path) -> Checkpoint:
        opened.append(open_checkpoint(folder))
        return opened[-1]

    torch.set_num_threads(1)
    store = dist.FileStore(str(options.store), options.ranks)
    mesh = expert_mesh(store, rank, options.ranks, host="127.0.0.1", device=torch.device("cpu"), timeout_s=MEET_S)
    before, start = memory_of(os.getpid()), time.monotonic()
    with mock.patch.object(load, "open_checkpoint", remember):
        model = load_language_model(options.folder, quantize=options.quantize, shards=ExpertShards(mesh))
    seconds = time.monotonic() - start
    dist.destroy_process_group()
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    return {
        "shard": sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors),
        "bytes_read": opened[0].bytes_read,
        "before": before.private,
        "seconds": seconds,
    }


def measure(options: Options) -> list[dict[str, float]]:
    """Load in all ranks at once; what each of them said, and its peaks."""
    command = [sys.executable, __file__, "--folder", str(options.folder), "--ranks", str(options.ranks)]
    command += ["--quantize", options.quantize]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--store", f"{folder}/store", "--rank"]
        return _watch([[*command, str(rank)] for rank in range(options.ranks)])


def _watch(commands: list[list[str]]) -> list[dict[str, float]]:
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    peaks = [Peak() for _ in ranks]
    while running := [(process, peak) for process, peak in zip(ranks, peaks, strict=True) if process.poll() is None]:
        for process, peak in running:
            peak.look(process.pid)
        time.sleep(SAMPLE_S)
    results: list[dict[str, float]] = []
    for process, peak in zip(ranks, peaks, strict=True):
        said, _ = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"rank {len(results)} ended with status {process.returncode}")
        results.append(json.loads(said) | {"private": peak.private, "mapped": peak.mapped})
    return results


def table(results: list[dict[str, float]]) -> str:
    """For people, in MiB."""
    lines = [
        "| rank | own shard | bytes read | file pages touched | private before | private peak | limit | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rank, result in enumerate(results):
        sizes = [result[name] for name in ("shard", "bytes_read", "mapped", "before", "private")]
        cells = [f"{size / 2**20:,.0f}" for size in [*sizes, limit(result)]]
        lines.append(f"| {rank} | {' | '.join(cells)} | {result['seconds']:.1f} |")
    return "\n".join(lines)


def limit(result: dict[str, float]) -> float:
    """The most private memory that a rank may have."""
    return FACTOR * result["shard"] + EXTRA


def main(options: Options) -> int:
    if options.rank is not None:
        print(json.dumps(load_as_rank(options, options.rank)))
        return 0
    if not options.folder.exists():
        config, start = large_config(options.layers), time.monotonic()
        write_checkpoint(
            options.folder, config, RandomWeights(config), layout=options.layout, num_shards=2 * options.layers + 2
        )
        print(f"written in {time.monotonic() - start:.0f} s")
    with open_checkpoint(options.folder) as checkpoint:
        sizes = [info.num_bytes for info in checkpoint.tensors.values()]
        files = len({info.file for info in checkpoint.tensors.values()})
    print(f"{options.folder}: {sum(sizes):,} bytes in {files} files; {options.ranks} ranks, in MiB:\n")
    results = measure(options)
    print(table(results))
    return int(any(result["private"] > limit(result) for result in results))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
