"""What is trained on is what serving feeds: the same ids, positions and pixels."""

import io
import random

import torch

from qwen3vl_disagg.assets.drawing import draw_scene
from qwen3vl_disagg.assets.scenes import Decks, build_question, generate
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.processing.positions import mrope_positions
from qwen3vl_disagg.processing.processor import Processor
from tools.training.folder import read_config, write_settings
from tools.training.lessons import SEARCHING, SEEING, Lessons, Prompts, lesson_loss


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_prompts_and_pixels_equal_the_processor(tmp_path):
    write_settings(tmp_path)
    config = read_config(tmp_path)
    processor, prompts = Processor.from_folder(tmp_path, config), Prompts(tmp_path)
    for sample in generate(9, 36):
        files = [png(image) for image in sample.images]
        content = [{"type": "image", "image": data} for data in files] + [{"type": "text", "text": sample.question}]
        prompt = processor.prepare([{"role": "user", "content": content}], allow_paths=True)
        pictures = prompts.pictures(sample.images)
        ids, items = prompts.question(sample.question, pictures.grids)
        assert ids == prompt.token_ids
        assert [(i.grid, i.offset, i.num_rows) for i in items] == [(i.grid, i.offset, i.num_rows) for i in prompt.items]
        assert all(h * w in (64, 80) for _, h, w in pictures.grids)
        assert torch.equal(torch.cat([processor.image.pixels(data)[0] for data in files]), pictures.pixels)
        sequences = prompts.pack([(ids, items)], [list(range(len(items)))], pictures.grids)
        merge = config.vision.spatial_merge_size
        assert torch.equal(sequences.positions, mrope_positions(len(ids), prompt.items, merge)[0])
        assert prompts.tokenizer.decode(prompts.answer(sample.answer)[:-1]) == sample.answer


def test_native_pictures_are_not_resized(tmp_path):
    write_settings(tmp_path)
    prompts = Prompts(tmp_path)
    rng = random.Random(0)
    scene = build_question("list", rng, Decks(rng)).scenes[0]
    for width, height in ((128, 128), (160, 128), (128, 160)):
        grid = prompts.pictures([draw_scene(scene, (width, height), rng)]).grids[0]
        assert grid == (1, height // 16, width // 16)


def test_targets_follow_their_rows(tmp_path):
    write_settings(tmp_path)
    lesson = next(iter(Lessons(tmp_path, seed=3, num_scenes=6, mix=SEEING)))
    ids, rows = lesson.sequences.ids, lesson.logit_rows
    end_id = Prompts(tmp_path).end_id
    starts = torch.tensor(lesson.sequences.seq_lens).cumsum(0)
    for row, target in zip(rows.tolist(), lesson.targets.tolist(), strict=True):
        if target == end_id:
            assert row + 1 in starts
        else:
            assert ids[row + 1] == target
    assert lesson.sequences.visual_rows.max() + 1 == sum(t * h * w // 4 for t, h, w in lesson.pictures.grids)
    again = next(iter(Lessons(tmp_path, seed=3, num_scenes=6, mix=SEEING)))
    assert torch.equal(ids, again.sequences.ids)
    assert torch.equal(lesson.pictures.pixels, again.pictures.pixels)


def test_loss_reaches_every_parameter(tmp_path):
    write_settings(tmp_path)
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(read_config(tmp_path))
    lesson = next(iter(Lessons(tmp_path, seed=1, num_scenes=8, mix=SEARCHING)))
    lesson_loss(model, lesson).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
