"""The published sizes: their settings read, counted and planned whole; run narrow here, and wide with fewer layers."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from qwen3vl_disagg import LLM
from qwen3vl_disagg.checkpoint import load_model, open_checkpoint, read_config
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import ModelOptions
from qwen3vl_disagg.model import ModelConfig, Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.plan.dry_run import dry_run
from qwen3vl_disagg.plan.presets import PRESETS
from tests.support.oracle import load_oracle, make_prompt, relative_error, run_oracle, run_ours
from tests.support.published import ADDED, NAMES, NUM_TOKENS, narrow, settings, shallow, write_published

PARAMETERS = {"2b": 2_127_532_032, "4b": 4_437_815_808, "32b": 33_357_390_064}
SAMPLING = SamplingParams(max_new_tokens=4, ignore_eos=True, logprobs=1)
IMAGE_TOKEN, ROWS_OF_AN_IMAGE = 151655, 64
"""256 x 256 pixels, the published minimum, are 8 x 8 visual tokens."""


@pytest.mark.parametrize("size", NAMES)
def test_settings_are_read_as_planned(size):
    assert ModelConfig.from_dict(settings(size)) == PRESETS[size]


@pytest.mark.parametrize("size", PARAMETERS)
def test_planned_whole(size):
    """Bytes over the ranks, against the parameters counted apart; the other sizes are in tests/parallel."""
    shown = dry_run(ModelOptions(), size, range(2), range(2, 8))
    assert (shown.model_bytes, shown.dtype) == (2 * PARAMETERS[size], "bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_published(folder, narrow(settings("30b-a3b")), thinking=True)
    return folder


def pictures(folder: Path) -> list[Path]:
    paths = [folder / "dark.png", folder / "light.png"]
    for path, colour in zip(paths, [(20, 30, 90), (240, 220, 30)], strict=True):
        Image.new("RGB", (256, 256), colour).save(path)
    return paths


def ask(llm: LLM, picture: Path) -> Any:
    content = [{"type": "image_url", "image_url": {"url": str(picture)}}, {"type": "text", "text": "what is this?"}]
    [answer] = llm.chat([[{"role": "user", "content": content}]], SAMPLING)
    return answer


def check_answers(folder: Path, pictures: list[Path]) -> None:
    """A few tokens each, finite, the same when asked again; another picture changes them."""
    llm = LLM(folder)
    dark, light = (ask(llm, picture) for picture in pictures)
    for answer in (dark, light):
        assert (len(answer.token_ids), answer.finish_reason) == (4, "length")
        assert answer.prompt_token_ids.count(IMAGE_TOKEN) == ROWS_OF_AN_IMAGE
        assert all(math.isfinite(entry.logprob) and entry.logprob < 0 for entry in answer.logprobs)
    assert ask(llm, pictures[0]).token_ids == dark.token_ids
    assert dark.logprobs[0].logprob != light.logprobs[0].logprob


def test_a_narrow_one_answers(folder, tmp_path):
    assert (folder / "chat_template.json").exists()
    with open_checkpoint(folder) as checkpoint:
        assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
        assert len({info.file for info in checkpoint.tensors.values()}) == 3
    check_answers(folder, pictures(tmp_path))


def test_a_narrow_one_equals_the_oracle(folder):
    config = read_config(folder)
    prompts = [make_prompt(config, [3, (1, 4, 6), 5])]
    theirs = run_oracle(load_oracle(folder), config, prompts)
    ours = run_ours(load_model(folder, dtype=torch.float32), prompts)
    assert torch.equal(ours.positions, theirs.positions)
    assert relative_error(ours.logits, theirs.logits) < 1e-5


def test_the_published_vocabulary(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == NUM_TOKENS
    config = read_config(folder)
    assert tokenizer.token_to_id("<|image_pad|>") == config.image_token_id == IMAGE_TOKEN
    assert tokenizer.token_to_id("<|video_pad|>") == config.video_token_id
    assert tokenizer.token_to_id("<|vision_start|>") == config.vision_start_token_id
    assert tokenizer.token_to_id("<|vision_end|>") == config.vision_end_token_id
    ids = {token: tokenizer.token_to_id(token) for token in ADDED}
    assert [ids["<|endoftext|>"], ids["<|im_end|>"], ids["<think>"], ids["</think>"]] == [
        151643,
        151645,
        151667,
        151668,
    ]
    kept = "<think>a</think><tool_call>"
    assert tokenizer.decode(tokenizer.encode(f"<|im_start|>{kept}<|im_end|>").ids) == kept


LAYERS = dict.fromkeys(NAMES, 3) | {"235b-a22b": 2}
"""Of the decoder, in the wide runs. The tower is whole; the 235B's third DeepStack level has no layer to go to."""


@pytest.mark.acceptance
@pytest.mark.parametrize("size", NAMES)
@pytest.mark.timeout(1500)
def test_a_wide_one_answers(size, tmp_path):
    times = [time.monotonic()]
    folder = tmp_path / "wide"
    raw = shallow(settings(size), LAYERS[size])
    try:
        config = write_published(folder, raw, num_shards=40)
        times.append(time.monotonic())
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        with torch.device("meta"):
            model = Qwen3VLMoeForConditionalGeneration(config)
        assert 2 * sum(parameter.numel() for parameter in model.parameters()) < num_bytes < 2**35
        check_answers(folder, pictures(tmp_path))
        times.append(time.monotonic())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    written, answered = times[1] - times[0], times[2] - times[1]
    print(
        json.dumps(
            {"size": size, "layers": LAYERS[size], "gib": round(num_bytes / 2**30, 2)}
            | {"write_s": round(written, 1), "load_and_answer_s": round(answered, 1)}
        )
    )
