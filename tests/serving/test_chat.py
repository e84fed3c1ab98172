"""Whole answers: text, usage, logprobs, token ids, timings, and what reaches the backend."""

from __future__ import annotations

import msgspec
import pytest

from qwen3vl_disagg.cluster.backend import FinishedEvent
from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.processing import GenerationDefaults
from qwen3vl_disagg.serving.limits import Limits
from tests.support.fake_backend import ASK, PATH, FakeBackend, answer_of, answer_steps, serve, tiny_processor
from tests.support.images import png, uri


def test_a_whole_answer():
    backend = FakeBackend()
    reply = serve(backend).post(PATH, json={**ASK, "model": "tiny"})
    assert reply.status_code == 200
    body = reply.json()
    [handle] = backend.handles
    num_prompt, num_new = len(handle.prompt.token_ids), len(tiny_processor().tokenizer.encode("red circle")) + 1
    assert body["id"] == f"chatcmpl-{handle.request_id}"
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "red circle"},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert "prompt_token_ids" not in body


def test_timings_hold_the_ranks_figures_and_add_the_frontends():
    body = serve(FakeBackend()).post(PATH, json=ASK).json()
    timings = body["timings"]
    assert set(timings) == {
        *("queue", "preprocess", "encode", "transfer", "prefill", "decode", "transfer_bytes"),
        *("encode_ranks", "language_rank", "resumes", "cached_tokens", "items"),
    }
    assert timings["preprocess"] > 1  # 1 ms from the rank
    assert timings["queue"] >= 1
    assert timings["encode"] == 2
    assert timings["items"][0]["rows"] == 5


def test_logprobs_are_openais_with_token_ids_and_exact_bytes():
    tokenizer = tiny_processor().tokenizer
    part_of_a_character = tokenizer.encode("\u00e9")[0]
    eos = tokenizer.token_id("<|im_end|>")
    token_ids = [*tokenizer.encode("red"), part_of_a_character, eos]
    backend = FakeBackend(lambda prompt, sampling: answer_of(token_ids, sampling))
    asked = {**ASK, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    body = serve(backend).post(PATH, json=asked).json()
    [choice] = body["choices"]
    entries = choice["logprobs"]["content"]
    assert choice["token_ids"] == token_ids == [entry["token_id"] for entry in entries]
    assert body["prompt_token_ids"] == backend.handles[0].prompt.token_ids
    for entry in entries:
        assert set(entry) == {"token", "token_id", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        assert [top["token_id"] for top in entry["top_logprobs"]] == [entry["token_id"], 5]
        assert entry["top_logprobs"][1]["logprob"] == -9999.0  # JSON has no -Infinity
    assert entries[-1]["token"] == "<|im_end|>"
    assert bytes(entries[-2]["bytes"]) == b"\xc3"
    assert b"".join(bytes(entry["bytes"]) for entry in entries[:-2]) == b"red"
    assert backend.handles[0].sampling.logprobs == 2


def test_logprobs_without_alternatives():
    choice = serve(FakeBackend()).post(PATH, json={**ASK, "logprobs": True}).json()["choices"][0]
    assert {tuple(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]} == {()}


def test_what_is_asked_reaches_the_backend():
    backend = FakeBackend()
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "max_tokens": 9, "ignore_eos": True}
    assert serve(backend).post(PATH, json={**ASK, **fields}).status_code == 200
    sampling = backend.handles[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 3)
    assert (sampling.max_new_tokens, sampling.ignore_eos, sampling.logprobs) == (9, True, None)


def test_all_of_the_sampler_can_be_asked_for():
    backend = FakeBackend()
    fields = {
        "min_p": 0.1,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 1, "07": -1e300},
        "stop": "ant",
        "min_tokens": 3,
    }
    assert serve(backend).post(PATH, json={**ASK, **fields}).status_code == 200
    sampling = backend.handles[0].sampling
    expected = {**fields, "logit_bias": {5: 1.0, 7: -1e300}, "stop": ["ant"]}
    assert {name: getattr(sampling, name) for name in fields} == expected
    serve(backend).post(PATH, json={**ASK, "stop": ["a", "b"]})
    assert backend.handles[1].sampling.stop == ["a", "b"]


def test_max_completion_tokens_goes_before_max_tokens():
    backend = FakeBackend()
    serve(backend).post(PATH, json={**ASK, "max_tokens": 9, "max_completion_tokens": 1})
    assert backend.handles[0].sampling.max_new_tokens == 1


def test_an_end_token_that_is_a_word_is_not_in_the_text(monkeypatch):
    tokenizer = tiny_processor().tokenizer
    red, end = tokenizer.encode("red"), tokenizer.encode(" circle")[-1]
    monkeypatch.setattr(tiny_processor(), "generation", GenerationDefaults(frozenset({end})))
    backend = FakeBackend(lambda prompt, sampling: answer_of([*red, end], sampling))
    [choice] = serve(backend).post(PATH, json={**ASK, "return_token_ids": True}).json()["choices"]
    assert choice["message"]["content"] == "red"
    assert choice["token_ids"] == [*red, end]


