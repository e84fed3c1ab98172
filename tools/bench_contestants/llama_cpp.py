"""llama.cpp, by the server of a build that the user names, on the checkpoint as its own converter writes it.

Prompts are token ids, all requests of a batch one HTTP request whose answer streams the tokens of all. No prompt is
kept. The vision tower is timed by the server's log, from its line before the tower to its line after it.
"""

from __future__ import annotations

import atexit
import base64
import io
import json
import math
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_disagg.launch.trace import direct
from tools.bench_contestants.llama_build import LlamaBuildError, command, convert, tower_seconds
from tools.bench_contestants.worker import Setup, serve
from tools.bench_served import free_port

READY_S, ANSWER_S, LEAVE_S = 600.0, 900.0, 10.0
LEAST_TOKENS = 2048
"""Room of a request, so that short prompts are measured beside an image."""
LOG_S = 5.0
"""The log is written by a thread of its own: an answer may be there before the lines about it."""


class LlamaCpp:
    def __init__(self, setup: Setup) -> None:
        if setup.is_random or setup.device != "cpu":
            raise LlamaBuildError("llama.cpp takes part on the CPU, with weights from a folder")
        self._folder = tempfile.TemporaryDirectory(prefix="bench-llama-")
        folder, build, self._port = Path(self._folder.name), Path(setup.llama_cpp), free_port()
        convert(build, Path(setup.folder), folder)
        self._log = folder / "server.log"
        line = command(build, folder, self._port, setup.max_batch, max(setup.max_tokens, LEAST_TOKENS))
        line += ["--threads", str(setup.threads), "--cache-ram", "0"]
        # As anonymous memory, as the others hold their weights; with the lines that time the tower.
        line += ["--load-mode", "none", "--verbosity", "4", "--log-timestamps", "--log-colors", "off"]
        with self._log.open("w") as log:
            self._server = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
        atexit.register(self.close)
        self._wait_ready()
        with self._open("props") as answer:
            self._version = json.load(answer)["build_info"]

    def close(self) -> None:
        """End the server; nothing of it stays."""
        self._server.terminate()
        try:
            self._server.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._folder.cleanup()

    def facts(self) -> dict[str, Any]:
        return {"llama.cpp": self._version}

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        stamps: list[list[float]] = [[] for _ in prompts]
        request = {"prompt": prompts, "n_predict": new_tokens, "stream": True, "ignore_eos": True}
        greedy = {"samplers": ["top_k"], "top_k": 1}
        for now, event in self._events({**request, **greedy, "cache_prompt": False}):
            times = stamps[event["index"]]
            times += [now] * (event["tokens_predicted"] - len(times))
        if any(len(times) != new_tokens for times in stamps):
            raise RuntimeError(f"asked for {new_tokens} tokens of each prompt, got {list(map(len, stamps))}")
        return stamps

    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        return self.decode([prompt], 1)[0][0] - started

    def vision(self, grid: tuple[int, int, int], patch_dim: int, seed: int) -> float:
        side = math.isqrt(patch_dim // 6)  # 3 channels, 2 frames
        pixels = np.random.default_rng(seed).integers(0, 256, (grid[1] * side, grid[2] * side, 3), dtype=np.uint8)
        out, before = io.BytesIO(), self._log.stat().st_size
        Image.fromarray(pixels).save(out, "PNG")
        url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}]
        request = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "cache_prompt": False}
        with self._open("v1/chat/completions", request) as answer:
            answer.read()
        end = time.monotonic() + LOG_S
        while not (found := tower_seconds(self._log.read_bytes()[before:].decode(errors="replace"))):
            if time.monotonic() > end:
                raise RuntimeError("the server's log has no times of the vision tower")
            time.sleep(0.05)
        return sum(found)

    def _events(self, request: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """What the server streams, and when it came."""
        with self._open("completion", request) as answer:
            for line in answer:
                now = time.perf_counter()
                if line.startswith(b"error: "):
                    raise RuntimeError(line.decode(errors="replace"))
                if line.startswith(b"data: {"):
                    event = json.loads(line[len(b"data: ") :])
                    if "error" in event:
                        raise RuntimeError(f"the server answered {event['error']}")
                    yield now, event

    def _open(self, path: str, request: dict[str, Any] | None = None) -> HTTPResponse:
        """A connection for each: the server closes those that are idle."""
        data = None if request is None else json.dumps(request).encode()
        head = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"http://127.0.0.1:{self._port}/{path}", data, head)
        return direct.open(asked, timeout=ANSWER_S)

    def _wait_ready(self) -> None:
        end = time.monotonic() + READY_S
        while True:
            try:
                return self._open("health").close()
            except OSError:
                if self._server.poll() is not None or time.monotonic() > end:
                    raise LlamaBuildError(f"llama-server is not ready:\n{self._log.read_text()[-2000:]}") from None
                time.sleep(0.2)


if __name__ == "__main__":
    serve(LlamaCpp)
