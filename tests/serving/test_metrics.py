"""What Prometheus and the log are told is what clients saw."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from qwen3vl_disagg.cluster.backend import AllDecoded, FinishedEvent, TokenEvent
from qwen3vl_disagg.core.errors import InputError, ServerError
from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings
from qwen3vl_disagg.protocol.messages import EncodeLoad, LanguageLoad
from qwen3vl_disagg.serving import metrics as metrics_module
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.guard import MAX_LINES
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.metrics import MAX_AGE_S, MAX_RANKS, REST, Metrics
from qwen3vl_disagg.serving.watching import STAGES
from tests.support.asgi import is_on_a_loop
from tests.support.fake_backend import ASK, PATH, FakeBackend, answer_steps, serve
from tests.support.pooling import pooling_processor


def scraped(client, **options: Any) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) -> value."""
    text = client.get("/metrics", **options).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(s.name, *(s.labels[name] for name in sorted(s.labels))): s.value for s in samples}


@pytest.fixture
def lines(caplog) -> list[dict[str, Any]]:
    """Fields of all lines so far."""
    caplog.set_level(logging.INFO, "qwen3vl_disagg.events")

    class Lines(list):
        def __iter__(self):
            return iter([record.q3vl_fields for record in caplog.records if hasattr(record, "q3vl_fields")])

    return Lines()


def test_counts_are_those_of_the_client():
    client = serve(FakeBackend())
    sent: dict[str, int] = {}
    usage = {"prompt_tokens": 0, "completion_tokens": 0}
    for fields in [{}, {"stream": True}, {"n": 2}, {"temperature": -1}, {}, {"stop": "red"}]:
        reply = client.post(PATH, json={**ASK, **fields})
        sent[str(reply.status_code)] = sent.get(str(reply.status_code), 0) + 1
        if reply.status_code == 200 and "stream" not in fields:
            for name in usage:
                usage[name] += reply.json()["usage"][name]
    told = scraped(client)
    assert {status: told["q3vl_http_requests_total", PATH, status] for status in sent} == sent == {"200": 5, "400": 1}
    streamed = scraped(serve(FakeBackend()))  # another server counts for itself
    assert not any(value for (name, *_), value in streamed.items() if name == "q3vl_request_success_total")
    assert told["q3vl_request_success_total", "stop"] == 6
    whole = client.post(PATH, json=ASK).json()["usage"]
    assert told["q3vl_prompt_tokens_total",] == usage["prompt_tokens"] + whole["prompt_tokens"]
    assert told["q3vl_generation_tokens_total",] == usage["completion_tokens"] + whole["completion_tokens"]
    assert told["q3vl_time_to_first_token_seconds_count",] == told["q3vl_e2e_request_latency_seconds_count",] == 6
    gaps = told["q3vl_generation_tokens_total",] - 6
    assert told["q3vl_inter_token_latency_seconds_count",] == gaps


@pytest.mark.parametrize("hides", [False, True])
def test_images_are_counted_by_their_rank_and_a_hit_has_no_time_in_the_tower(hides):
    items = [
        ItemTimings(queue=5, preprocess=10, encode=20, transfer=3, transfer_bytes=100, encode_rank=1),
        ItemTimings(queue=1, transfer=4, transfer_bytes=50, encode_rank=1, cached=True),
        ItemTimings(),  # in the prefix cache
    ]
    timings = RequestTimings(items=items, cached_tokens=7)

    def script(_, sampling):
        told = (TokenEvent, FinishedEvent)
        steps = answer_steps("red", sampling)
        return [structs.replace(s, timings=timings) if isinstance(s, told) and s.timings else s for s in steps]

    backend = FakeBackend(script)
    backend.loads = {("encode", 0): EncodeLoad(num_items=6)}
    client = serve(backend, limits=Limits(hide_cache_hits=hides))
    assert len(client.post(PATH, json={**ASK, "n": 2}).json()["timings"]["items"]) == 3 * (not hides)
    told = scraped(client)
    if hides:  # from the sums, too: one who asks twice sees what was there
        assert not [name for name, *_ in told if "encoder" in name or "mm_cache" in name]
        assert told["q3vl_prefix_cache_queries_total",] == told["q3vl_prefix_cache_hits_total",] == 0
        return
    assert told["q3vl_encoder_items_total", "0", "encode"] == 6
    assert told["q3vl_mm_cache_queries_total", "1"] == 2
    assert told["q3vl_mm_cache_hits_total", "1"] == 1
    assert told["q3vl_encoder_transfer_bytes_total", "1"] == 150
    sums = {name: told[f"q3vl_encoder_{name}_seconds_sum", "1"] for name in ("queue_wait", "preprocess", "transfer")}
    assert sums == pytest.approx({"queue_wait": 0.006, "preprocess": 0.01, "transfer": 0.007})
    assert told["q3vl_encoder_model_forward_seconds_count", "1"] == 1
    assert told["q3vl_prefix_cache_hits_total",] == 7


