"""Is it right? The tests that are marked for a GPU, and the commands of the README with the small checkpoint."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.gpu_steps.runner import REPO
from tools.gpu_steps.step import Check

ONE_PAGE_SIZE = "not test_against_sdpa or 32-4-128-64"
"""Of FlexAttention's tests: compiling all sizes would take minutes."""
TESTS_S, READY_S, ANSWER_S = 70.0, 45.0, 20.0


def marked_tests(check: Check) -> None:
    """In a process, since pytest wants one; without a GPU they are collected and skip."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-n0", "-q", "-p", "no:cacheprovider"]
    command += ["-k", ONE_PAGE_SIZE]
    if check.is_dry:
        command.append("--collect-only")
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=TESTS_S, stdin=subprocess.DEVNULL, check=False
    )
    print(done.stdout[-20_000:], done.stderr[-5_000:], flush=True)
    lines = done.stdout.strip().splitlines()
    check.say(pytest=lines[-1] if lines else done.stderr[-200:])
    if done.returncode != 0:
        raise RuntimeError(f"pytest ended with {done.returncode}: {[x for x in lines if x.startswith('FAILED')][:9]}")
    check.needs_gpu("tests_run")


def small_checkpoint(check: Check) -> None:
    """`LLM()` and one rank that serves: the same picture, the same words."""
    from qwen3vl_disagg import LLM
    from qwen3vl_disagg.assets.drawing import draw_scene
    from qwen3vl_disagg.assets.scenes import random_scene
    from qwen3vl_disagg.core.requests import SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "scene.png"
        draw_scene(random_scene(random.Random(1)), (96, 96), random.Random(1)).save(picture)
        question, sampling = "How many shapes are there?", SamplingParams(max_new_tokens=12, temperature=0.0)
        started = time.monotonic()
        llm = LLM(device=check.device)
        loaded = time.monotonic()
        content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": question}]
        [result] = llm.chat([[{"role": "user", "content": content}]], sampling)
        check.say(llm={"load_s": loaded - started, "answer_s": time.monotonic() - loaded}, answer=result.text)
        with check.part("server"):
            served(check, picture, question, result.text)


def served(check: Check, picture: Path, question: str, expected: str) -> None:
    """The server of the README on one rank: an answer as a stream and one whole, both as `LLM` gave it."""
    from tools.bench_served import Served
    from tools.http_client import build_body, events, post

    body = build_body(question, [picture], [], max_tokens=12, temperature=0.0)
    started = time.monotonic()
    with Served(1, ["--device", check.device], ready_s=READY_S) as server:
        ready = time.monotonic()
        url = f"http://127.0.0.1:{server.port}"
        pieces: list[str] = []
        for event in events(post(url, {**body, "stream": True}, ANSWER_S)):
            pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
        streamed = "".join(pieces)
        check.say(server={"ready_s": ready - started, "stream_s": time.monotonic() - ready, "pieces": len(pieces)})
    if streamed != expected:
        raise RuntimeError(f"the server answers {streamed!r}, LLM {expected!r}")
