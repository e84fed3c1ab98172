"""From messages with image files to logits, ours against the oracle's own tokenizer, image processor and model."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from qwen3vl_disagg.processing import Processor
from tests.support.oracle import CONFIGS, Prompt, image_processor, relative_error, run_oracle, run_ours
from tools.make_checkpoint import write_small_tokenizer

SIZES = {"upscaled": [(20, 25)], "shrunk": [(400, 300)], "two, one stretched": [(130, 70), (33, 290)]}
"""(width, height) in pixels; the checkpoint's bounds are 1,024 and 65,536."""


def png(width, height, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def folder(pool):
    folder = pool.folder("mixed")
    write_small_tokenizer(folder, CONFIGS["mixed"])
    return folder


@pytest.mark.parametrize("resize", ["torch", "pillow"])
@pytest.mark.parametrize("case", SIZES)
def test_messages_to_logits(pool, folder, tmp_path, case, resize):
    config = CONFIGS["mixed"]
    images = [png(*size, seed) for seed, size in enumerate(SIZES[case])]
    parts, urls = [], []
    for i, data in enumerate(images):
        urls.append(tmp_path / f"{i}.png")
        urls[-1].write_bytes(data)
        parts += [
            {"type": "text", "text": f"Picture {i}: "},
            {"type": "image_url", "image_url": {"url": str(urls[-1])}},
        ]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": " What is it?"}]}]

    processor = Processor.from_folder(folder, config, image_resize=resize)
    prepared = processor.prepare(messages, allow_paths=True)
    pixels, grids = zip(*[processor.image.pixels(data) for data in prepared.media], strict=True)
    ours = Prompt(torch.tensor(prepared.token_ids), tuple(prepared.items), torch.cat(pixels))

    opened = [Image.open(io.BytesIO(data)) for data in images]
    inputs = image_processor(folder, resize)(opened, return_tensors="pt")
    assert [list(grid) for grid in grids] == inputs["image_grid_thw"].tolist() == [list(g) for g in ours.grids]
    assert torch.equal(ours.pixels, inputs["pixel_values"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, *after = text.split("<|image_pad|>")
    for grid, rest in zip(inputs["image_grid_thw"], after, strict=True):
        before += "<|image_pad|>" * (int(grid.prod()) // 4) + rest
    assert prepared.token_ids == tokenizer(before)["input_ids"]

    theirs = run_oracle(pool.oracle("mixed"), config, [ours])
    outputs = run_ours(pool.ours("mixed"), [ours])
    assert torch.equal(outputs.positions, theirs.positions)
    assert relative_error(outputs.main, theirs.main) < 1e-5
    assert relative_error(outputs.logits, theirs.logits) < 1e-5
