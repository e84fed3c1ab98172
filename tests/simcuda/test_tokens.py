"""The same tokens on a simulated GPU as on the CPU: text, an image, a clip, streams, known prefixes, preemption."""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
from pathlib import Path

import pytest
import torch

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.llm import transfer
from qwen3vl_disagg.transport.links import process_group_links
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.local import settled
from tests.support.random_model import cuda_config, random_language_model
from tests.support.scenes import ask_scenes
from tests.support.simcuda import ASYNC, EVENT, H2D, LATE, STAGED, WAITS, simulated, to_device

SAMPLING = SamplingParams(max_new_tokens=12, temperature=0.0)
ABOUT = "You are shown pictures of coloured shapes, and you say what is in them, in as few words as you can. "


@functools.cache
def conversations() -> list[list[dict]]:
    """Questions that the packaged checkpoint knows the answers of, so that these do not hang on a rounding: about one
    picture, about two, and about a picture that stands still in a clip."""
    with tempfile.TemporaryDirectory() as folder:
        asked = ask_scenes(Path(folder), seed=3, count=5)
        made = [one.messages() for one in asked]
        parts = asked[0].content()
    frames = [parts[0]["image_url"]["url"]] * 4
    made.append([{"role": "user", "content": [{"type": "video", "video": frames, "fps": 2.0}, parts[-1]]}])
    return [[{"role": "system", "content": ABOUT * 2}, *messages] for messages in made]


def answers(llm: LLM) -> tuple[list[list[int]], int, int]:
    """Token ids, the prompts' tokens that were known when all was asked again, and the bytes that were sent."""
    streamed = [""] * len(conversations())

    def on_text(number: int, piece: str) -> None:
        streamed[number] += piece

    first = llm.chat(conversations(), SAMPLING, on_text=on_text)
    again = llm.chat(conversations(), SAMPLING)
    assert [result.token_ids for result in again] == [result.token_ids for result in first]
    assert streamed == [result.text for result in first]
    assert settled(llm)
    num_sent = sum(r.timings.transfer_bytes for r in [*first, *again])
    return [r.token_ids for r in first], sum(r.timings.cached_tokens for r in again), num_sent


@functools.cache
def expected(dtype: str, quantize: str) -> list[list[int]]:
    return answers(LLM(dtype=dtype, quantize=quantize, device="cpu", kv_cache_gib=0.005))[0]


def check_llm(dtype: str, quantize: str, compile: str, caplog: pytest.LogCaptureFixture) -> None:
    wanted = expected(dtype, quantize)
    caplog.clear()
    with simulated() as watch:
        llm = LLM(dtype=dtype, quantize=quantize, compile=compile, kv_cache_gib=0.005, max_running=4)
        assert llm.device == torch.device("cuda", 0)
        assert llm.engine.scheduler.pool.page_size == 64
        assert llm.engine.runner.impl == ("sdpa" if compile == "off" else "flex")
        watch.reset()
        assert watch.graphs.num_captures == (0 if compile == "off" else 9)  # 1, 2 and 4 rows, and their picks
        found, num_known, num_sent = answers(llm)
        assert (watch.graphs.num_replays > 10) == (compile != "off")
        num_encoded = llm.transfer.pipeline.cache.num_bytes
        llm.transfer.close()
    assert found == wanted
    assert num_known > 100
    assert not watch.problems, str(watch)
    uploads = [place for (kind, place) in watch.counts if kind in (H2D, STAGED)]
    allowed = ["engine/sampler.py", "model/rope.py"]  # what stays for good
    assert all(place.split(":")[0] in allowed for place in uploads), str(watch)
    assert 0 < watch.bytes_of(LATE) <= num_encoded, "each row that is encoded comes down once"
    assert 0 < watch.bytes_of(ASYNC, "core/copies.py") <= num_sent, "each that is sent goes up once"
    waits = {place.split(":")[0] for kind, place in watch.counts if kind in WAITS}
    assert not [place for place in waits if place.startswith(("language/", "transport/", "core/", "protocol/"))]
    events = {place.split(":")[0] for kind, place in watch.counts if kind == EVENT}
    of_steps = set() if compile == "off" else {"engine/graphs.py"}
    assert {"encode/worker.py", *of_steps} <= events <= {"encode/worker.py", "encode/shared_gpu.py", *of_steps}
    assert watch.sdpa <= {(True, True, False, False)} or compile == "off"
    assert bool(watch.varlen) == (dtype == "bfloat16")  # the tower's attention
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_the_packaged_checkpoint_as_it_is(caplog):
    """In float32, which `grouped_mm` does not take there, by what `auto` means on a GPU."""
    check_llm("auto", "none", "auto", caplog)


def test_int8_in_bfloat16(caplog):
    check_llm("bfloat16", "int8", "auto", caplog)


@pytest.mark.acceptance
@pytest.mark.parametrize("compile", ["on", "off"])
@pytest.mark.parametrize("quantize", ["none", "int8", "float8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_ways(dtype, quantize, compile, caplog):
    check_llm(dtype, quantize, compile, caplog)


def test_rows_that_travel_between_two_processes(monkeypatch, caplog):
    """Over Gloo, through the host's memory, as from an encode rank to a language rank: the bits are the same."""
    monkeypatch.setattr(transfer, "in_process_links", lambda: process_group_links("127.0.0.1"))
    check_llm("bfloat16", "none", "off", caplog)


@pytest.mark.parametrize("compile", [True, False])
def test_requests_that_give_their_pages_back(compile):
    model = random_language_model(cuda_config(), seed=0)
    requests, sampling = make_requests(model, 3), SamplingParams(max_new_tokens=16, ignore_eos=True)
    small = {"page_size": 16, "kv_cache_gib": 4.5 * 16 * 3 * 2 * 2 * 16 * 4 / 2**30}
    wanted = {name: token_ids(events) for name, events in run(make_engine(model), requests, sampling).items()}
    with simulated() as watch:
        engine = make_engine(to_device(copy.deepcopy(model), watch), compile=compile, **small)
        assert engine.scheduler.pool.num_pages == 4
        found = {name: token_ids(events) for name, events in run(engine, requests, sampling).items()}
    assert found == wanted
    assert engine.scheduler.num_preempted > 0
    assert not watch.problems
    assert watch.of(*WAITS) > 12
    assert (watch.graphs.num_replays > 20) == compile