def test_an_answer_that_is_cut_says_so():
    body = serve(FakeBackend()).post(PATH, json={**ASK, "max_tokens": 1}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 1


def test_defaults_are_the_checkpoints(monkeypatch):
    backend = FakeBackend()
    client = serve(backend)
    client.post(PATH, json=ASK)
    assert backend.handles[0].sampling.temperature == 0
    eos = tiny_processor().generation.eos_token_ids
    values = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    own = GenerationDefaults(eos, do_sample=True, own=values)
    monkeypatch.setattr(tiny_processor(), "generation", own)
    client.post(PATH, json=ASK)
    sampling = backend.handles[1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 20)
    assert sampling.repetition_penalty == 1.05


def test_an_answer_may_take_what_is_left_of_the_context():
    backend = FakeBackend()
    context = tiny_processor().config.text.max_position_embeddings
    for letters in ("q", "q" * 1000):
        reply = serve(backend).post(PATH, json={"messages": [{"role": "user", "content": letters}]})
        assert reply.status_code == 200, reply.text
        handle = backend.handles[-1]
        assert handle.sampling.max_new_tokens == context - len(handle.prompt.token_ids)
        assert handle.sampling.is_open_ended


def test_the_server_may_bound_answers_that_nobody_bounds():
    backend = FakeBackend()
    client = serve(backend, limits=Limits(max_answer_tokens=50))
    for fields in ({}, {"max_tokens": -1}, {"max_tokens": None}, {"n_predict": -2}):
        client.post(PATH, json={**ASK, **fields})
        assert backend.handles[-1].sampling.max_new_tokens == 50
    client.post(PATH, json={**ASK, "max_tokens": 60})
    assert (backend.handles[-1].sampling.max_new_tokens, backend.handles[-1].sampling.is_open_ended) == (60, False)


@pytest.mark.parametrize("stream", [False, True])
def test_hits_of_caches_are_told_unless_they_are_hidden(stream):
    def script(prompt, sampling):
        *steps, end = answer_steps("red", sampling)
        timings = msgspec.structs.replace(end.timings, cached_tokens=7)
        timings.items[0] = msgspec.structs.replace(timings.items[0], cached=True)
        return [*steps, FinishedEvent(end.finish_reason, timings)]

    told = {}
    for hidden in (False, True):
        client = serve(FakeBackend(script), limits=Limits(hide_cache_hits=hidden))
        fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        told[hidden] = client.post(PATH, json={**ASK, **fields}).text
    assert '"cached_tokens":7' in told[False]
    assert '"cached":true' in told[False]
    for sign in ('"cached_tokens":7', '"cached":true', '"rows"'):
        assert sign not in told[True]
    assert '"encode":0.0' in told[True], "zero would tell it too"
    assert '"cached_tokens":0' in told[True]


def test_images_reach_the_backend_in_order():
    backend = FakeBackend()
    parts = [{"type": "image_url", "image_url": {"url": uri(png(size))}} for size in ((64, 64), (128, 64))]
    content = [*parts, {"type": "text", "text": "?"}]
    assert serve(backend).post(PATH, json={"messages": [{"role": "user", "content": content}]}).status_code == 200
    prompt = backend.handles[0].prompt
    assert [item.param for item in prompt.items] == ["messages[0].content[0]", "messages[0].content[1]"]
    assert [len(data) for data in prompt.media] == [item.num_bytes for item in prompt.items]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "nobody_knows_this": {"a": [1]}},
        {"n": 1, "stop": [], "tools": [], "logit_bias": {}, "response_format": {"type": "text"}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0},
        {"temperature": None, "max_tokens": None, "stop": None, "stream": None, "stream_options": None, "model": None},
        {"top_logprobs": 0, "logprobs": True},
    ],
)
def test_fields_that_ask_for_nothing_are_tolerated(fields):
    reply = serve(FakeBackend()).post(PATH, json={**ASK, **fields})
    assert reply.status_code == 200, reply.text


def test_the_clients_timeout_reaches_the_backend():
    backend = FakeBackend()
    client = serve(backend)
    client.post(PATH, json=ASK, headers={"X-Request-Timeout-Ms": "5000"})
    client.post(PATH, json=ASK)
    assert 4 < backend.handles[0].timeout_s <= 5
    assert 599 < backend.handles[1].timeout_s <= 600


@pytest.mark.parametrize(("path", "body"), [(PATH, ASK), ("/v1/completions", {"prompt": "a"})])
def test_the_clients_target_for_the_first_token_reaches_the_backend_where_there_are_targets(path, body):
    for of_server, expected in ((2.0, [0.25, 2.0]), (FIRST_COME, [FIRST_COME, FIRST_COME])):
        backend = FakeBackend()
        client = serve(backend, limits=Limits(first_token_target_s=of_server))
        for headers in ({"X-First-Token-Target-Ms": "250"}, {}):
            assert client.post(path, json=body, headers=headers).status_code == 200
        assert [handle.target_s for handle in backend.handles] == expected


@pytest.mark.parametrize("of_server", [1.0, FIRST_COME])
@pytest.mark.parametrize("name", ["X-Request-Timeout-Ms", "X-First-Token-Target-Ms"])
def test_a_time_that_is_none_is_refused_by_the_headers_name(name, of_server):
    client = serve(FakeBackend(), limits=Limits(first_token_target_s=of_server))
    for good in ("1000", "86400000"):
        assert client.post(PATH, json=ASK, headers={name: good}).status_code == 200
    for bad in ("", "0", "-1", "1e3", "abc", "86400001", "9" * 30, "\u0661".encode()):
        reply = client.post(PATH, json=ASK, headers={name: bad})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == name
