"""Run with a free environment: the hub's client reads its settings once, when it is imported.

One JSON object a line on stdin (`model`, `weights`, `env`, `num_ranks`), one on stdout for each rank: `folder` or
`error` and `kind`, `stderr`, `rank`, `is_clean`. Each is done in a fork of this process, which has the heavy imports
and not yet the client. With ranks, they are the workers of a host, this process is their agent, and the first of them
lives until the others have answered.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class HubClient:
    """Asks a process of this module, with `env` over an environment that knows no hub."""

    def __init__(self, folder: Path) -> None:
        root = Path(__file__).parent.parent.parent
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFOR"))}
        self.env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "TMPDIR": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hub_client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**env, "HOME": str(folder), "PYTHONPATH": f"{root}:{env.get('PYTHONPATH', '')}"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def ask(self, model: str, *, weights: bool = True, num_ranks: int = 0, **env: str) -> list[dict[str, Any]]:
        """The answers by rank; without ranks, one. HF_ENDPOINT is nobody's by default."""
        question = {"model": model, "weights": weights, "num_ranks": num_ranks, "env": {**self.env, **env}}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answers = [json.loads(self._process.stdout.readline()) for _ in range(max(1, num_ranks))]
        return sorted(answers, key=lambda answer: answer["rank"])


def _answer(model: str, weights: bool, num_ranks: int, env: Mapping[str, str], rank: int) -> dict[str, Any]:
    from qwen3vl_disagg.checkpoint.download import resolve_model_folder
    from qwen3vl_disagg.cluster.model_folder import shared_model_folder
    from qwen3vl_disagg.cluster.rendezvous import World
    from qwen3vl_disagg.core.logs import start_logging

    start_logging()
    os.environ |= env
    with tempfile.TemporaryFile("w+") as log:
        os.dup2(log.fileno(), 2)
        try:
            if num_ranks:
                os.environ |= {"TORCHELASTIC_RUN_ID": "test"}
                world = World(rank, num_ranks, rank, num_ranks, has_agent=True)
                folder = str(shared_model_folder(model, world))
            else:
                folder = str(resolve_model_folder(model, weights=weights))
            outcome: dict[str, Any] = {"folder": folder}
        except Exception as error:  # also what should have been a DisaggError: whoever asks must not wait for ever
            outcome = {"error": str(error), "kind": type(error).__name__}
        sys.stderr.flush()
        log.seek(0)
        is_clean = "huggingface_hub" not in sys.modules and threading.active_count() == 1
        return {**outcome, "stderr": log.read(), "rank": rank, "is_clean": is_clean}


def main() -> None:
    for name in ("httpx", "httpx2", "yaml", "qwen3vl_disagg.cluster.model_folder"):
        with contextlib.suppress(ModuleNotFoundError):  # which of the two depends on the client's version
            importlib.import_module(name)
    for line in sys.stdin:
        question = json.loads(line)
        reading, writing = os.pipe()
        pids = []
        for rank in range(max(1, question["num_ranks"])):
            pids.append(os.fork())
            if pids[-1] == 0:
                os.close(writing)
                os.write(1, (json.dumps(_answer(**question, rank=rank)) + "\n").encode())
                if rank == 0:
                    os.read(reading, 1)  # until the agent closes its end
                os._exit(0)
        os.close(reading)
        for pid in pids[1:]:
            os.waitpid(pid, 0)
        os.close(writing)
        os.waitpid(pids[0], 0)


if __name__ == "__main__":
    main()
