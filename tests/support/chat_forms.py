"""What tests of a chat's other forms share: a scripted model, typed events, and the chat that a body means."""

from __future__ import annotations

import json
from typing import Any

from tests.support.fake_backend import PATH, FakeBackend, answer_steps, serve, tiny_processor


def backend_of(text: str = "red circle") -> FakeBackend:
    return FakeBackend(lambda prompt, sampling: answer_steps(text, sampling))


def typed_events(reply: Any) -> list[dict[str, Any]]:
    """Each named as its type says."""
    assert reply.status_code == 200, reply.text
    found = []
    for block in reply.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def check_means(path: str, body: dict[str, Any], chat: dict[str, Any]) -> None:
    """Both come to the same request for the ranks."""
    backend = FakeBackend()
    client = serve(backend)
    for one_path, one in ((path, body), (PATH, chat)):
        reply = client.post(one_path, json=one)
        assert reply.status_code == 200, reply.text
    first, second = backend.handles
    decode = tiny_processor().tokenizer.decode
    assert decode(first.prompt.token_ids) == decode(second.prompt.token_ids)
    assert first.prompt.token_ids == second.prompt.token_ids
    assert first.prompt.media == second.prompt.media
    assert first.sampling == second.sampling
