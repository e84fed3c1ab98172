"""Checkpoints of the hub: the real client against a hub on loopback, its cache in a fresh folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3vl_disagg.checkpoint import download, open_checkpoint
from qwen3vl_disagg.checkpoint.download import HubId, hub_id, model_name, resolve_model_folder
from qwen3vl_disagg.core.errors import InputError
from tests.support.hub_client import HubClient
from tests.support.hub_server import TOKEN, Asked, HubServer, Repository
from tests.support.random_model import small_config
from tools.checkpoints import write_random_checkpoint

TINY = Path(resolve_model_folder(None))
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
COMMIT = "0123456789abcdef" * 2 + "01234567"
UNWANTED = {
    "README.md": b"read me",
    ".gitattributes": b"",
    "pytorch_model.bin": b"pickled",
    "model.pt": b"pickled",
    "modeling_qwen.py": b"raise SystemExit",
    "model.safetensors": b"left over",
    "original/consolidated.safetensors": b"another form",
    "merges.txt": b"",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("written")
    write_random_checkpoint(folder, small_config(), seed=0, num_shards=2)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with HubClient(tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture
def ask(client, tmp_path):
    """Ask with a cache of this test's own. HF_ENDPOINT is the server's, nobody's without one."""

    def ask(model: str = "Org/Model", server: HubServer | None = None, *, weights: bool = True, **env: str):
        where = {"HF_HOME": str(tmp_path / "cache")} | ({"HF_ENDPOINT": server.url} if server else {})
        [answer] = client.ask(model, weights=weights, **{**where, **env})
        assert TOKEN not in json.dumps(answer)
        assert "Traceback" not in answer["stderr"]
        if answer.get("kind") == "InputError":
            assert answer["error"].startswith(f"--model {model}: ")
            assert "\n" not in answer["error"]
        return answer

    return ask


def error_of(answer: dict[str, str]) -> str:
    assert answer["kind"] == "InputError", answer
    return answer["error"]


def edited_config(files, **changes) -> dict[str, bytes]:
    return {**files, "config.json": json.dumps({**json.loads(files["config.json"]), **changes}).encode()}


def test_only_what_is_needed_config_first_weights_last(ask, files):
    repository = Repository({**files, **UNWANTED})
    with HubServer({"Org/Model": repository}) as server:
        answer = ask(server=server)
        fetched = server.fetched()
        assert fetched[0] == "config.json"
        assert sorted(fetched[-2:]) == SHARDS
        assert set(fetched) == files.keys()
        assert len(fetched) == len(set(fetched))
        assert answer["stderr"] == f"model Org/Model at {repository.commit}\n"
        folder = Path(answer["folder"])
        assert (folder.name, model_name(folder)) == (repository.commit, "Org/Model")
        with open_checkpoint(folder) as checkpoint:
            assert {info.file for info in checkpoint.tensors.values()} == set(SHARDS)

        server.asked.clear()
        assert ask(server=server) == answer
        assert server.fetched() == []
        server.asked.clear()
        assert ask(server=server, HF_HUB_OFFLINE="1") == answer
        assert server.asked == []
    assert ask() == answer  # nobody listens there


def test_a_download_goes_on_where_it_broke(ask):
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    cut = 11_000_000  # the client writes in pieces of 10 MiB
    repository = Repository(files, cuts={"model.safetensors": cut})
    with HubServer({"Org/Model": repository}) as server:
        answer = ask(server=server)
        folder = Path(answer["folder"])
        assert answer["stderr"] == f"model Org/Model at {repository.commit}\n"
        gets = [asked.range for asked in server.asked if asked.method == "GET" and asked.path.startswith("/cdn/")]
        assert gets == [None, f"bytes={10 * 2**20}-"]
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_complete_files_are_kept_when_another_fails(ask, files):
    repository = Repository(files, promised={SHARDS[1]: len(files[SHARDS[1]]) + 1})
    with HubServer({"Org/Model": repository}) as server:
        assert "broke off (OSError): start again" in error_of(ask(server=server))
        server.asked.clear()
        repository.promised.clear()
        assert "folder" in ask(server=server)
        assert server.fetched() == [SHARDS[1]]


