"""`LLM` with pages that are found again, and with too few of them: the same answers, and no more rows than needed."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import BufferOptions
from qwen3vl_disagg.encode.worker import EncodeWorker
from qwen3vl_disagg.engine.engine import EngineOptions
from tests.support.local import settled
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint
from tools.make_checkpoint import write_small_tokenizer

SAMPLING = SamplingParams(max_new_tokens=6, logprobs=2, ignore_eos=True)
PAGE = 4


def picture(seed: int, rows: int, columns: int) -> dict:
    """An image of rows x columns merged patches."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (32 * rows, 32 * columns, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def turn(*parts: dict | str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


A, B, C = picture(1, 3, 5), picture(2, 4, 4), picture(3, 2, 7)
TURNS = [
    turn(A, "what is it"),
    turn(A, "what is it not"),
    turn(A, B, "which one"),
    turn(A, C, "which one"),
    turn("no picture"),
    turn(B, "and here"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    config = write_random_checkpoint(folder, RANDOM_PRESETS["tiny-random"], seed=4)
    write_small_tokenizer(folder, config)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return make(folder, prefix_cache=False).chat(TURNS, SAMPLING)


def make(folder, buffers: BufferOptions | None = None, **options) -> LLM:
    return LLM(folder, engine_options=EngineOptions(page_size=PAGE, **options), buffer_options=buffers)


def check(answers, expected) -> None:
    for answer, whole in zip(answers, expected, strict=True):
        assert answer.token_ids == whole.token_ids
        for mine, theirs in zip(answer.logprobs, whole.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Number of images in each run of the tower."""
    runs: list[int] = []
    original = EncodeWorker.encode

    def encode(self, batch, token_ids):
        runs.append(len(batch))
        return original(self, batch, token_ids)

    monkeypatch.setattr(EncodeWorker, "encode", encode)
    return runs


def test_the_same_request_again_asks_for_nothing(folder, expected, encoded):
    llm = make(folder)
    first = llm.chat([TURNS[2]], SAMPLING)[0]
    assert encoded == [2] or encoded == [1, 1]
    again = llm.chat([TURNS[2]], SAMPLING)[0]
    assert sum(encoded) == 2
    assert first.timings.cached_tokens == 0
    num_prompt = len(again.prompt_token_ids)
    assert again.timings.cached_tokens == (num_prompt - 1) // PAGE * PAGE
    assert again.timings.transfer_bytes == 0
    assert [item.encode for item in again.timings.items] == [0, 0]
    check([first, again], [expected[2]] * 2)


def test_one_of_two_images_is_encoded_and_sent(folder, expected, encoded):
    """The first one ends in a page that holds the beginning of the second: its rows in that page are needed again."""
    llm = make(folder)
    llm.chat([TURNS[2]], SAMPLING)
    del encoded[:]
    answer = llm.chat([TURNS[3]], SAMPLING)[0]
    assert sum(encoded) == 1
    known, new = answer.timings.items
    assert known.cached
    sizes = llm.transfer.receiver.buffers.row_sizes
    offset = answer.prompt_token_ids.index(llm.config.image_token_id)
    missing = known.rows - (answer.timings.cached_tokens - offset)
    assert 0 <= missing < PAGE
    assert known.transfer_bytes == (sizes.transfer_bytes(missing, missing) if missing else 0)
    assert new.transfer_bytes == sizes.transfer_bytes(new.rows, new.rows)
    check([answer], [expected[3]])


@pytest.mark.parametrize("blocks", [1, 40])
def test_what_is_known_of_an_image_is_not_sent_again(folder, expected, blocks):
    """The page in which the image ends holds text too, and that differs: the rows in it are asked for, no others."""
    llm = make(folder, BufferOptions(block_size=2, blocks=blocks, deepstack_rows=80))
    llm.chat([TURNS[0]], SAMPLING)
    answer = llm.chat([turn(A, "what is it not")], SAMPLING)[0]
    ids = answer.prompt_token_ids
    pad = llm.config.image_token_id
    offset, num_rows = ids.index(pad), ids.count(pad)
    other = llm.chat([turn(A, "something else")], SAMPLING)[0]
    first = other.timings.cached_tokens - offset
    [item] = other.timings.items
    sizes = llm.transfer.receiver.buffers.row_sizes
    missing = max(0, num_rows - first)
    assert item.transfer_bytes == (sizes.transfer_bytes(missing, missing) if missing else 0)
    check([answer], [expected[1]])


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("blocks", [1, 40])
@pytest.mark.parametrize("pages", [1.1, pytest.param(1.6, marks=pytest.mark.slow), 2.5])
def test_too_few_pages_give_the_same_answers(folder, expected, pages, blocks, prefix_cache):
    """Room for little more than the longest request: others are preempted and computed again, images too."""
    longest = max(len(answer.prompt_token_ids) for answer in expected) + SAMPLING.max_new_tokens
    llm = make(folder)
    text = llm.config.text
    page_bytes = PAGE * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    room = (pages * longest // PAGE + 1.5) * page_bytes / 2**30
    options = {"kv_cache_gib": room, "prefix_cache": prefix_cache, "chunk_tokens": 8, "min_overlap_tokens": 4}
    llm = make(folder, BufferOptions(block_size=2, blocks=blocks, deepstack_rows=80), **options)
    sampling = SamplingParams(max_new_tokens=30, logprobs=2, ignore_eos=True)
    whole = make(folder).chat(TURNS * 2, sampling) if pages == 2.5 else None
    answers = llm.chat(TURNS * 2, sampling if whole else SAMPLING)
    check(answers, whole or expected * 2)
    pool = llm.engine.scheduler.pool
    assert pool.num_free == pool.num_pages
    assert settled(llm)
    assert whole is None or llm.engine.scheduler.num_preempted > 0
