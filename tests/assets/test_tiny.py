"""The shipped checkpoint: its files, its words, and what it knows."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from qwen3vl_disagg.assets import tiny_folder
from qwen3vl_disagg.assets.scenes import all_words, questions
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from tools.training.evaluate import evaluate
from tools.training.folder import load_model, load_weights, read_config, save_weights, write_settings

FILES = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_model(tiny_folder())


def test_folder_is_whole_and_small():
    files = {path.name: path.stat().st_size for path in tiny_folder().iterdir()}
    assert files.keys() >= FILES
    assert sum(files.values()) <= 16 * 2**20


def test_architecture_is_asymmetric():
    config = read_config(tiny_folder())
    text, levels = config.text, config.num_deepstack_levels
    assert (text.num_experts, text.num_experts_per_tok) == (12, 2)
    assert 3 <= levels < text.num_hidden_layers
    assert text.hidden_size not in (text.moe_intermediate_size, 2 * text.moe_intermediate_size)


def test_weights_have_the_hub_form():
    text = read_config(tiny_folder()).text
    with safe_open(tiny_folder() / "model.safetensors", "pt") as file:
        names = set(file.keys())
        experts = "model.language_model.layers.0.mlp.experts."
        assert file.get_slice(experts + "gate_up_proj").get_shape() == [12, text.hidden_size, 2 * 96]
        assert file.get_slice(experts + "down_proj").get_shape() == [12, 96, text.hidden_size]
    assert {"lm_head.weight", "model.visual.patch_embed.proj.weight", "model.language_model.norm.weight"} <= names
    assert all(name.startswith(("model.visual.", "model.language_model.", "lm_head.")) for name in names)


def test_settings_are_what_the_recipe_writes(tmp_path):
    write_settings(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (tiny_folder() / path.name).read_bytes(), path.name


def test_weights_survive_the_file(tmp_path, model):
    save_weights(model, tmp_path / "model.safetensors")
    again = Qwen3VLMoeForConditionalGeneration(model.config)
    load_weights(again, tmp_path / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_tokenizer_keeps_every_word():
    tokenizer = Tokenizer.from_file(str(tiny_folder() / "tokenizer.json"))
    texts = [*all_words(), "naïve 图 \U0001f600 <b>\n\t ok"]
    texts += [text for question in questions(2, 300) for text in (question.text, question.answer)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    for text in texts[len(all_words()) + 1 :]:
        assert len(tokenizer.encode(text).ids) == len(re.findall(r"\w+|[^\w\s]", text)), text


def test_token_ids_agree():
    folder = tiny_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = read_config(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.token_to_id("<|image_pad|>") == config.image_token_id
    assert tokenizer.token_to_id("<|video_pad|>") == config.video_token_id
    assert tokenizer.token_to_id("<|vision_start|>") == config.vision_start_token_id
    assert tokenizer.token_to_id("<|vision_end|>") == config.vision_end_token_id
    assert generation["eos_token_id"] == [tokenizer.token_to_id(f"<|{t}|>") for t in ("im_end", "endoftext")]
    assert tokenizer.get_vocab_size() <= config.text.vocab_size


CALLS = ("call", "call, second")
"""Forms in which a tool is wanted."""


def test_it_answers_in_every_form_and_needs_every_visual_row(model):
    report = evaluate(model, tiny_folder(), seed=77, count=48)
    assert min(report.exact, report.text_first["all"]) >= 0.9, report
    for name in ("json", "json, key named", "answer beside tools", *CALLS):
        assert report.forms[name].right >= 0.8, (name, report)
    for name, exact in report.ablations.items():
        assert exact <= report.exact - 0.2, name


@pytest.mark.acceptance
def test_figures_on_500_unseen_scenes(model):
    report = evaluate(model, tiny_folder(), seed=1_000_003, count=500)
    assert report.exact >= 0.97, report
    assert report.text_first["all"] >= 0.97, report
    for name in ("json", "json, key named", "answer beside tools", "after a result", *CALLS):
        assert report.forms[name].right >= 0.95, (name, report)
    assert all(kind.most_frequent <= 0.4 for kind in report.kinds.values())
    for name, exact in report.ablations.items():
        assert exact <= report.exact - 0.2, name
