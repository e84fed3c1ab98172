"""DeepStack: which layers get which level, and the split pair against the whole model."""

from dataclasses import replace

import pytest
import torch

from qwen3vl_disagg.checkpoint import load_language_model, load_model, load_vision_model
from qwen3vl_disagg.model import (
    ForwardBatch,
    Qwen3MoeForCausalLMWithDeepStack,
    Qwen3VLMoeForConditionalGeneration,
    separate_deepstack,
    splice_visual,
)
from qwen3vl_disagg.processing.positions import mrope_positions
from tests.support.oracle import CONFIGS, make_case, make_prompt
from tests.support.weights import SMALLEST, load_text_model, write_smallest

NAMES = ["moe", "dense", "odd"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    return {name: write_smallest(root / name, CONFIGS[name]) for name in NAMES}


def packed(config, case):
    prompts = make_case(config, case)
    positions = [mrope_positions(len(p.ids), p.items, config.vision.spatial_merge_size)[0] for p in prompts]
    batch = ForwardBatch.for_prompt([len(p.ids) for p in prompts], last_only=False)
    grids = [grid for p in prompts for grid in p.grids]
    return torch.cat([p.ids for p in prompts]), torch.cat(positions, dim=1), batch, prompts, grids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["one image", "batch"])
def test_the_split_pair_equals_the_whole(folders, name, case):
    config, folder = CONFIGS[name], folders[name]
    ids, positions, batch, prompts, grids = packed(config, case)
    pixels = torch.cat([p.pixels for p in prompts])
    expected = load_model(folder)(ids, positions, batch, pixel_values=pixels, image_grid_thw=grids)

    vision, language = load_vision_model(folder), load_language_model(folder)
    assert vision.language_model is None
    features = vision.get_image_feature(pixels, grids)
    main, deepstack = separate_deepstack(features, config.text.hidden_size)
    text = language.model.embed_tokens(ids)
    embeds, dense = splice_visual(ids, text, (config.image_token_id, config.video_token_id), main, deepstack)
    actual = language(ids, positions, batch, embeds, input_deepstack_embeds=dense)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_text_alone_equals_the_text_model(folders, name):
    ids, positions, batch, _, _ = packed(CONFIGS[name], "text")
    expected = load_text_model(folders[name])(ids, positions, batch)
    language = load_language_model(folders[name])
    assert torch.equal(language(ids, positions, batch, input_deepstack_embeds=None), expected)
    assert torch.equal(language(ids, positions, batch), expected)
    assert torch.equal(load_model(folders[name])(ids, positions, batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_level_i_follows_layer_i_and_no_other(folders, name):
    """What enters layer i + 1 is what left layer i, plus level i for i < n."""
    config = CONFIGS[name]
    language = load_language_model(folders[name])
    layers, hidden = list(language.model.layers), config.text.hidden_size
    entered, left = [], []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
        layer.register_forward_hook(lambda _module, _args, output: left.append(output))
    language.model.norm.register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
    torch.manual_seed(0)
    ids, positions, batch, _, _ = packed(config, "text")
    dense = torch.randn(len(ids), config.num_deepstack_levels * hidden)
    language(ids, positions, batch, input_deepstack_embeds=dense)
    assert len(entered) == len(layers) + 1
    for i in range(len(layers)):
        level = dense[:, i * hidden : (i + 1) * hidden]
        expected = left[i] + level if i < config.num_deepstack_levels else left[i]
        told = f"what leaves layer {i} is not followed by " + (
            "level" if i < config.num_deepstack_levels else "nothing"
        )
        assert torch.equal(entered[i + 1], expected), told


@pytest.mark.parametrize("levels", [(), (1,), (0, 1)])
def test_the_number_of_levels_comes_from_the_config(levels):
    config = replace(SMALLEST, vision=replace(SMALLEST.vision, deepstack_visual_indexes=levels))
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(config)
    prompt = make_prompt(config, [2, (1, 4, 4), 1])
    positions, _ = mrope_positions(len(prompt.ids), prompt.items, 2)
    assert model.get_image_feature(prompt.pixels, prompt.grids).shape == (4, (1 + len(levels)) * 64)
    batch = ForwardBatch.for_prompt([len(prompt.ids)])
    assert model(
        prompt.ids, positions, batch, pixel_values=prompt.pixels, image_grid_thw=torch.tensor(prompt.grids)
    ).shape == (1, config.text.vocab_size)


def test_rows_of_another_width_are_refused():
    language = Qwen3MoeForCausalLMWithDeepStack(SMALLEST)
    ids, positions = torch.arange(3), torch.arange(3).expand(3, -1)
    with pytest.raises(ValueError, match="64 wide, expected 128"):
        language(ids, positions, ForwardBatch.for_prompt([3]), input_deepstack_embeds=torch.zeros(3, 64))


def test_separate():
    embeds = torch.arange(24.0).view(2, 12)
    main, deepstack = separate_deepstack(embeds, 4)
    assert main.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert deepstack.tolist() == [list(range(4, 12)), list(range(16, 24))]
    assert main.is_contiguous()
    assert deepstack.is_contiguous()
    with pytest.raises(ValueError, match="not a multiple of hidden size 5"):
        separate_deepstack(embeds, 5)


def test_splice():
    ids = torch.tensor([5, 90, 6, 91, 90])
    main, deepstack = torch.arange(1.0, 7).view(3, 2), torch.arange(10.0, 13).view(3, 1)
    embeds, dense = splice_visual(ids, torch.full((5, 2), -1.0), (90, 91), main, deepstack)
    assert embeds.tolist() == [[-1, -1], [1, 2], [-1, -1], [3, 4], [5, 6]]
    assert dense.flatten().tolist() == [0, 10, 0, 11, 12]
    with pytest.raises(ValueError, match="3 visual placeholders in the prompt but 2 visual rows"):
        splice_visual(ids, torch.zeros(5, 2), (90, 91), main[:2], deepstack[:2])


def test_a_vision_only_model_does_not_generate(folders):
    ids, positions, batch, _, _ = packed(CONFIGS["moe"], "text")
    with pytest.raises(ValueError, match="vision tower only"):
        load_vision_model(folders["moe"])(ids, positions, batch)
