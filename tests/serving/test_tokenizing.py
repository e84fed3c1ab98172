"""`/tokenize` and `/detokenize`, in vLLM's form."""

from __future__ import annotations

from typing import Any

import pytest

from qwen3vl_disagg.cluster.backend import Readiness
from tests.support.asgi import is_on_a_loop
from tests.support.fake_backend import ASK, FakeBackend, serve, tiny_processor
from tests.support.images import png, uri

PROCESSOR = tiny_processor()
TEXT = "a red circle, é 日本"
LOOK = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri(png())}}, "what is it?"]}]


def post(path: str, body: Any, **options: Any) -> Any:
    return serve(FakeBackend(), **options).post(path, json=body)


def test_a_text():
    ids = PROCESSOR.tokenizer.encode(TEXT)
    body = post("/tokenize", {"prompt": TEXT, "model": "tiny", "add_special_tokens": True}).json()
    context = PROCESSOR.max_model_len
    assert body == {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": None}
    strings = post("/tokenize", {"prompt": TEXT, "return_token_strs": True}).json()["token_strs"]
    assert strings == [PROCESSOR.tokenizer.backend.id_to_token(i) for i in ids]
    assert post("/tokenize", {"prompt": ""}).json()["tokens"] == []


def test_names_of_many_tokens_keep_no_loop_from_its_work(monkeypatch):
    named_on_the_loop = list[int]()

    class Named:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def id_to_token(self, token_id: int) -> str | None:
            if is_on_a_loop():
                named_on_the_loop.append(token_id)
            return real.id_to_token(token_id)

    real = PROCESSOR.tokenizer.backend
    monkeypatch.setattr(PROCESSOR.tokenizer, "backend", Named())
    body = post("/tokenize", {"prompt": TEXT, "return_token_strs": True}).json()
    assert len(body["token_strs"]) == body["count"] > 0
    assert not named_on_the_loop


def test_a_conversation_is_what_a_chat_request_makes_of_it():
    for extra in ({}, {"add_generation_prompt": False}, {"return_token_strs": True, "add_special_tokens": False}):
        for messages in (ASK["messages"], LOOK):
            body = post("/tokenize", {"messages": messages, **extra}).json()
            backend = FakeBackend()
            chat = {name: value for name, value in extra.items() if name == "add_generation_prompt"}
            serve(backend).post("/v1/chat/completions", json={"messages": messages, **chat})
            assert body["tokens"] == backend.handles[0].prompt.token_ids
            assert body["count"] == len(body["tokens"])
    assert PROCESSOR.config.image_token_id in body["tokens"]


def test_there_and_back():
    for ids in (PROCESSOR.tokenizer.encode(TEXT), []):
        assert post("/detokenize", {"tokens": ids}).json() == {"prompt": TEXT if ids else ""}
    special = PROCESSOR.tokenizer.token_id("<|im_start|>")
    assert post("/detokenize", {"tokens": [special, *PROCESSOR.tokenizer.encode("user")]}).json() == {
        "prompt": "<|im_start|>user"
    }


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_while_ranks_are_missing(path):
    backend = FakeBackend()
    backend.state = Readiness(ready=False, reasons=["no language rank"])
    assert serve(backend).post(path, json={"prompt": "a", "tokens": [1]}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": ASK["messages"]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"messages": [5]}, "messages[0]"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "x", "content": "a"}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "red circle " * 90000}, "prompt"),
        ("/detokenize", {}, None),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ],
)
def test_what_is_refused(path, body, param):
    reply = post(path, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


def test_other_models():
    assert post("/tokenize", {"prompt": "a", "model": "other"}).status_code == 404
    assert post("/detokenize", {"tokens": [1], "model": "other"}).status_code == 404


def test_many_tokens_are_read_in_a_child():
    ids = PROCESSOR.tokenizer.encode("circle ") * 6000
    assert len(ids) > 2**13
    assert post("/detokenize", {"tokens": ids}).json()["prompt"] == "circle " * 6000
