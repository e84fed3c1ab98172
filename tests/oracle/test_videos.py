"""Clips through the reference's whole processor. It needs torchvision, of which only the Python part has to work."""

from __future__ import annotations

import hashlib
import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.video_utils import VideoMetadata

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing.patches import read_section
from tests.processing.test_resize import GOLDEN as IMAGES
from tests.processing.test_video import GOLDEN
from tests.support.clips import encode_clip, noise_frames, png_frames, published_video_processor
from tests.support.oracle import image_processor, load_oracle
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint
from tools.make_checkpoint import write_small_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed: it pins torch"
)


@pytest.fixture
def video_processor():
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 4096, "longest_edge": 25165824}
    return Qwen3VLVideoProcessor(size=size, image_mean=half, image_std=half, cap_pixels_per_frame=False)


@pytest.mark.parametrize("size", IMAGES)
def test_images_are_the_references_bit_for_bit(tmp_path, size):
    write_random_checkpoint(tmp_path, RANDOM_PRESETS["tiny-random"], seed=4)
    processor = image_processor(tmp_path, "torch")
    processor.size = SizeDict(shortest_edge=65536, longest_edge=16777216)
    [levels_HWC] = noise_frames(1, *size)
    patches = processor(images=[Image.fromarray(levels_HWC)], return_tensors="pt")["pixel_values"]
    assert hashlib.sha256(patches.numpy().tobytes()).hexdigest() == IMAGES[size]


@pytest.mark.parametrize("size", [*GOLDEN, (7, 64, 96), (40, 48, 64)])
def test_patches_are_the_references_bit_for_bit(video_processor, size):
    frames = noise_frames(*size)
    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    expected = video_processor(videos=[video], do_sample_frames=False, return_tensors="pt")
    processor = published_video_processor()
    patches, grid = processor.patches(frames, len(frames), processor.grid(*(size[i] for i in (0, 2, 1))))
    assert [list(grid)] == expected["video_grid_thw"].tolist()
    assert torch.equal(patches, expected["pixel_values_videos"])


def test_a_real_clip_and_an_image_are_the_references(video_processor, tmp_path):
    """The file is decoded here and the frames given to the reference, with what the file says of its rate."""
    from transformers import AutoTokenizer
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    config = write_random_checkpoint(tmp_path, RANDOM_PRESETS["tiny-random"], seed=4)
    write_small_tokenizer(tmp_path, config)
    llm = LLM(tmp_path, video_outer_wrapper=True)
    clip, picture = encode_clip(noise_frames(30, 120, 88), fps=10), png_frames(noise_frames(1, 70, 90, seed=5))[0]
    content = [
        {"type": "text", "text": "Look: "},
        {"type": "video", "video": clip},
        {"type": "image", "image": picture},
        {"type": "text", "text": "\nwhat is it?"},
    ]
    prompt = llm.processor.prepare([{"role": "user", "content": content}], allow_paths=True)

    pixels = read_section(tmp_path, "video_preprocessor_config.json", "video_processor")
    video_processor.size = SizeDict(**pixels["size"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = Qwen3VLProcessor(
        image_processor(tmp_path, "torch"), tokenizer, video_processor, chat_template=tokenizer.chat_template
    )
    frames = list(llm.processor.decoder.video_frames(clip, range(30)))
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(
        text=[text],
        images=[Image.open(io.BytesIO(picture))],
        videos=[torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)],
        videos_kwargs={"video_metadata": [VideoMetadata(total_num_frames=30, fps=10.0)], "do_sample_frames": True},
        return_tensors="pt",
    )
    assert prompt.token_ids == expected["input_ids"][0].tolist()
    found = {
        item.modality: llm.transfer.worker.preprocess(data, item)
        for item, data in zip(prompt.items, prompt.media, strict=True)
    }
    assert torch.equal(found["video"].patches, expected["pixel_values_videos"])
    assert torch.equal(found["image"].patches, expected["pixel_values"])

    oracle = load_oracle(tmp_path)
    sampling = SamplingParams(max_new_tokens=4, logprobs=0, ignore_eos=True)
    [answer] = llm.chat([[{"role": "user", "content": content}]], sampling)
    ids = torch.tensor([prompt.token_ids + answer.token_ids[:-1]])
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    with torch.no_grad():
        logits = oracle(input_ids=ids, mm_token_type_ids=types, **{name: expected[name] for name in names}).logits[0]
    logprobs = logits[len(prompt.token_ids) - 1 :].log_softmax(-1)
    for entry, row in zip(answer.logprobs, logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-5)
