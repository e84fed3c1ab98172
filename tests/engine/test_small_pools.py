"""Items of 1 to 40 blocks through pools of 1, 2, 3 and 8: the answers of a run with room for everything."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import BufferOptions
from tests.support.local import settled
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint
from tools.make_checkpoint import write_small_tokenizer

BLOCK, MAX_BLOCKS = 2, 40
SAMPLING = SamplingParams(max_new_tokens=3, logprobs=2)


def make_turn(rows: int) -> list[dict]:
    """One line of `rows` merged patches, and a word."""
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randint(0, 256, (32, 32 * rows, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"a {rows}"}],
        }
    ]


TURNS = [make_turn(BLOCK * blocks - blocks % 2) for blocks in range(1, MAX_BLOCKS + 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-pools")
    # With seed 3 a router has two experts within 1.5e-8: which one is taken depends on how the prompt is cut.
    config = write_random_checkpoint(folder, RANDOM_PRESETS["tiny-random"], seed=4, max_pixels=32 * 32 * 100)
    write_small_tokenizer(folder, config)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return LLM(folder).chat(TURNS, SAMPLING)


@pytest.mark.parametrize(
    ("blocks", "deepstack"),
    [
        (1, "smaller"),
        (2, "larger"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, "larger"), (2, "smaller"), (3, "larger")]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, "smaller"), (8, "smaller"), (8, "larger")]),
    ],
)
def test_every_item_passes_and_gives_the_same_tokens(folder, expected, blocks, deepstack):
    rows = BLOCK * MAX_BLOCKS if deepstack == "larger" else 2 * BLOCK
    options = BufferOptions(block_size=BLOCK, blocks=blocks, deepstack_rows=rows)
    llm = LLM(folder, buffer_options=options)
    row_sizes = llm.transfer.receiver.buffers.row_sizes
    for n, (answer, whole) in enumerate(zip(llm.chat(TURNS, SAMPLING), expected, strict=True), 1):
        assert answer.token_ids == whole.token_ids
        for mine, theirs in zip(answer.logprobs, whole.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [p for _, p in mine.top] == pytest.approx([p for _, p in theirs.top], abs=1e-4)
        [item] = answer.timings.items
        # Every row and every row of DeepStack travels once, whatever the number of transfers.
        assert item.transfer_bytes == row_sizes.transfer_bytes(item.rows, item.rows)
        assert item.resumes >= -(-n // blocks) - 1
    assert settled(llm)
