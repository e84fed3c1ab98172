"""A server whose ranks have a simulated GPU each: the real processes, links and frames."""

from __future__ import annotations

import sys

import pytest

from tests.simcuda.test_tokens import conversations, expected
from tests.support.server import Server, free_port

SCRIPT = "tests.support.simcuda_serve"


@pytest.mark.acceptance
@pytest.mark.parametrize("world", [1, 2])
def test_answers_are_those_of_the_cpu(world):
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={free_port()}"]
    command = [sys.executable, "-m", SCRIPT] if world == 1 else [*agent, "-m", SCRIPT]
    options = ["--device", "cuda", "--kv-cache-gib", "0.005", "--max-running", "4", "--blocks", "4"]
    with Server(world, *options, command=command) as server:
        for messages, ids in zip(conversations(), expected("float32", "none"), strict=True):
            request = {"messages": messages, "max_tokens": 12, "temperature": 0.0, "return_token_ids": True}
            status, answer = server.post("/v1/chat/completions", request)
            assert status == 200, answer
            assert answer["choices"][0]["token_ids"] == ids
    assert server.output().count("simulated: problems []") == world, server.output()