def test_revisions(ask, files):
    files = {**files, "tokenizer.json": b"", "tokenizer_config.json": b"", "chat_template.jinja": b""}
    old = Repository(files, refs=("main", "v1", "refs/pr/3"))
    new = Repository({**files, "generation_config.json": b"{}"}, refs=("main", "v2"))
    with HubServer({"Org/Model": old}) as server:
        for revision in ("", "@v1", "@refs/pr/3"):
            assert Path(ask(f"Org/Model{revision}", server)["folder"]).name == old.commit
        server.repositories["Org/Model"] = [new]
        assert Path(ask("Org/Model", server)["folder"]).name == new.commit
        assert Path(ask("Org/Model@v2", server)["folder"]).name == new.commit
        assert Path(ask(f"Org/Model@{new.commit}", server)["folder"]).name == new.commit
        server.asked.clear()
        assert Path(ask(f"Org/Model@{new.commit}", server)["folder"]).name == new.commit
        assert server.asked == []
        assert "has no such revision" in error_of(ask("Org/Model@v9", server))
    for revision, commit in {"v1": old.commit, "v2": new.commit, old.commit: old.commit}.items():
        assert Path(ask(f"Org/Model@{revision}", HF_HUB_OFFLINE="1")["folder"]).name == commit
    assert "HF_HUB_OFFLINE is set" in error_of(ask("Org/Model@v3", HF_HUB_OFFLINE="1"))


def test_all_files_are_of_the_commit_that_the_config_is_of(ask, files):
    old, new = Repository(files), Repository({**files, "generation_config.json": b"newer"}, refs=())

    def push(asked: Asked) -> None:
        if asked.method == "GET" and asked.path.endswith("/config.json"):
            old.refs, new.refs = (), ("main",)

    with HubServer({"Org/Model": [old, new]}) as server:
        server.on_asked = push
        folder = Path(ask(server=server)["folder"])
    assert folder.name == old.commit
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_what_is_not_to_be_had(ask, files):
    repositories = {
        "Org/Private": Repository(files, needs="token"),
        "Org/Gated": Repository(files, needs="access"),
        "Org/Bare": Repository(UNWANTED),
    }
    with HubServer(repositories) as server:
        for model in ("Org/Missing", "Org/Private"):
            assert "no such repository on the hub, or a private one that needs" in error_of(ask(model, server))
        assert "folder" in ask("Org/Private", server, HF_TOKEN=TOKEN)
        assert any(asked.has_token for asked in server.asked)
        assert "refused the token" in error_of(ask("Org/Bare", server, HF_TOKEN="hf_bad_token"))
        gated = error_of(ask("Org/Gated", server, HF_TOKEN=TOKEN))
        assert "ask for access at https://huggingface.co/Org/Gated" in gated
        assert "the repository has no config.json" in error_of(ask("Org/Bare", server))
        server.is_down = True
        assert "the hub answered 503, and the cache at" in error_of(ask("Org/Missing", server))
    assert "the hub cannot be reached, and the cache at" in error_of(ask("Org/Missing"))
    assert "HF_HUB_OFFLINE is set, and the cache at" in error_of(ask("Org/Missing", HF_HUB_OFFLINE="1"))


def test_a_wrong_model_is_refused_before_its_weights(ask, files):
    rope = json.loads(files["config.json"])["text_config"]
    rope["rope_scaling"]["rope_type"] = "longrope"
    repositories = {
        "Org/Llama": Repository(edited_config(files, architectures=["LlamaForCausalLM"])),
        "Org/None": Repository({**files, "config.json": b"[]"}),
        "Org/Broken": Repository({**files, "config.json": b"{"}),
        "Org/Nested": Repository({**files, "config.json": b"[" * 100_000}),
        "Org/Odd": Repository(edited_config(files, text_config=rope)),
    }
    with HubServer(repositories) as server:
        llama = error_of(ask("Org/Llama", server))
        assert "architecture 'LlamaForCausalLM' is not served, only Qwen3VLMoeForConditionalGeneration and" in llama
        assert "architecture None is not served" in error_of(ask("Org/None", server))
        assert "config.json is not JSON" in error_of(ask("Org/Broken", server))
        assert "config.json is not JSON: nested too deeply" in error_of(ask("Org/Nested", server))
        odd = ask("Org/Odd", server)
        assert (odd["kind"], "rope type 'longrope'" in odd["error"]) == ("CheckpointError", True)
        assert server.fetched() == ["config.json"] * 5


