"""What compiling needs, whatever is compiled: counts of graphs, turns between processes, the tower's block."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters

from qwen3vl_disagg.kernels.build import cache_folder
from qwen3vl_disagg.model.vision import VisionTower


@dataclass(frozen=True)
class GraphCounts:
    """What the compiler has made in this process so far."""

    graphs: int
    breaks: int

    @staticmethod
    def now() -> GraphCounts:
        return GraphCounts(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))

    def since(self, before: GraphCounts) -> GraphCounts:
        return GraphCounts(self.graphs - before.graphs, self.breaks - before.breaks)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Processes on one machine take turns at compiling: those that come later find what the first one made. The lock
    goes with the process that holds it."""
    path = cache_folder() / "compile.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_options() -> dict[str, str | int | bool | Callable[..., Any]]:
    """Of the compiler. Artifacts name their number of threads, or one with another number would find and take them."""
    return {"cpp.threads": torch.get_num_threads()}


@torch.inference_mode()
def compile_tower(tower: VisionTower) -> GraphCounts:
    """Compile the tower's block in place, and run it once: one graph serves every block, number and size of images."""
    before = GraphCounts.now()
    tower._step = torch.compile(  # type: ignore[method-assign]
        tower._step, fullgraph=True, dynamic=True, options=compile_options()
    )
    merge, weight = tower.config.spatial_merge_size, tower.patch_embed.proj.weight
    grids = [(1, 3 * merge, 2 * merge), (1, merge, merge)]
    pixels = torch.zeros(sum(h * w for _, h, w in grids), tower.config.patch_dim, device=weight.device)
    with one_at_a_time():
        tower(pixels, grids)
    return GraphCounts.now().since(before)
