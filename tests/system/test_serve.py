"""The served system under torchrun against `LLM` in one process: equal answers, deaths, and the way down."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.clips import encode_clip, noise_frames, png_frames
from tests.support.images import uri
from tests.support.media_bytes import encode, picture
from tests.support.media_clips import CLIPS
from tests.support.media_hostile import HOSTILE_IMAGES
from tests.support.running import wait_for
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Server

SAMPLING = SamplingParams(max_new_tokens=64, logprobs=1)
SEED = 4242
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[Asked]:
    count = 200 if os.environ.get("Q3VL_ACCEPTANCE") else 36
    return ask_scenes(tmp_path_factory.mktemp("scenes"), seed=SEED, count=count)


@pytest.fixture(scope="module")
def expected(asked) -> list[Any]:
    return LLM().chat([entry.messages() for entry in asked], SAMPLING)


def ask_all(server: Server, asked: list[Asked], at_once: int = 8) -> list[tuple[int, Any]]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda entry: server.chat(entry.content()), asked))


def check_equal(answers: list[tuple[int, Any]], expected: list[Any]) -> None:
    """Token ids equal, logprobs within 1e-4."""
    for (status, answer), mine in zip(answers, expected, strict=True):
        assert status == 200, answer
        choice = answer["choices"][0]
        assert choice["token_ids"] == mine.token_ids
        assert answer["prompt_token_ids"] == mine.prompt_token_ids
        assert choice["message"]["content"] == mine.text
        entries = choice["logprobs"]["content"]
        assert [entry["token_id"] for entry in entries] == mine.token_ids
        for entry, own in zip(entries, mine.logprobs, strict=True):
            assert abs(entry["logprob"] - own.logprob) < 1e-4


def rank_pid(server: Server, role: str, rank: int) -> int:
    [pid] = [p["pid"] for p in server.processes() if p["role"] == role and p.get("rank") == rank]
    return pid


def check_split(world: int, encode_ranks: int, asked: list[Asked], expected: list[Any]) -> None:
    with Server(world, "--encode-ranks", str(encode_ranks)) as server:
        pids = [process["pid"] for process in server.processes() if process["role"] == "language"]
        assert len(pids) == max(1, world - encode_ranks)
        # What grammars need is there before the first one.
        wait_for(lambda: all("llguidance" in Path(f"/proc/{pid}/maps").read_text() for pid in pids), 30)
        answers = ask_all(server, asked)
        check_equal(answers, expected)
        sampled = {"temperature": 1.5, "max_tokens": 8}
        several = server.chat(asked[0].content(), **sampled, seed=5, n=2)[1]
        single = [server.chat(asked[0].content(), **sampled, seed=seed)[1]["choices"][0] for seed in (5, 6)]
        assert [one["token_ids"] for one in several["choices"]] == [one["token_ids"] for one in single]
        timings = [answer["timings"] for _, answer in answers]
        pairs = [t for t, entry in zip(timings, asked, strict=True) if len(entry.images) == 2]
        if encode_ranks > 1:
            assert any(len(t["encode_ranks"]) == 2 for t in pairs)
        if world - encode_ranks > 1:
            assert len({t["language_rank"] for t in timings}) > 1
        hidden = 128
        for t, entry in zip(timings, asked, strict=True):
            rows = sum(item["rows"] for item in t["items"])
            assert len(t["items"]) == len(entry.images)
            if world > 1:
                assert rows * 4 * hidden * 4 <= t["transfer_bytes"] <= 1.1 * rows * 4 * hidden * 4

        check_metrics(server, answers, world)
        check_sampling(server, asked[0])
        check_grammars(server, asked)
        check_clips(server)
        check_media_that_an_encode_rank_refuses(server)
        check_notes_of_files_without_their_end(server)


def check_metrics(server: Server, answers: list[tuple[int, Any]], world: int) -> None:
    """They hold what clients counted; each request has its line in the log."""

    def told() -> dict[str, float]:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
            text = reply.read().decode()
        sums: dict[str, float] = {}
        for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
            if sample.labels.get("path", PATH) == PATH:
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
        return sums

    wait_for(lambda: told()["q3vl_engine_steps_total"] > 0, 20)  # ranks speak every second
    sums, bodies = told(), [answer for _, answer in answers]
    items = [item for body in bodies for item in body["timings"]["items"] if item["encode_rank"] >= 0]
    assert sums["q3vl_http_requests_total"] == len(bodies) + 3  # those of `several` and `single`
    assert sums["q3vl_request_success_total"] == len(bodies) + 4
    assert sums["q3vl_generation_tokens_total"] >= sum(body["usage"]["completion_tokens"] for body in bodies)
    assert sums["q3vl_mm_cache_queries_total"] >= len(items)
    assert sums["q3vl_encoder_transfer_bytes_total"] >= sum(item["transfer_bytes"] for item in items)
    assert sums["q3vl_rank_up"] == max(world, 2)
    log = server.output()
    assert all(f" id={body['id'].removeprefix('chatcmpl-')} " in log for body in bodies)


def check_clips(server: Server) -> None:
    """A file and a list of frames, each with an image. A broken file is the client's fault, and the next is served."""
    frames = noise_frames(8, 64, 96)
    film = base64.b64encode(encode_clip(frames, fps=4)).decode()
    stills = [f"data:image/png;base64,{base64.b64encode(frame).decode()}" for frame in png_frames(frames)]
    picture = {"type": "image_url", "image_url": {"url": stills[0]}}
    question = {"type": "text", "text": "What is at the top left?"}
    clips = [
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{film}"}},
        {"type": "video", "video": stills, "fps": 4},
    ]
    contents = [[clip, picture, question] for clip in clips]
    expected = LLM().chat([[{"role": "user", "content": content}] for content in contents], SAMPLING)
    broken = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{film[: len(film) // 8 * 4]}"}}
    status, answer = server.chat([question, broken])
    assert (status, answer["error"]["param"]) == (400, "messages[0].content[1]")
    answers = [server.chat(content) for content in contents]
    check_equal(answers, expected)
    for (_, answer), mine in zip(answers, expected, strict=True):
        assert [item["rows"] for item in answer["timings"]["items"]] == [item.rows for item in mine.timings.items]


def check_media_that_an_encode_rank_refuses(server: Server) -> None:
    """What no header tells: an image cut off, a clip whose size changes, an image that takes too long. The error's code
    comes through, and a streamed answer has not begun."""
    entries = [
        ("image", encode(picture(), "JPEG")[:700], "damaged or cut off", 400, "invalid_request"),
        ("video", CLIPS["avi whose size changes"][0](), "the size of the frames changes", 400, "invalid_request"),
        ("image", HOSTILE_IMAGES["jpeg of 3,000 scans"][0](), "takes too long", 504, "media_timeout"),
    ]
    for modality, data, message, expected, code in entries:
        kind = f"{modality}_url"
        part = {"type": kind, kind: {"url": f"data:;base64,{base64.b64encode(data).decode()}"}}
        status, answer = server.chat([{"type": "text", "text": "?"}, part], stream=modality == "video")
        assert status == expected, answer
        assert (answer["error"]["code"], answer["error"]["param"]) == (code, "messages[0].content[1]")
        assert message in answer["error"]["message"]


def check_notes_of_files_without_their_end(server: Server) -> None:
    """Each time, also when nothing is sent because the pages are there."""
    images = [encode(picture(), "JPEG"), encode(picture(), "JPEG")[:-2]]
    parts = [{"type": "image_url", "image_url": {"url": uri(image)}} for image in images]
    for _ in range(3):
        status, answer = server.chat([*parts, {"type": "text", "text": "What is it?"}])
        assert status == 200, answer
        whole, cut = (item["note"] for item in answer["timings"]["items"])
        assert not whole
        assert "lacks its end" in cut


def check_sampling(server: Server, entry: Asked) -> None:
    """The same seed, penalties and stop string give the same answer as in one process."""
    fields = {"temperature": 1.5, "top_k": 30, "min_p": 0.01, "frequency_penalty": 0.5, "seed": 11}
    llm = LLM()
    sampling = SamplingParams(max_new_tokens=64, logprobs=1, **fields)
    [plain] = llm.chat([entry.messages()], sampling)
    check_equal([server.chat(entry.content(), **fields)], [plain])
    words = {
        "bad_words": [llm.processor.tokenizer.decode(plain.token_ids[:1])],
        "allowed_token_ids": sorted({*plain.token_ids, *range(40, 90)}),
    }
    [narrow] = llm.chat([entry.messages()], SamplingParams(max_new_tokens=64, logprobs=1, **words, **fields))
    check_equal([server.chat(entry.content(), **words, **fields)], [narrow])
    assert narrow.token_ids[0] != plain.token_ids[0]
    assert set(narrow.token_ids) <= set(words["allowed_token_ids"])
    stop = plain.text[2:6]
    [cut] = llm.chat([entry.messages()], SamplingParams(max_new_tokens=64, logprobs=1, stop=[stop], **fields))
    status, answer = server.chat(entry.content(), stop=stop, **fields)
    check_equal([(status, answer)], [cut])
    assert cut.text == plain.text[:2]
    assert answer["choices"][0]["finish_reason"] == cut.finish_reason == "stop"
    assert answer["usage"]["completion_tokens"] == len(cut.token_ids)
    assert answer["timings"]["prefill"] > 0
    assert len(answer["timings"]["items"]) == len(entry.images)


SCHEMA = {
    "type": "object",
    "properties": {"left": {"enum": ["red", "blue", None]}, "number": {"type": "integer", "maximum": 99}},
    "required": ["left", "number"],
    "additionalProperties": False,
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def check_grammars(server: Server, asked: list[Asked]) -> None:
    """Answers with and without grammars at once, on all language ranks; the same as in one process."""
    fields: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"guided_choice": ["a circle", "a square"], "ignore_eos": True},
        {},
        {"tools": [LOOK], "tool_choice": "required", "parallel_tool_calls": False},
    ]
    bias = {"logit_bias": {str(i): 20 for i in json_ends()}, "max_tokens": 120, "temperature": 1.0, "seed": 3}
    with ThreadPoolExecutor(8) as pool:
        entries = [asked[i % 4].content() for i in range(8)]
        answers = list(pool.map(lambda i: server.chat(entries[i], **bias, **fields[i % 4]), range(8)))
    choices = [answer["choices"][0] if status == 200 else answer for status, answer in answers]
    for i in (0, 4):
        assert choices[i]["finish_reason"] == "stop", choices[i]
        found = json.loads(choices[i]["message"]["content"])
        assert found.keys() == {"left", "number"}
        assert found["left"] in ("red", "blue", None)
    assert {choices[i]["message"]["content"] for i in (1, 5)} <= {"a circle", "a square"}
    for i in (3, 7):
        assert choices[i]["finish_reason"] == "tool_calls", choices[i]
        [call] = choices[i]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]).keys() == {"left", "number"}
    grammar = Grammar.of_choice(["a circle", "a square"])
    sampling = SamplingParams(max_new_tokens=64, logprobs=1, grammar=grammar)
    expected = LLM().chat([asked[0].messages()], sampling)
    check_equal([server.chat(asked[0].content(), choice=["a circle", "a square"])], expected)
    status, answer = server.chat("?", guided_json={"not": {}})
    assert (status, answer["error"]["param"]) == (400, "guided_json")


