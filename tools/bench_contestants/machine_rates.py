"""No contestant but the machine: how fast its memory is read and how fast it multiplies, in the same rounds.

Reading has no single best way in PyTorch, so several take part and the fastest counts; all of them sum up or multiply
a buffer much larger than any cache, and write next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qwen3vl_disagg.model.kernels import use_kernels
from qwen3vl_disagg.model.layers import Linear
from tools.bench_contestants.worker import Setup, serve

REPEATS = 3
DEPTH = 4096


class Machine:
    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self.device = torch.device(setup.device)
        on_gpu = self.device.type == "cuda"
        self.num_bytes, side = (1 << 32, 8192) if on_gpu else (1 << 29, 2048)
        self.words = torch.ones(self.num_bytes // 4, device=self.device)
        with torch.device("meta"):
            self.linear = Linear(DEPTH, self.num_bytes // 2 // DEPTH)
        rows = self.words.view(torch.bfloat16).view(-1, DEPTH)
        self.linear.weight = nn.Parameter(rows, requires_grad=False)
        use_kernels(self.linear)
        self.factors = {
            str(dtype).removeprefix("torch."): torch.randn(side, side, device=self.device).to(dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    @torch.inference_mode()
    def rates(self) -> dict[str, float]:
        """The best of a few repeats of each: GB/s by way of reading, GFLOP/s by dtype."""
        words = self.words
        longs, one = words.view(torch.int64), torch.ones(1, DEPTH, dtype=torch.bfloat16, device=self.device)
        ways: dict[str, Callable[[], Any]] = {
            "read sum float32": words.sum,
            "read sum int64": longs.sum,
            "read dot": lambda: torch.dot(words, words),
            "read matvec bfloat16": lambda: self.linear(one),
        }
        found = {name: self.num_bytes / self._least_seconds(way) / 1e9 for name, way in ways.items()}
        for name, matrix in self.factors.items():
            flop = 2 * len(matrix) ** 3
            found[f"matmul {name}"] = flop / self._least_seconds(lambda matrix=matrix: matrix @ matrix) / 1e9  # type: ignore[misc]
        return found

    def _least_seconds(self, work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)


if __name__ == "__main__":
    serve(Machine)
