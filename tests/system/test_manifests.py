"""What the pods of the manifests, and the batches, run is run here, all on loopback: it serves, encode ranks join and
leave, and it ends well."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.deploy import DEPLOY, manifests, shell_line, values_of
from tests.support.http import post_json, request
from tests.support.server import Job, free_port

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(200)]
SECRETS = {"Q3VL_TOKEN": "what ranks show one another", "Q3VL_API_KEY": "a-key-of-clients"}
BIN = str(Path(sys.executable).parent)
FAKE_SRUN = """#!/usr/bin/env bash
# As srun does: the command, once for each node.
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM "${pids[@]}"' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
done
"""


def ask(url: str) -> int:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    return post_json(f"{url}/v1/chat/completions", body, headers={"x-api-key": SECRETS["Q3VL_API_KEY"]}).status


def pod(name: tuple[str, str], ports: Mapping[str, str], env: Mapping[str, str]) -> Job:
    """What a pod of the workload runs, with other ports and addresses."""
    entry = manifests()[name]
    line = shell_line(entry)
    for port, free in ports.items():
        line = line.replace(port, free)
    values = {**os.environ, **values_of(entry), **SECRETS, **env, "RANKS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return Job(name[1], 1, command=["bash", "-c", line], env=values)


def leave(*jobs: Job) -> None:
    """By SIGTERM to all at once, as pods are deleted."""
    for job in jobs:
        job.remember_pids()
    for job in jobs:
        job.process.send_signal(signal.SIGTERM)
    for job in jobs:
        assert job.process.wait(40) == 1, "torchrun reports the signal so"
        assert not job.alive()
        for word in ("did not leave", ": exit ", "left over"):
            assert word not in job.output(), job.output()


def test_pods_of_two_nodes_serve_and_encode_ranks_join_and_leave():
    ports = {port: str(free_port()) for port in ("7007", "7008", "8000")}
    encode_ports = {"7007": ports["7007"], "7008": str(free_port()), "q3vl-a-hub": "127.0.0.1"}
    env = {"POD_IP": "127.0.0.1", "HOSTNAME": "q3vl-a-others-0"}
    with (
        pod(("StatefulSet", "q3vl-a-others"), ports, {**env, "FIRST": "127.0.0.1"}) as others,
        pod(("StatefulSet", "q3vl-a-first"), ports, env) as first,
        pod(("Deployment", "q3vl-a-encode"), encode_ports, env) as encode,
    ):
        url = f"http://127.0.0.1:{ports['8000']}"
        first.wait_for(r"ready: ", 120)
        encode.wait_for(r"joined", 60)
        assert [request(url + path).status for path in ("/health", "/ready")] == [200, 200]
        assert ask(url) == 200
        leave(encode)
        assert ask(url) == 200
        leave(first, others)


def test_a_batch_over_two_nodes_serves_and_ends(tmp_path):
    (tmp_path / "srun").write_text(FAKE_SRUN)
    (tmp_path / "srun").chmod(0o755)
    text = (DEPLOY / "slurm" / "serve.sbatch").read_text()
    port = free_port()
    for old, new in (("7007", free_port()), ("7008", free_port()), ("8000", port)):
        text = text.replace(old, str(new))
    env = {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}", "HEAD_ADDRESS": "127.0.0.1", "RANKS": "1", **SECRETS}
    env |= {"SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(DEPLOY.parent), "SLURM_CPUS_ON_NODE": "1"}
    with Job("batch", 1, "--kv-cache-gib", "0.5", command=["bash", "-c", text, "serve.sbatch"], env=env) as job:
        job.wait_for(r"ready: ", 120)
        assert ask(f"http://127.0.0.1:{port}") == 200
        job.remember_pids()
        job.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 40
        while job.alive() and time.monotonic() < end:
            time.sleep(0.1)
        assert not job.alive(), job.output()
        assert ": exit " not in job.output()
