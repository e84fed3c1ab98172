"""YaRN against the oracle: frequencies bit for bit, whole models within 1e-5, far beyond the trained length."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen3vl_disagg.checkpoint import load_model, read_config
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.model.rope import inverse_frequencies, text_rotary
from qwen3vl_disagg.plan.presets import PRESETS
from tests.support.oracle import CONFIGS, load_oracle, make_prompt, relative_error, run_oracle, run_ours
from tools.checkpoints import config_to_dict, write_random_checkpoint

SETTINGS = {
    "the model card's": {"factor": 3.0, "original_max_position_embeddings": 262144},
    "two": {"factor": 2, "original_max_position_embeddings": 262144},
    "betas": {"factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2},
    "not truncated": {"factor": 8.0, "original_max_position_embeddings": 1024, "truncate": False},
    "one bound": {"factor": 8.0, "original_max_position_embeddings": 40, "beta_fast": 1.0, "truncate": False},
    "attention factor": {"factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 0.7},
    "mscale": {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.1},
    "mscale alone": {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7},
    "nothing to stretch": {"factor": 1.0, "original_max_position_embeddings": 4096},
    "too short to turn": {"factor": 4.0, "original_max_position_embeddings": 4},
}
SPELLINGS = ("hub", "v5")


def with_rope(config: ModelConfig, spelling: str, entries: dict) -> dict:
    """A parsed config.json that says YaRN."""
    raw = config_to_dict(config, spelling=spelling)
    place = raw["text_config"]["rope_scaling" if spelling == "hub" else "rope_parameters"]
    place |= {"rope_type": "yarn", **entries}
    return raw


def oracle_rope(tmp_path, raw: dict):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(tmp_path).text_config
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")


@pytest.mark.parametrize(("name", "model"), list(itertools.product(SETTINGS, ["30b-a3b", "odd"])))
def test_frequencies_and_attention_factor(tmp_path, name, model):
    config = CONFIGS[model] if model in CONFIGS else PRESETS[model]
    for spelling in SPELLINGS:
        raw = with_rope(config, spelling, SETTINGS[name])
        theirs, attention_factor = oracle_rope(tmp_path, raw)
        text = ModelConfig.from_dict(raw).text
        ours = inverse_frequencies(text.head_dim, text.rope_theta, text.yarn)
        assert torch.equal(ours, theirs)
        assert text.yarn.attention_factor == attention_factor


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_survives_being_written(tmp_path, name, spelling):
    config = ModelConfig.from_dict(with_rope(PRESETS["8b"], "hub", SETTINGS[name]))
    raw = json.loads(json.dumps(config_to_dict(config, spelling=spelling)))
    assert ModelConfig.from_dict(raw) == config
    theirs, attention_factor = oracle_rope(tmp_path, raw)
    assert torch.equal(inverse_frequencies(128, config.text.rope_theta, config.text.yarn), theirs)
    assert attention_factor == config.text.yarn.attention_factor


@pytest.fixture(scope="module", params=["moe", "dense"])
def pair(request, tmp_path_factory):
    """(config, oracle, ours): a tiny model that was trained on 64 positions and may use 512."""
    config = CONFIGS[request.param]
    entries = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0}
    yarn = ModelConfig.from_dict(with_rope(config, "hub", entries)).text.yarn
    config = replace(config, text=replace(config.text, yarn=yarn, max_position_embeddings=512))
    folder = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(folder, config, seed=1, spelling="hub" if request.param == "moe" else "v5")
    assert read_config(folder) == config
    return config, load_oracle(folder), load_model(folder)


@torch.no_grad()
def test_cos_and_sin(pair):
    config, oracle, _ = pair
    text = config.text
    positions = torch.randint(0, 512, (3, 200), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        sizes = {"head_dim": text.head_dim, "theta": text.rope_theta, "section": text.mrope_section}
        cos, sin = text_rotary(positions, **sizes, dtype=dtype, yarn=text.yarn)
        theirs = oracle.model.language_model.rotary_emb(torch.empty(0, dtype=dtype), positions[:, None])
        assert torch.equal(cos[:, 0], theirs[0][0])
        assert torch.equal(sin[:, 0], theirs[1][0])


@pytest.mark.parametrize("parts", [[9], [30, (1, 4, 6), 3], [200, (1, 8, 6), 30, (1, 2, 6), 20]])
def test_logits(pair, parts):
    config, oracle, ours = pair
    prompts = [make_prompt(config, parts, seed=3)]
    theirs, mine = run_oracle(oracle, config, prompts), run_ours(ours, prompts)
    assert torch.equal(mine.positions, theirs.positions)
    assert relative_error(mine.logits, theirs.logits) < 1e-5


def test_without_it_the_logits_differ(pair):
    config, oracle, ours = pair
    prompts = [make_prompt(config, [200, (1, 8, 6), 20], seed=3)]
    model = ours.language_model.model
    text = model.config
    model.config = replace(text, yarn=None)
    try:
        plain = run_ours(ours, prompts)
    finally:
        model.config = text
    assert relative_error(plain.logits, run_oracle(oracle, config, prompts).logits) > 1e-2