def test_ranks_without_end_share_a_label():
    metrics = Metrics(FakeBackend())
    for rank in range(MAX_RANKS + 20):
        metrics.prompted(1, RequestTimings(items=[ItemTimings(encode_rank=rank)]))
    values = metrics._registry.get_sample_value
    assert values("q3vl_mm_cache_queries_total", {"encode_rank": "others"}) == 20
    assert values("q3vl_mm_cache_queries_total", {"encode_rank": str(MAX_RANKS)}) is None


def test_series_of_ranks_that_have_left_go_after_a_while(monkeypatch):
    backend, now = FakeBackend(), [100.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    metrics = Metrics(backend)

    def series() -> set[str]:
        samples = [sample for family in metrics._registry.collect() for sample in family.samples]
        return {sample.labels["encode_rank"] for sample in samples if "encode_rank" in sample.labels}

    def encoded(rank: int) -> None:
        metrics.prompted(1, RequestTimings(items=[ItemTimings(encode_rank=rank)]))

    there = {("encode", 0): None, ("encode", 7): None}
    backend.rank_loads = lambda: there
    encoded(0)
    encoded(7)
    del there["encode", 7]
    now[0] += metrics_module.GONE_S - 1
    encoded(8)
    assert series() == {"0", "7", "8"}
    now[0] += 1
    encoded(9)
    assert series() == {"0", "8", "9"}
    for _ in range(3):
        for rank in range(100, 100 + 2 * MAX_RANKS):
            encoded(rank)
        assert len(series()) == MAX_RANKS + 1
        now[0] += metrics_module.GONE_S


def test_what_breaks_off_has_its_tokens_and_its_error(lines):
    steps = [AllDecoded(), TokenEvent(40), TokenEvent(41), ServerError("broken", code="engine_error")]
    client = serve(FakeBackend(lambda *_: [*steps]))
    assert client.post(PATH, json={**ASK, "stream": True}).status_code == 200
    told = scraped(client)
    assert told["q3vl_generation_tokens_total",] == 2
    assert told["q3vl_request_failure_total", "engine_error"] == 1
    assert not any(value for (name, *_), value in told.items() if name == "q3vl_request_success_total")
    [line] = lines
    assert (line["status"], line["tokens"], line["finish"]) == (200, 2, "engine_error")
    assert line["prompt_tokens"] > 0


def test_ranks_are_as_they_said():
    backend = FakeBackend()
    language = LanguageLoad(running=3, waiting=2, kv_pages_used=5, kv_pages=20, num_steps=9, num_preemptions=1)
    encode = EncodeLoad(running=1, waiting=4, cache_bytes=8, num_items=6, num_batches=2)
    backend.loads = {("language", 2): language, ("encode", 0): encode, ("encode", 1): None}
    told = scraped(serve(backend))
    assert told["q3vl_ready",] == 1
    assert [told["q3vl_rank_up", *rank] for rank in (("2", "language"), ("0", "encode"), ("1", "encode"))] == [1, 1, 0]
    assert told["q3vl_num_requests_waiting", "2", "language"] == 2
    assert told["q3vl_num_requests_waiting", "0", "encode"] == 4
    assert told["q3vl_kv_cache_usage_perc", "2", "language"] == 0.25
    assert told["q3vl_num_preemptions_total", "2", "language"] == 1
    assert told["q3vl_encoder_items_total", "0", "encode"] == 6


def test_openmetrics_is_spoken_and_paths_that_are_none_are_one():
    client = serve(FakeBackend())
    for number in range(5):
        client.get(f"/nothing/{number}")
    reply = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=x"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert reply.text.endswith("# EOF\n")
    assert scraped(client)["q3vl_http_requests_total", "other", "404"] == 5


def test_a_request_has_a_line(lines):
    client = serve(FakeBackend(), keys=ApiKeys(["first", "second"]))
    headers = {"Authorization": "Bearer second", "X-Request-ID": "mine"}
    usage = client.post(PATH, json=ASK, headers=headers).json()["usage"]
    [line] = lines
    told = [line[name] for name in ("request_id", "method", "path", "status", "key")]
    assert told == ["mine", "POST", PATH, 200, 2]
    assert line["id"] == "r0"
    assert (line["prompt_tokens"], line["tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert line["finish"] == "stop"
    assert {*STAGES} <= line.keys()
    assert not any(ASK["messages"][0]["content"] in str(value) for value in line.values())
    client.get("/health")
    client.get("/metrics", headers=headers)
    assert len([*lines]) == 1
    client.get("/a%20status=200%0Ab", headers={"X-Request-ID": "no name"})
    assert [*lines][1]["status"] == 401
    assert [*lines][1]["path"] == "/a%20status%3D200%0Ab"
    assert "id" not in [*lines][1]


def test_what_failed_has_its_status_and_no_numbers(lines):
    client = serve(FakeBackend(lambda *_: [InputError("bad", param="messages")]))
    assert client.post(PATH, json=ASK).status_code == 400
    [line] = lines
    assert line["status"] == 400
    assert "tokens" not in line


def test_a_flood_of_requests_does_not_fill_the_log(lines, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("qwen3vl_disagg.serving.guard.time.monotonic", lambda: now[0])
    client = serve(FakeBackend())
    for _ in range(MAX_LINES + 30):
        client.get("/nothing")
    assert len([*lines]) == MAX_LINES
    client.post(PATH, json=ASK)  # what ranks have answered has its line
    assert len([*lines]) == MAX_LINES + 1
    now[0] += 1
    client.get("/nothing")
    assert len([*lines]) == MAX_LINES + 2


def test_answers_and_prompts_without_end_make_one_short_line(lines):
    client = serve(FakeBackend())
    prompts = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 3}
    client.request("POST", "/v1/completions", json=prompts)
    client.request("A" * 300, "/nothing")
    first, second = lines
    assert (first["id"], first["finish"]) == ("r0..r5", "stop:6")
    assert len(second["method"]) < 50


def test_the_board_shows_what_there_is():
    board = json.loads((Path(__file__).parent.parent.parent / "tools" / "grafana.json").read_text())
    shown = {
        name
        for panel in board["panels"]
        for one in panel["targets"]
        for name in re.findall("q3vl_[a-z_0-9]+", one["expr"])
    }
    text = serve(FakeBackend()).get("/metrics").text
    there = {name for name in shown if re.search(f"^# TYPE {re.sub('_bucket$', '', name)} ", text, re.MULTILINE)}
    assert shown == there
    assert len(shown) > 15


def test_one_bad_prompt_of_several_is_why_all_have_failed(tmp_path):
    steps = [[InputError("bad", param="input", code="harmful_media")], [60.0], [60.0]]
    client = serve(FakeBackend(lambda *_: [0.01, *steps.pop(0)]), processor=pooling_processor(tmp_path / "m", "embed"))
    assert client.post("/v1/embeddings", json={"input": ["a", "b", "c"]}).status_code == 400
    told = scraped(client)
    assert told["q3vl_request_failure_total", "harmful_media"] == 3
    assert ("q3vl_request_failure_total", "left") not in told


@pytest.mark.parametrize("seconds", [0.01, 0.2])
def test_a_page_is_made_beside_the_loop_and_seldom_however_often_it_is_asked_for(seconds, monkeypatch):
    made, now = list[bool](), [100.0]

    def slow(registry) -> bytes:
        made.append(is_on_a_loop())
        time.sleep(0.01)
        now[0] += seconds
        return b"page %d" % len(made)

    monkeypatch.setattr(metrics_module.exposition, "generate_latest", slow)
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    backend = FakeBackend()
    metrics = Metrics(backend)
    looked = list[bool]()
    monkeypatch.setattr(backend, "rank_loads", lambda: looked.append(is_on_a_loop()) or {})

    async def ask() -> bytes:
        return (await metrics.show(Request({"type": "http", "headers": []}))).body

    async def scenario() -> None:
        assert set(await asyncio.gather(*[ask() for _ in range(50)])) == {b"page 1"}
        now[0] += 0.99 * min(REST * seconds, MAX_AGE_S)
        assert await ask() == b"page 1"
        now[0] += 0.02 * min(REST * seconds, MAX_AGE_S)
        assert await ask() == b"page 2"

    asyncio.run(scenario())
    assert made == [False, False], "on a thread"
    assert looked == [True, True], "what ranks said is read where it is written"