def test_weights_that_are_not_there(ask, files):
    small = {name: data for name, data in files.items() if name not in SHARDS}
    lost = {**small, SHARDS[0]: files[SHARDS[0]]}
    pickled = {**small, "pytorch_model.bin": b""}
    del pickled["model.safetensors.index.json"]
    nested = {**small, "model.safetensors.index.json": b"[" * 100_000}
    repositories = {"Org/Lost": lost, "Org/Pickled": pickled, "Org/Nested": nested}
    with HubServer({name: Repository(held) for name, held in repositories.items()}) as server:
        assert "there is no model.safetensors" in error_of(ask("Org/Nested", server))
        assert f"there is no {SHARDS[1]} (model.safetensors.index.json names it)" in error_of(ask("Org/Lost", server))
        message = "there is no model.safetensors (pickled weights and code are not fetched)"
        assert message in error_of(ask("Org/Pickled", server))
        assert "pytorch_model.bin" not in server.fetched()


def test_no_room_on_the_disk_is_seen_first(ask, files):
    repository = Repository(files, promised=dict.fromkeys(SHARDS, 2**50))
    with HubServer({"Org/Model": repository}) as server:
        assert "2097152.0 GiB are to be fetched" in error_of(ask(server=server))
        assert not set(SHARDS) & set(server.fetched())


def test_settings_alone(ask, files):
    with HubServer({"Org/Model": Repository(files)}) as server:
        answer = ask(server=server, weights=False)
        assert set(server.fetched()) == files.keys() - set(SHARDS)
    assert ask(HF_HUB_OFFLINE="1", weights=False) == answer
    assert "does not hold all of it" in error_of(ask(HF_HUB_OFFLINE="1"))


@pytest.fixture
def unlisted(tmp_path):
    """A function that makes a cache as a client leaves it that keeps no list of a repository's files."""

    def make(names, commit: str = COMMIT) -> Path:
        repository = tmp_path / "cache" / "hub" / "models--Org--Model"
        snapshot = repository / "snapshots" / commit
        for folder in (snapshot, repository / "refs", repository / "blobs"):
            folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        for name in names:
            shutil.copy(TINY / name, repository / "blobs" / name)
            (snapshot / name).symlink_to(f"../../blobs/{name}")
        return snapshot

    return make


def test_a_cache_that_lists_nothing(ask, unlisted):
    """What it lacks is not said of the repository, nobody asks twice, and a commit that is whole not at all."""
    everything = [path.name for path in TINY.iterdir()]
    models = ("Org/Model", f"Org/Model@{COMMIT}")
    unlisted(["config.json"])
    for model in models:
        assert "HF_HUB_OFFLINE is set, and the cache at" in error_of(ask(model, HF_HUB_OFFLINE="1"))
        start = time.perf_counter()
        assert "the hub cannot be reached, and the cache at" in error_of(ask(model))
        assert time.perf_counter() - start < 5
    snapshot = unlisted([name for name in everything if name != "config.json"])
    with HubServer({}) as server:
        server.is_down = True
        for model, num_asked in zip(models, (1, 0), strict=True):
            server.asked.clear()
            assert ask(model, server) == ask(model, HF_HUB_OFFLINE="1")
            assert len(server.asked) == num_asked
    for model in models:
        start = time.perf_counter()
        assert ask(model)["folder"] == str(snapshot)
        assert time.perf_counter() - start < 5
    (snapshot / "config.json").unlink()
    assert "the hub cannot be reached, and the cache at" in error_of(ask(models[1]))


def test_a_commit_that_is_not_whole_is_completed(ask, unlisted):
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    kept = [name for name in files if name != "tokenizer.json"]
    repository = Repository(files)
    with HubServer({"Org/Model": repository}) as server:
        folder = unlisted(kept, repository.commit)
        assert ask(f"Org/Model@{repository.commit}", server)["folder"] == str(folder)
        assert server.fetched() == ["tokenizer.json"]
        assert (folder / "tokenizer.json").exists()


