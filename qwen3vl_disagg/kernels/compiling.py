"""What `torch.compile` needs, whatever is compiled: counts of graphs, turns between processes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3vl_disagg.kernels.build import load


@dataclass(frozen=True)
class GraphCounts:
    """What the compiler has made in this process so far."""

    graphs: int
    breaks: int

    @staticmethod
    def now() -> GraphCounts:
        from torch._dynamo.utils import counters

        return GraphCounts(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))

    def since(self, before: GraphCounts) -> GraphCounts:
        return GraphCounts(self.graphs - before.graphs, self.breaks - before.breaks)


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[None]:
    """Of the processes on one machine that compile `what`, the first does it alone; those that come later find what it
    made, and load it side by side. A mark among the compiler's artifacts says that they are there, so it goes with
    them. The lock goes with the process that holds it.
    """
    facts = (what, sources_digest(), load() is not None, torch.__version__, sorted(compile_options().items()))
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    mark = folder / f"qwen3vl-disagg-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
    if mark.exists():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with mark.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.exists():
            fcntl.flock(lock, fcntl.LOCK_UN)
        yield
        mark.touch()


@functools.cache
def sources_digest() -> str:
    """Of the code that is compiled."""
    kernels = Path(__file__).parent
    sources = sorted((kernels.parent / "model").glob("*.py")) + sorted(kernels.rglob("*.*"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources if path.suffix != ".pyc")).hexdigest()


def compile_options() -> dict[str, str | int | bool | Callable[..., Any]]:
    """Of the compiler. Artifacts name their number of threads, or one with another number would find and take them."""
    return {"cpp.threads": torch.get_num_threads()}
