"""Tower and decoder of one process on one GPU: neither stalls the other, and none sees what is not there yet."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core import copies
from qwen3vl_disagg.core.errors import DeviceLost, DisaggError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode import shared_gpu
from tests.support.local import settled
from tests.support.simcuda import Watch, simulated

TEXT = [{"role": "user", "content": "Count to a thousand."}]
LONG = SamplingParams(max_new_tokens=200, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=4, temperature=0.0, ignore_eos=True)


@functools.cache
def burst(count: int) -> list[dict]:
    """So many pictures of one size in one turn."""
    parts = []
    for seed in range(count):
        levels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(levels).resize((96, 96)).save(data, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is there?"}]}]


def observed(watch: Watch, monkeypatch: pytest.MonkeyPatch, **options: float) -> tuple[LLM, list[str]]:
    """An LLM, and what runs: each block of the tower and decode step, with the stream that it is on."""
    llm = LLM(kv_cache_gib=0.02, max_running=4, encode_options=EncodeOptions(**options))
    log, tower, engine = list[str](), llm.transfer.worker.model.visual, llm.engine
    gpu = llm._requests._gpu
    names = {0: "default", gpu._tower.number: "tower", gpu._decoder.number: "decoder"}

    def told(what, run):
        def call(*args):
            log.append(f"{what} on {names[watch.order.current]}")
            return run(*args)

        return call

    monkeypatch.setattr(tower, "step", told("block", tower.step))
    monkeypatch.setattr(engine.sampler.captured, "ids", told("decode", engine.sampler.captured.ids))
    monkeypatch.setattr(engine.runner, "prefill", told("prefill", engine.runner.prefill))
    return llm, log


def hold_until_it_decodes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is cut up before the engine has taken some decode steps."""
    decoding, preprocess = threading.Event(), llm.transfer.worker.preprocess

    def held(*args):
        assert decoding.wait(20)
        return preprocess(*args)

    pick, seen = llm.engine.sampler.captured.ids, []

    def counted(*args):
        seen.append(1)
        if len(seen) == 3:
            decoding.set()
        return pick(*args)

    monkeypatch.setattr(llm.transfer.worker, "preprocess", held)
    monkeypatch.setattr(llm.engine.sampler.captured, "ids", counted)


def test_decode_steps_come_between_the_blocks_of_a_burst_of_images(monkeypatch):
    """With a budget of a block: the text that is being answered gets a token, or two, for each."""
    monkeypatch.setattr(shared_gpu, "FIRST", 1.0)
    monkeypatch.setattr(shared_gpu, "MOST", 1.0)
    monkeypatch.setattr(shared_gpu, "STALE_S", 30.0)
    with simulated() as watch:
        llm, log = observed(watch, monkeypatch, vision_batch_tokens=0)
        hold_until_it_decodes(llm, monkeypatch)
        results = llm.chat([TEXT, burst(12)], [LONG, SHORT])
        assert settled(llm)
        assert not watch.problems, str(watch)
        llm.transfer.close()
    assert [len(result.token_ids) for result in results] == [200, 4]
    assert {name for name in log if "block" in name} == {"block on tower"}
    assert {name for name in log if "block" not in name} == {"prefill on decoder", "decode on decoder"}
    kinds = [name[0] for name in log]
    blocks = [place for place, kind in enumerate(kinds) if kind == "b"]
    assert len(blocks) == 12 * llm.config.vision.depth
    between = [kinds[one:other].count("d") for one, other in itertools.pairwise(blocks)]
    assert min(between) >= 1, "".join(kinds)
    assert kinds[blocks[-1] :].count("d") > 4  # it was being answered until after the last


def test_rows_are_read_on_the_decoders_stream_behind_their_upload(monkeypatch):
    """Also while the host waits for nothing but tokens and the tower."""
    with simulated() as watch:
        llm, log = observed(watch, monkeypatch)
        found = [llm.chat([burst(2)], SHORT)[0].token_ids for _ in range(2)]
        assert found[0] == found[1]
        assert "prefill on decoder" in log
        assert not watch.problems, str(watch)
        llm.transfer.close()


def test_without_that_order_it_would_be_chance(monkeypatch):
    monkeypatch.setattr(copies.Uploads, "reading", lambda *_: contextlib.nullcontext())
    with simulated() as watch:
        llm, _ = observed(watch, monkeypatch)
        with pytest.raises(DisaggError):
            llm.chat([burst(2)], SHORT)
        assert any("reads what stream" in problem for problem in watch.problems)
        llm.transfer.close()


def test_a_gpu_that_is_lost_in_the_tower_ends_the_llm(monkeypatch):
    """On a thread of its own, and all the same whoever waits for the answer is told."""
    with simulated() as watch:
        llm, _ = observed(watch, monkeypatch)

        def lost(*_):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(llm.transfer.worker.model.visual, "step", lost)
        with pytest.raises(DeviceLost, match="illegal memory access"):
            llm.chat([burst(2)], SHORT)
        llm.transfer.close()
