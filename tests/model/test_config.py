"""Reading configs: both spellings, nothing guessed, everything wrong named at once."""

import contextlib
import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.model.config import ConfigError, YarnScaling
from tests.support.oracle import CONFIGS
from tools.checkpoints import config_to_dict

RAW = {spelling: config_to_dict(CONFIGS["mixed"], spelling=spelling) for spelling in ("hub", "v5")}


def problems(raw):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    return caught.value.problems


def edited(spelling="hub", **changes):
    """`section__key=value`; a value of None removes the key."""
    raw = copy.deepcopy(RAW[spelling])
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = raw
        for section in sections:
            place = place[section]
        if value is None:
            del place[key]
        else:
            place[key] = value
    return raw


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spelling", ["hub", "v5"])
def test_written_and_read(name, spelling):
    raw = json.loads(json.dumps(config_to_dict(CONFIGS[name], spelling=spelling)))
    assert ModelConfig.from_dict(raw) == CONFIGS[name]


def test_what_the_spellings_are():
    hub, v5 = RAW["hub"], RAW["v5"]
    assert (hub["text_config"]["num_experts"], v5["text_config"]["num_local_experts"]) == (8, 8)
    assert hub["text_config"]["rope_theta"] == v5["text_config"]["rope_parameters"]["rope_theta"] == 5e6
    assert "rope_theta" not in v5["text_config"]
    assert hub["vision_config"]["model_type"] == "qwen3_vl_moe"


@pytest.mark.parametrize("spelling", ["hub", "v5"])
@pytest.mark.parametrize(
    "key", ["num_experts_per_tok", "moe_intermediate_size", "head_dim", "num_key_value_heads", "rms_norm_eps"]
)
def test_text_sizes_have_no_default(spelling, key):
    assert problems(edited(spelling, **{f"text_config__{key}": None})) == [f"text_config.{key} is missing"]


