"""A host's workers and a repository of the hub: one of them fetches it, the others are told."""

from pathlib import Path

import pytest

from qwen3vl_disagg.cluster.model_folder import shared_model_folder
from qwen3vl_disagg.cluster.rendezvous import World
from tests.support.hub_client import HubClient
from tests.support.hub_server import HubServer, Repository
from tests.support.random_model import small_config
from tools.checkpoints import write_random_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("written")
    write_random_checkpoint(folder, small_config(), seed=0)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with HubClient(tmp_path_factory.mktemp("home")) as client:
        yield client


def test_one_worker_fetches_for_its_host(client, files, tmp_path):
    with HubServer({"Org/Model": Repository(files)}) as server:
        answers = client.ask("Org/Model", num_ranks=3, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path))
        assert sorted(server.fetched()) == sorted(files)
    assert len({answer["folder"] for answer in answers}) == 1
    assert (Path(answers[0]["folder"]) / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert [answer["stderr"].startswith("model Org/Model at ") for answer in answers] == [True, False, False]
    assert all(answer["is_clean"] for answer in answers)  # no client and no threads in a process that will fork


def test_what_is_wrong_reaches_the_worker(client, files, tmp_path):
    where = {"HF_HOME": str(tmp_path)}
    [answer] = client.ask("Org/Model", num_ranks=1, **where)
    assert (answer["kind"], "the hub cannot be reached" in answer["error"]) == ("InputError", True)
    broken = {**files, "config.json": files["config.json"].replace(b'"hidden_size"', b'"hidden"')}
    with HubServer({"Org/Model": Repository(broken)}) as server:
        [answer] = client.ask("Org/Model", num_ranks=1, HF_ENDPOINT=server.url, **where)
    assert answer["kind"] == "CheckpointError"
    assert "text_config.hidden_size is missing" in answer["error"]
    assert "vision_config.hidden_size is missing" in answer["error"]


def test_a_folder_needs_no_telling(tmp_path):
    second = World(1, 2, 1, 2, has_agent=True)
    assert shared_model_folder(None, second) is None
    assert shared_model_folder(str(tmp_path), second) == str(tmp_path)