def json_ends() -> list[int]:
    tokenizer = LLM().processor.tokenizer
    return [token_id for text in '"}' for token_id in tokenizer.encode(text)]


def test_four_ranks_answer_as_one_process(asked, expected):
    check_split(4, 2, asked, expected)


def test_one_worker_runs_both_roles(asked, expected):
    check_split(1, 1, asked[:12], expected[:12])


WHOLE_JOB = pytest.param(8, 2, 50, marks=[pytest.mark.acceptance, pytest.mark.timeout(600)])


@pytest.mark.parametrize(("world", "encode_ranks", "at_once"), [(3, 1, 8), WHOLE_JOB])
def test_an_encode_rank_is_killed_under_load_and_nothing_is_lost(world, encode_ranks, at_once, asked, expected):
    many, wanted = (asked * 2)[:50], (expected * 2)[:50]
    with Server(world, "--encode-ranks", str(encode_ranks)) as server, ThreadPoolExecutor(at_once) as pool:
        victim = rank_pid(server, "encode", 0)
        futures = [pool.submit(server.chat, entry.content()) for entry in many]
        while sum(future.done() for future in futures) < 5:
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        check_equal([future.result(120) for future in futures], wanted)
        server.remember_pids()
        wait_until_whole(server)
        assert rank_pid(server, "encode", 0) != victim
        answers = ask_all(server, many)
        check_equal(answers, wanted)
        assert any(0 in answer["timings"]["encode_ranks"] for _, answer in answers)


