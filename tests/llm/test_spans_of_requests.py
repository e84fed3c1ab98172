"""The spans of a whole way: each stage names the request that it was for, and the image."""

from __future__ import annotations

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core import spans
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.scenes import ask_scenes


def test_each_stage_names_its_requests_and_prefill_the_images_that_it_uses(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "ring", spans.SpanRing(10_000, 2**24))
    asked = [one for one in ask_scenes(tmp_path, seed=3, count=20) if len(one.images) == 1][:2]
    llm = LLM()
    llm.chat([one.messages() for one in asked], SamplingParams(max_new_tokens=6, ignore_eos=True))
    found, _, num_gone = spans.ring.after(0, 10_000)
    assert num_gone == 0
    by_name = {name: [one for one in found if one.name == name] for name in {one.name for one in found}}
    assert by_name.keys() >= {"preprocess", "encode", "send", "receive", "prefill", "decode"}
    requests = {name for one in by_name["prefill"] for name in one.requests}
    assert len(requests) == 2
    images = {(name, 0) for name in requests}
    for name in ("preprocess", "encode", "send", "receive", "prefill"):
        assert {item for one in by_name[name] for item in one.items} == images, name
        assert {request for one in by_name[name] for request in one.requests} == requests, name
    assert {request for one in by_name["decode"] for request in one.requests} == requests
    # The first token of an answer is that of its prompt's last chunk.
    assert sum(one.numbers["tokens"] for one in by_name["decode"]) == 2 * (6 - 1)
    for item in images:
        encoded = min(one.stop for one in by_name["encode"] if item in one.items)
        used = min(one.start for one in by_name["prefill"] if item in one.items)
        assert encoded <= used
    assert all(one.start <= one.stop for one in found)
