"""The served system with a model of the hub: fetched once, named by its name, and later without the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from tests.support.hub_server import HubServer, Repository
from tests.support.server import REPO, Job, Server

MODEL = "Org/Tiny-VL"


@pytest.fixture(scope="module")
def hub():
    files = {path.name: path.read_bytes() for path in resolve_model_folder(None).iterdir()}
    with HubServer({MODEL: Repository({**files, "pytorch_model.bin": b"pickled"})}) as hub:
        yield hub


def client_env(hub: HubServer, cache: object) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}


@pytest.mark.acceptance
def test_served_and_joined(hub, tmp_path):
    env = {**client_env(hub, tmp_path / "a"), "Q3VL_TOKEN": "secret"}
    with Server(3, "--encode-ranks", "1", "--model", MODEL, "--hub", "127.0.0.1:0", env=env) as server:
        counts = Counter(hub.fetched())
        assert set(counts.values()) == {1}
        assert "model.safetensors" in counts
        assert "pytorch_model.bin" not in counts
        assert len(server.output().split(f"model {MODEL} at ")) == 2
        assert [model["id"] for model in server.get("/v1/models")["data"]] == [MODEL]
        num_asked = len(hub.asked)
        status, answer = server.chat("hello", max_tokens=4)
        assert (status, answer["model"]) == (200, MODEL)
        assert len(hub.asked) == num_asked

        other = {**client_env(hub, tmp_path / "b"), "Q3VL_TOKEN": "secret"}
        with Job("encode.py", 2, "--join", server.hub, "--model", MODEL, env=other) as job:
            job.wait_for(rf"model {MODEL} at ")
            while len([p for p in server.processes() if p["role"] == "encode"]) < 3:
                assert job.process.poll() is None, job.output()
    assert Counter(hub.fetched())["model.safetensors"] == 2


@pytest.mark.acceptance
def test_what_is_wrong_is_said_once(hub, tmp_path):
    with Job("serve.py", 3, "--model", "Org/Missing", env=client_env(hub, tmp_path)) as job:
        job.process.wait(60)
        lines = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert [line.split(":")[1] for line in lines] == [" --model Org/Missing"]


@pytest.mark.acceptance
def test_generate_plan_and_dry_run(hub, tmp_path):
    env = client_env(hub, tmp_path)
    hub.asked.clear()

    def run(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], cwd=REPO, env={**os.environ, **env, **changes}, text=True, capture_output=True
        )

    cli = ("-m", "qwen3vl_disagg")
    planned = run(*cli, "plan", "--model", MODEL, "--json")
    assert (planned.returncode, json.loads(planned.stdout)["model"]) == (0, MODEL)
    sized = run("recipes/serve.py", "--dry-run", "--model", MODEL, "--json")
    assert (sized.returncode, json.loads(sized.stdout)["model"]) == (0, MODEL)
    assert "model.safetensors" not in hub.fetched()
    question = ("generate", "--prompt", "hello", "--max-new-tokens", "4", "--json", "--temperature", "0")
    fetched = run(*cli, *question, "--model", MODEL)
    assert fetched.returncode == 0, fetched.stderr
    assert f"model {MODEL} on cpu" in fetched.stderr
    cached = run(*cli, *question, "--model", MODEL, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    own = run(*cli, *question)
    ids = [json.loads(done.stdout)["token_ids"] for done in (fetched, cached, own)]
    assert ids[0] == ids[1] == ids[2]
    refused = run(*cli, *question, "--model", "Org/Missing")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("error: model: --model Org/Missing: no such folder")