def test_where_the_cache_is(ask, files, tmp_path):
    with HubServer({"Org/Model": Repository(files)}) as server:
        answer = ask(server=server, HF_HUB_CACHE=str(tmp_path / "elsewhere"))
    assert Path(answer["folder"]).is_relative_to(tmp_path / "elsewhere" / "models--Org--Model" / "snapshots")


def test_a_cache_that_cannot_be_written(ask, files, tmp_path):
    (tmp_path / "file").write_text("")
    with HubServer({"Org/Model": Repository(files)}) as server:
        message = error_of(ask(server=server, HF_HUB_CACHE=str(tmp_path / "file")))
    assert "cannot write to the cache at" in message


@pytest.mark.parametrize(
    ("number", "said"),
    [
        *((number, "cannot write to the cache at") for number in (errno.EACCES, errno.EROFS, errno.ENOTDIR)),
        *((number, "no room left at") for number in (errno.ENOSPC, errno.EDQUOT)),
        (errno.ECONNRESET, "the download broke off (Connection reset by peer)"),
        (errno.EIO, "the download broke off (Input/output error)"),
    ],
)
def test_what_the_system_says(number, said):
    with pytest.raises(InputError) as caught, download._explained("a/b", "a/b"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"--model a/b: {said}")


def test_weights_that_several_repositories_share(files, tmp_path):
    """The client keeps such files once for the whole cache: snapshot -> the repository's blobs -> the cache's."""
    repository = tmp_path / "models--Org--Model"
    snapshot, blobs, shared = repository / "snapshots" / "abc", repository / "blobs", tmp_path / "blobs" / "1f"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for name, data in files.items():
        (shared / name).write_bytes(data)
        (blobs / name).symlink_to(f"../../blobs/1f/{name}")
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    with open_checkpoint(snapshot) as checkpoint:
        assert len(checkpoint.tensors) > 50
    shutil.move(tmp_path / "blobs", tmp_path / "other")
    for name in files:
        (blobs / name).unlink()
        (blobs / name).symlink_to(f"../../other/1f/{name}")
    with pytest.raises(ValueError, match="a link that leaves the folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", HubId("Qwen/Qwen3-VL-30B-A3B-Instruct", None)),
        ("Qwen/Qwen3-VL-2B-Thinking-FP8@main", HubId("Qwen/Qwen3-VL-2B-Thinking-FP8", "main")),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("a/_b.c-d@v1.0", HubId("a/_b.c-d", "v1.0")),
        ("./a/b", None),
        ("/a/b", None),
        ("~/a", None),
        ("a", None),
        ("a/b/c", None),
        ("a/b/", None),
    ],
)
def test_names_of_the_hub(model, expected):
    assert HubId.parse(model) == expected


@pytest.mark.parametrize(
    "model",
    [
        *("a/b c", "a/", "a/b@", "a/-b", "a/b.", "a--c/b", "a/b..c", "a/b.git", "ä/b", "a/b@..", "a/b@x//y", "a/b@-x"),
        *("a/b@v 1", f"a/{'b' * 95}", "http:/x", "a/b?c"),
    ],
)
def test_impossible_names(model):
    with pytest.raises(InputError, match="no possible") as caught:
        HubId.parse(model)
    assert caught.value.param == "model"


def test_a_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("Org/Model") == HubId("Org/Model", None)
    (tmp_path / "Org" / "Model").mkdir(parents=True)
    assert hub_id("Org/Model") is None
    assert resolve_model_folder("Org/Model") == Path("Org/Model")
    assert model_name(Path("Org/Model")) == "Model"


def test_a_path_that_is_not_there():
    with pytest.raises(InputError, match=r"--model /no/such: no such folder \(of the hub: ORG/NAME\)"):
        resolve_model_folder("/no/such")


def test_names_of_snapshots(tmp_path):
    snapshot = tmp_path / "models--Qwen--Qwen3-VL-2B-Instruct" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "Qwen/Qwen3-VL-2B-Instruct"
    assert replace(HubId("a/b", None), revision="c") == HubId.parse("a/b@c")
