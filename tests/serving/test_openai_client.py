"""OpenAI's own client, unchanged, with the base URL alone changed."""

from __future__ import annotations

import base64

import numpy as np
import openai
import pytest

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.cluster.backend import AllDecoded, FinishedEvent
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from tests.support.fake_backend import FakeBackend, timings, tiny_processor
from tests.support.images import png
from tests.support.pooling import write_pooler
from tests.support.running import RunningApp

QUESTION = [{"role": "user", "content": "what is it?"}]


@pytest.fixture(scope="module")
def server():
    app = create_app(FakeBackend(), tiny_processor(), model_name="Org/tiny", keys=ApiKeys(["sk-good"]))
    with RunningApp(app) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-good", max_retries=0) as made:
        yield made


def test_models(client):
    assert [model.id for model in client.models.list()] == ["Org/tiny"]
    assert client.models.retrieve("Org/tiny").id == "Org/tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_chat(client):
    answer = client.chat.completions.create(model="Org/tiny", messages=QUESTION, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == "red circle"
    assert answer.choices[0].logprobs.content[0].logprob == -0.5
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    with client.chat.completions.create(
        model="Org/tiny",
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": content}],
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "red circle"
    assert chunks[-1].usage.total_tokens > 0


def test_completions(client):
    answer = client.completions.create(model="Org/tiny", prompt=["a red", "a"], echo=True, logprobs=1, max_tokens=1)
    first, second = answer.choices
    assert first.text.startswith("a red")
    assert first.logprobs.token_logprobs[0] is None
    assert len(first.logprobs.tokens) == len(first.logprobs.text_offset) > len(second.logprobs.tokens)
    with client.completions.create(model="Org/tiny", prompt="a", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "red circle"


def test_embeddings(tmp_path):
    folder = write_pooler(tmp_path / "m", "embed")
    vector = np.arange(64, dtype="<f4")
    backend = FakeBackend(lambda *_: [AllDecoded(), FinishedEvent("stop", timings(), vector.tobytes())])
    app = create_app(backend, Processor.from_folder(folder, read_config(folder)), model_name="m")
    with RunningApp(app) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="k") as client:
        for form in ({}, {"encoding_format": "float"}):
            answer = client.embeddings.create(model="m", input=["a", "b"], **form)
            assert [entry.embedding for entry in answer.data] == [vector.tolist()] * 2
            assert answer.usage.total_tokens == answer.usage.prompt_tokens > 2
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="m", messages=QUESTION)
        assert caught.value.code == "unsupported_task"


def test_several_answers(client):
    answer = client.chat.completions.create(model="Org/tiny", messages=QUESTION, n=2)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [
        (0, "red circle"),
        (1, "red circle"),
    ]
    texts = ["", ""]
    with client.chat.completions.create(model="Org/tiny", messages=QUESTION, n=2, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == ["red circle"] * 2
    answer = client.completions.create(model="Org/tiny", prompt=["a red", "a"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("key", "fields", "kind", "param"),
    [
        ("sk-bad", {}, openai.AuthenticationError, None),
        ("sk-good", {"model": "other"}, openai.NotFoundError, "model"),
        ("sk-good", {"temperature": -1}, openai.BadRequestError, "temperature"),
        ("sk-good", {"messages": []}, openai.BadRequestError, "messages"),
    ],
)
def test_errors(server, key, fields, kind, param):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": "Org/tiny", "messages": QUESTION, **fields})
        assert caught.value.param == param
        assert caught.value.request_id
