"""The published sizes, counted on the meta device."""

import pytest
import torch

from qwen3vl_disagg.model import ModelConfig, Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.plan.presets import PRESETS
from tools.checkpoints import config_to_dict

COUNTS = {
    "30b-a3b": 31_070_754_032,
    "235b-a22b": 235_670_022_896,
    "2b": 2_127_532_032,
    "4b": 4_437_815_808,
    "8b": 8_767_123_696,
    "32b": 33_357_390_064,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_all_published_sizes_are_there():
    assert PRESETS.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spelling", ["hub", "v5"])
def test_presets_survive_writing_and_reading(name, spelling):
    assert ModelConfig.from_dict(config_to_dict(PRESETS[name], spelling=spelling)) == PRESETS[name]


def test_tensors_of_the_30b():
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(PRESETS["30b-a3b"])
    names = [name for name, _ in model.named_parameters()]
    vision = [name for name in names if name.startswith("visual.")]
    assert (len(vision), len(names) - len(vision)) == (351, 531)
