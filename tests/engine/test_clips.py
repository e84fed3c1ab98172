"""Clips through `LLM`: the answers of the reference, however the prompt is cut, the rows come and the pages run out."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest
import torch

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import BufferOptions
from qwen3vl_disagg.engine.engine import EngineOptions
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.processing.clips import unpack_frames
from tests.support.clips import encode_clip, noise_frames, png_frames
from tests.support.local import settled
from tests.support.oracle import load_oracle
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint
from tools.make_checkpoint import write_small_tokenizer

SAMPLING = SamplingParams(max_new_tokens=5, logprobs=2, ignore_eos=True)


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def clip_part(seed: int, num_frames: int, height: int, width: int, fps: float = 2.0) -> dict:
    frames = png_frames(noise_frames(num_frames, height, width, seed=seed))
    return {"type": "video", "video": [uri(frame) for frame in frames], "fps": fps}


def turn(*parts: dict | str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


A, B = clip_part(1, 6, 64, 96), clip_part(2, 3, 96, 64, fps=30.0)
PICTURE = {"type": "image_url", "image_url": {"url": uri(png_frames(noise_frames(1, 96, 96, seed=3))[0])}}
FILE = {"type": "video_url", "video_url": {"url": uri(encode_clip(noise_frames(24, 64, 96), fps=8), "video/mp4")}}
TURNS = [
    turn(A, "what happens"),
    turn(A, "what else happens"),
    turn("look", PICTURE, "and", B, "which one"),
    turn(A, B, PICTURE, "which one"),
    turn(FILE, "what is in it"),
    turn({**FILE, "num_frames": 5}, "what is in it"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    config = write_random_checkpoint(folder, RANDOM_PRESETS["tiny-random"], seed=4)
    write_small_tokenizer(folder, config)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """Alone, with room for everything; held to the reference below."""
    return [LLM(folder).chat([messages], SAMPLING)[0] for messages in TURNS]


def check(answers, expected) -> None:
    for answer, whole in zip(answers, expected, strict=True):
        assert answer.token_ids == whole.token_ids
        for mine, theirs in zip(answer.logprobs, whole.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@torch.no_grad()
def test_greedy_answers_are_the_references(folder, expected):
    oracle, llm = load_oracle(folder), LLM(folder)
    config = llm.config
    for messages, answer in zip(TURNS, expected, strict=True):
        prompt = llm.processor.prepare(messages)
        visual: dict[str, list] = {"image": [], "video": []}
        for item, data in zip(prompt.items, prompt.media, strict=True):
            visual[item.modality].append(llm.transfer.worker.preprocess(data, item))
        given = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if visual[kind]:
                given[name] = torch.cat([pixels.patches for pixels in visual[kind]])
                given[f"{kind}_grid_thw"] = torch.tensor([pixels.grid for pixels in visual[kind]])
        ids = torch.tensor([prompt.token_ids + answer.token_ids[:-1]])
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        oracle.model.rope_deltas = None
        logits = oracle(input_ids=ids, mm_token_type_ids=types, use_cache=False, **given).logits[0].float()
        logprobs = logits[len(prompt.token_ids) - 1 :].log_softmax(-1)
        for entry, row in zip(answer.logprobs, logprobs, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-5)


@pytest.mark.parametrize(
    ("blocks", "chunk"),
    [(1, 3), (100, 7), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 7, marks=pytest.mark.slow)],
)
def test_however_it_is_cut(folder, expected, blocks, chunk):
    options = EngineOptions(page_size=4, max_prefill_tokens=chunk, chunk_tokens=chunk, min_overlap_tokens=2)
    buffers = BufferOptions(block_size=2, blocks=blocks, deepstack_rows=200)
    llm = LLM(folder, engine_options=options, buffer_options=buffers)
    sizes = llm.transfer.receiver.buffers.row_sizes
    for messages, whole in zip(TURNS, expected, strict=True):
        [answer] = llm.chat([messages], SAMPLING)
        check([answer], [whole])
        for item in answer.timings.items:
            assert item.transfer_bytes <= sizes.transfer_bytes(item.rows, item.rows), "a row travelled twice"
    assert settled(llm)


def test_together_with_too_few_pages(folder, expected):
    """Room for little more than the longest: others are preempted in the middle of clips, and computed again."""
    text = LLM(folder).config.text
    longest = max(len(answer.prompt_token_ids) for answer in expected) + SAMPLING.max_new_tokens
    page_bytes = 4 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    options = EngineOptions(page_size=4, kv_cache_gib=1.3 * longest / 4 * page_bytes / 2**30, chunk_tokens=8)
    llm = LLM(folder, engine_options=options, buffer_options=BufferOptions(block_size=2, blocks=4, deepstack_rows=80))
    check(llm.chat(TURNS, SAMPLING), expected)
    assert settled(llm)


@pytest.mark.parametrize("page_size", [20, 24])
def test_a_clip_is_found_again_up_to_the_middle(folder, expected, page_size):
    """The last full page ends in a run of placeholders, or in a timestamp: only the rows behind it travel again."""
    llm = LLM(folder, engine_options=EngineOptions(page_size=page_size))
    check(llm.chat([TURNS[0]], SAMPLING), [expected[0]])
    [again] = llm.chat([TURNS[1]], SAMPLING)
    check([again], [expected[1]])
    [item] = again.timings.items
    pads = [n for n, i in enumerate(again.prompt_token_ids) if i == llm.config.video_token_id]
    missing = sum(n >= again.timings.cached_tokens for n in pads)
    assert item.cached
    assert 0 < missing < len(pads)
    assert item.transfer_bytes == llm.transfer.receiver.buffers.row_sizes.transfer_bytes(missing, missing)


def test_other_frames_of_the_same_bytes_are_another_clip(folder):
    llm = LLM(folder)
    prompt = llm.processor.prepare(turn({**FILE, "num_frames": 4}, "?"))
    [item], [data] = prompt.items, prompt.media
    later = msgspec.structs.replace(item, frames=(1, *item.frames[1:]))
    assert later.content != item.content
    worker = llm.transfer.worker
    assert not torch.equal(worker.preprocess(data, item).patches, worker.preprocess(data, later).patches)


def test_a_list_of_frames_is_one_content(folder):
    prompt = LLM(folder).processor.prepare(TURNS[0])
    [item], [data] = prompt.items, prompt.media
    assert item.is_frame_list
    assert len(unpack_frames(data)) == 6
    assert item.frames == (0, 1, 2, 3, 4, 5)


def test_a_restarted_clip_goes_back_to_its_first_needed_row(folder):
    """Not further: what was found in pages of others is not written again."""
    llm = LLM(folder)
    prompt = llm.processor.prepare(TURNS[0])
    sequence = Sequence(
        request_id="a",
        token_ids=prompt.token_ids,
        items=prompt.items,
        sampling=SAMPLING,
        positions=torch.empty(3, 0),
        delta=0,
        seed=0,
    )
    pads = [n for n, i in enumerate(prompt.token_ids) if i == llm.config.video_token_id]
    for found in range(pads[-1]):
        sequence.num_found, sequence.num_cached = found, pads[-1]
        sequence.restart(0)
        assert sequence.num_cached == next(pad for pad in pads if pad >= found)