def test_experts_theta_and_vision_width_have_no_default():
    raw = edited(text_config__num_experts=None, text_config__rope_theta=None, vision_config__out_hidden_size=None)
    assert set(problems(raw)) == {
        "text_config.num_experts or num_local_experts is missing",
        "text_config.rope_theta is missing",
        "vision_config.out_hidden_size is missing",
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM' is not one of"),
        ({"architectures": None}, "architectures: None is not one of"),
        ({"text_config": None}, "text_config is missing"),
        ({"text_config__norm_topk_prob": False}, "norm_topk_prob=false is not supported"),
        ({"text_config__attention_bias": True}, "attention_bias=true is not supported"),
        ({"text_config__hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"text_config__rope_scaling__rope_type": "llama3"}, "rope type 'llama3' is not supported (only"),
        ({"text_config__rope_scaling__rope_type": "dynamic"}, "rope type 'dynamic' is not supported (only"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' belongs into text_config"),
        ({"text_config__rope_scaling__mrope_interleaved": False}, "mrope_interleaved must be true"),
        ({"text_config__rope_scaling__mrope_section": [6, 5]}, "mrope_section must have 3 entries"),
        ({"text_config__rope_scaling__mrope_section": [5, 5, 5]}, "adds up to 15, not to head_dim / 2 = 16"),
        ({"text_config__rope_scaling__mrope_section": [2, 7, 7]}, "does not fit head_dim / 2 = 16"),
        ({"text_config__num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"text_config__hidden_size": True}, "hidden_size must be a non-negative int, got True"),
        ({"text_config__hidden_size": -1}, "hidden_size must be a non-negative int, got -1"),
        ({"text_config__hidden_size": 0}, "hidden_size must be in 1.."),
        ({"text_config__hidden_size": "64"}, "hidden_size must be a non-negative int, got '64'"),
        ({"text_config__rms_norm_eps": float("nan")}, "rms_norm_eps must be a non-negative float"),
        ({"text_config__rope_theta": float("inf")}, "rope_theta must be a non-negative float"),
        ({"text_config__rope_theta": 0.5}, "rope_theta must be in 1..inf, got 0.5"),
        ({"vision_config__rope_theta": 1e-300}, "vision rope_theta must be in 1..inf, got 1e-300"),
        ({"text_config__rms_norm_eps": 0.0}, "rms_norm_eps must be in 1.1754943508222875e-38..16777216, got 0.0"),
        ({"text_config__rms_norm_eps": 1e-300}, "rms_norm_eps must be in 1.1754943508222875e-38.."),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers must be in 1..1024"),
        ({"text_config__vocab_size": 10**12}, "vocab_size must be in 1.."),
        ({"text_config__num_experts_per_tok": 9}, "num_experts_per_tok 9 is not in 1..8"),
        ({"text_config__decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer"),
        ({"text_config__decoder_sparse_step": "1"}, "decoder_sparse_step must be a positive integer"),
        ({"text_config__mlp_only_layers": 3}, "mlp_only_layers must be a list of integers"),
        ({"vision_config__hidden_act": "gelu"}, "hidden_act must be 'gelu_pytorch_tanh'"),
        ({"vision_config__out_hidden_size": 65}, "out_hidden_size 65 differs from text hidden_size 64"),
        ({"vision_config__num_position_embeddings": 63}, "63 is not a square"),
        ({"vision_config__num_heads": 5}, "vision head size 48/5"),
        ({"vision_config__deepstack_visual_indexes": [0, 1, 4]}, "must rise within 0..3"),
        ({"vision_config__deepstack_visual_indexes": [1, 0]}, "must rise within 0..3"),
        (
            {"vision_config__depth": 9, "vision_config__deepstack_visual_indexes": [1, 2, 3, 4, 5, 6]},
            "6 DeepStack levels",
        ),
        ({"image_token_id": 304}, "must differ and lie within the vocabulary of 304"),
        ({"video_token_id": 290}, "must differ and lie within the vocabulary of 304"),
    ],
)
def test_refused(changes, reason):
    assert any(reason in problem for problem in problems(edited(**changes)))


YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 262144}


@pytest.mark.parametrize(("spelling", "place"), [("hub", "rope_scaling"), ("v5", "rope_parameters")])
def test_yarn_is_read_in_both_spellings(spelling, place):
    raw = edited(spelling)
    raw["text_config"][place] |= YARN
    expected = YarnScaling(factor=3.0, original_max_position_embeddings=262144, attention_factor=0.1 * math.log(3) + 1)
    assert ModelConfig.from_dict(raw).text.yarn == expected
    raw["text_config"][place]["type"] = raw["text_config"][place].pop("rope_type")
    assert ModelConfig.from_dict(raw).text.yarn == expected


@pytest.mark.parametrize(("spelling", "place"), [("hub", "rope_scaling"), ("v5", "rope_parameters")])
def test_theta_is_said_once_or_the_same(spelling, place):
    raw = edited(spelling)
    raw["text_config"] |= {"rope_theta": 5e6}
    raw["text_config"][place] |= {"rope_theta": 5_000_000}
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(RAW[spelling])
    raw["text_config"][place] |= {"rope_theta": 10000}
    assert problems(raw) == [f"text_config.{place}: two of rope_theta: 10000, 5000000.0"]
    del raw["text_config"]["rope_theta"]
    assert ModelConfig.from_dict(raw).text.rope_theta == 10000


@pytest.mark.parametrize("nothing", [None, {}])
def test_rope_parameters_that_say_nothing(nothing):
    raw = edited()
    raw["text_config"]["rope_parameters"] = nothing
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(RAW["hub"])


def test_messages_are_short():
    raw = edited(tie_word_embeddings="x" * 10**6, text_config__hidden_size=["y"] * 10**6)
    assert [len(problem) < 200 for problem in problems(raw)] == [True, True]


def test_two_spellings_at_once_must_agree():
    raw = edited("v5")
    raw["text_config"]["rope_scaling"] = YARN
    [problem] = problems(raw)
    assert problem == "text_config.rope_scaling: two rope types: 'yarn' there, 'default' in rope_parameters"
    raw["text_config"]["rope_parameters"] |= YARN
    assert ModelConfig.from_dict(raw).text.yarn is not None


def test_without_yarn_its_entries_say_nothing():
    raw = edited()
    raw["text_config"]["rope_scaling"] |= {**YARN, "rope_type": "default"}
    assert ModelConfig.from_dict(raw).text.yarn is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"factor": None}, "text_config.factor is missing"),
        ({"factor": "3"}, "factor must be a non-negative float, got '3'"),
        ({"factor": 0.5}, "yarn factor 0.5 is less than 1"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings must be positive"),
        ({"attention_factor": 0}, "attention_factor 0.0 is not positive"),
        ({"attention_factor": 1e18}, "attention_factor 1e+18 is larger than 16777216"),
        ({"beta_fast": 1, "beta_slow": 2}, "beta_fast 1.0 is less than beta_slow 2.0"),
        ({"beta_fast": "fast"}, "beta_fast must be a non-negative float"),
        ({"truncate": "no"}, "truncate must be true or false"),
        ({"rope_theta": 1}, "yarn needs a rope_theta larger than 1"),
    ],
)
def test_yarn_refused(changes, reason):
    raw = edited("v5")
    raw["text_config"]["rope_parameters"] |= {**YARN, **changes}
    assert any(reason in problem for problem in problems(raw))


def test_which_layers_have_experts():
    assert [CONFIGS["mixed"].text.is_moe_layer(i) for i in range(5)] == [True, True, True, False, True]
    assert [CONFIGS["odd"].text.is_moe_layer(i) for i in range(4)] == [False, True, False, True]
    assert not any(CONFIGS["dense"].text.is_moe_layer(i) for i in range(5))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(data):
    raw = copy.deepcopy(RAW[data.draw(st.sampled_from(["hub", "v5"]))])
    for _ in range(data.draw(st.integers(1, 3))):
        place, key = raw, data.draw(st.sampled_from(sorted(raw)))
        while place[key] and isinstance(place[key], dict) and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place)))
        place[key] = data.draw(ANY_JSON)
    with contextlib.suppress(ConfigError):
        assert isinstance(ModelConfig.from_dict(raw), ModelConfig)


@pytest.mark.parametrize("key", ["hidden_size", "num_heads", "head_dim"])
@pytest.mark.parametrize("value", ["64", [1], {}, 1.5, 0])
def test_sizes_of_vision_heads_are_read_or_refused(key, value):
    """Also where the file says a size that follows from the others."""
    vision = {"head_dim": CONFIGS["mixed"].vision.hidden_size // CONFIGS["mixed"].vision.num_heads}
    raw = edited(**{f"vision_config__{name}": size for name, size in (vision | {key: value}).items()})
    assert any(key in problem for problem in problems(raw))
