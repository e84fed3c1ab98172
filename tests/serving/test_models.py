"""What the model is called, and how long its context is said and held to be."""

from __future__ import annotations

import json

import pytest

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import BufferOptions, HttpOptions, ModelOptions
from qwen3vl_disagg.launch.serve import check_checkpoint
from qwen3vl_disagg.processing import Processor
from tests.support.fake_backend import ASK, PATH, FakeBackend, serve, tiny_processor

NAMES = ["vl", "Org/Model", "a b"]


def many():
    return serve(FakeBackend(), more_names=[*NAMES, "tiny"])


def test_each_name_is_a_model():
    client = many()  # one: `created` is the second in which it was made
    data = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in data] == ["tiny", *NAMES]
    for model, path in zip(data, ("tiny", "vl", "Org/Model", "a%20b"), strict=True):
        assert client.get(f"/v1/models/{path}").json() == model
    assert client.get("/v1/models/Org%2FModel").json()["id"] == "Org/Model"


def test_answers_have_the_first_name():
    for name in ("tiny", *NAMES, None):
        assert many().post(PATH, json={**ASK, "model": name}).json()["model"] == "tiny"


@pytest.mark.parametrize("name", ["other", "TINY", "tiny/", "tiny/x", "%00", "é", "x" * 300])
def test_a_model_that_is_not_there(name):
    reply = many().get(f"/v1/models/{name}")
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_version():
    body = serve(FakeBackend()).get("/version").json()
    assert list(body) == ["version"]
    assert body["version"]


def short(length: int) -> Processor:
    folder = resolve_model_folder(None)
    return Processor.from_folder(folder, read_config(folder), max_model_len=length)


def test_a_shorter_context_is_held_in_threads_and_in_children():
    num_prompt = len(tiny_processor().prepare(ASK["messages"]).token_ids)
    backend = FakeBackend()
    client = serve(backend, processor=short(num_prompt + 10))
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == num_prompt + 10
    long = json.dumps({**ASK, "tools": [], "x": [0] * 9000})  # of so many values that a child takes it
    for body in (json.dumps(ASK), long):
        assert client.post(PATH, content=body, headers={"content-type": "application/json"}).status_code == 200
        assert backend.handles[-1].sampling.max_new_tokens == 10
        more = json.loads(body) | {"max_tokens": 11}
        error = client.post(PATH, json=more).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
        assert f"the context is {num_prompt + 10}" in error["message"]
    reply = serve(FakeBackend(), processor=short(num_prompt)).post(PATH, json=ASK)
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_options_that_cannot_be():
    context = tiny_processor().config.text.max_position_embeddings
    check_checkpoint(ModelOptions(), BufferOptions(), context)
    with pytest.raises(InputError, match=f"the checkpoint's context is {context}"):
        check_checkpoint(ModelOptions(), BufferOptions(), context + 1)
    HttpOptions(served_model_name=("a", "Org/Name"), max_model_len=1).check()
    for options in (
        HttpOptions(max_model_len=0),
        HttpOptions(served_model_name=("",)),
        HttpOptions(served_model_name=("a", "b\n")),
        HttpOptions(served_model_name=("x" * 257,)),
    ):
        with pytest.raises(InputError):
            options.check()
