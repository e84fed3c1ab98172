"""`prompt_logprobs` of a chat request, in vLLM's form."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, FinishedEvent
from qwen3vl_disagg.serving import prompt_scores
from tests.support.fake_backend import ASK, PATH, FakeBackend, prompt_logprobs, serve, timings, tiny_processor


def test_each_token_but_the_first():
    backend = FakeBackend()
    body = serve(backend).post(PATH, json={**ASK, "prompt_logprobs": 2, "return_token_ids": True}).json()
    ids, entries = body["prompt_token_ids"], body["prompt_logprobs"]
    assert backend.handles[0].sampling.prompt_logprobs == 2
    assert len(entries) == len(ids)
    assert entries[0] is None
    text = tiny_processor().tokenizer
    for t, (token_id, entry) in enumerate(zip(ids[1:], entries[1:], strict=True), 1):
        assert set(entry) == {str(token_id), "1", "2"}
        if token_id > 2:
            own = {"logprob": -t / 8, "rank": t, "decoded_token": text.token_bytes(token_id).decode()}
            assert entry[str(token_id)] == own
        assert entry["2"]["logprob"] == -2 / 16
        assert entry["2"]["rank"] == 2


def test_only_where_asked_for():
    assert "prompt_logprobs" not in serve(FakeBackend()).post(PATH, json=ASK).json()
    body = serve(FakeBackend()).post(PATH, json={**ASK, "prompt_logprobs": 0}).json()
    assert {len(entry) for entry in body["prompt_logprobs"][1:]} == {1}


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": True}])
def test_what_it_may_be(fields):
    reply = serve(FakeBackend()).post(PATH, json={**ASK, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_not_in_a_stream():
    reply = serve(FakeBackend()).post(PATH, json={**ASK, "prompt_logprobs": 1, "stream": True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_what_one_request_may_ask_for(monkeypatch):
    num_prompt = len(tiny_processor().prepare(ASK["messages"]).token_ids)
    monkeypatch.setattr(prompt_scores, "MAX_SCORES", num_prompt * 3)
    client = serve(FakeBackend())
    assert client.post(PATH, json={**ASK, "prompt_logprobs": 2}).status_code == 200
    reply = client.post(PATH, json={**ASK, "prompt_logprobs": 3})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_parts_are_put_together_and_none_may_be_missing():
    def script(cut):
        def steps(prompt, sampling):
            parts = [prompt_logprobs(prompt, 1), prompt_logprobs(prompt, 1, 4)]
            n = 3
            parts[0] = type(parts[0])(
                request_id="",
                index=1,
                **{name: getattr(parts[0], name)[: 4 * n] for name in ("own", "ranks", "top_ids", "top")},
            )
            return [
                0.0,
                AllDecoded(),
                *(part for k, part in enumerate(parts) if k != cut),
                FinishedEvent("length", timings()),
            ]

        return steps

    asked = {**ASK, "prompt_logprobs": 1}
    whole = serve(FakeBackend(script(None))).post(PATH, json=asked).json()["prompt_logprobs"]
    assert whole == serve(FakeBackend()).post(PATH, json=asked).json()["prompt_logprobs"]
    for cut in (0, 1):
        assert serve(FakeBackend(script(cut))).post(PATH, json=asked).status_code == 500