def wait_until_whole(server: Server, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while server.get("/ready")["degraded"]:
        assert time.monotonic() < deadline, server.get("/ready")
        time.sleep(0.05)


@pytest.mark.parametrize(("world", "encode_ranks", "at_once"), [(3, 1, 12), WHOLE_JOB])
def test_sigterm_under_load_ends_every_request_and_every_process(world, encode_ranks, at_once, asked):
    with Server(world, "--encode-ranks", str(encode_ranks)) as server, ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(_status, server, entry) for entry in (asked * 5)[:100]]
        while sum(future.done() for future in futures) < 3:
            time.sleep(0.01)
        server.remember_pids()
        server.process.send_signal(signal.SIGTERM)
        statuses = [future.result(60) for future in futures]
        server.process.wait(40)
        assert set(statuses) <= {200, 503, "refused"}
        assert statuses.count(200) >= 3
        deadline = time.monotonic() + 5
        while server.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.alive()
        # A slot says when a child did not leave with status 0. The one traceback is torchrun's own, about the signal.
        for word in ("did not leave", "killed by", ": exit ", "Exception in"):
            assert word not in server.output(), server.output()
        assert server.output().count("Traceback") == server.output().count("got signal: 15") == 1


@pytest.mark.acceptance
@pytest.mark.timeout(300)
def test_sigterm_on_a_busy_host_ends_every_process_in_time(asked):
    """Two processes keep both cores busy beside eight ranks; the last requests come with the signal."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with Server(8, "--encode-ranks", "2", ready_s=240) as server, ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(_status, server, entry) for entry in (asked * 9)[:200]]
            while sum(future.done() for future in futures) < 3:
                time.sleep(0.01)
            server.remember_pids()
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            while server.alive() and time.monotonic() - started < 40:
                time.sleep(0.05)
            seconds = time.monotonic() - started
            print(f"left {seconds:.1f} s after SIGTERM")
            assert seconds < 30
            server.process.wait(60)  # torchrun itself ends as Python programs do
            assert {future.result(60) for future in futures} <= {200, 429, 503, "refused"}
            assert not server.alive()
            for word in ("did not leave", "killed by", ": exit ", "Exception in", "forcefully", "left over"):
                assert word not in server.output(), server.output()
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def _status(server: Server, entry: Asked) -> int | str:
    try:
        return server.chat(entry.content())[0]
    except (ConnectionError, urllib.request.URLError):
        return "refused"


def test_bad_input_is_a_4xx_and_the_next_good_request_succeeds(asked, expected):
    good = asked[0].content()
    image = asked[0].images[0].read_bytes()
    import base64

    def data_uri(data: bytes) -> list[dict[str, Any]]:
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        return [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "?"}]

    bad: list[dict[str, Any]] = [
        {"content": data_uri(image[: len(image) // 2])},
        {"content": data_uri(b"not an image")},
        {"content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]},
        {"content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
        {"content": good, "temperature": -1},
        {"content": good, "max_tokens": 0},
        {"content": good, "max_tokens": 10**9},
        {"content": "word " * 5000},
        {"content": good, "model": "no-such-model"},
        {"content": good, "stream": True, "top_p": 7},
    ]
    with Server(2) as server:
        for fields in bad:
            status, body = server.chat(**fields)
            assert 400 <= status < 500, (fields, status, body)
            assert set(body["error"]) == {"message", "type", "param", "code"}
        broken = {"stream": True, "messages": [{"role": "user", "content": data_uri(image[: len(image) // 2])}]}
        status, body = server.post("/v1/chat/completions", broken)
        assert status == 400
        check_equal([server.chat(good)], expected[:1])
        assert stream_text(server, good) == expected[0].text


def stream_text(server: Server, content: Any) -> str:
    body = {"messages": [{"role": "user", "content": content}], "stream": True, "temperature": 0}
    request = urllib.request.Request(
        server.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = [line.decode().strip() for line in response]
    chunks = [line[6:] for line in lines if line.startswith("data: ")]
    assert chunks[-1] == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks[:-1]]
    assert len({chunk["id"] for chunk in parsed}) == 1
    assert "timings" in parsed[-1]
    return "".join(choice["delta"].get("content") or "" for chunk in parsed for choice in chunk["choices"])


@pytest.mark.acceptance
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("world", "encode_ranks"), [(1, 1), (2, 1), (3, 1), (4, 1), (4, 3), (8, 2), (8, 3), (8, 4)])
def test_every_split_answers_as_one_process(world, encode_ranks, asked, expected):
    check_split(world, encode_ranks, asked, expected)
