"""Sampling values: the checkpoint's own, what a request may change, and their bounds."""

from __future__ import annotations

import json

import pytest

from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.core.readers import Number
from qwen3vl_disagg.core.sampling_params import DEFAULTS, OPTIONS
from qwen3vl_disagg.processing import GenerationDefaults


def test_generation_defaults(tmp_path):
    assert GenerationDefaults.from_folder(tmp_path, default_eos=7) == GenerationDefaults(frozenset({7}))
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": [5, 6]}')
    defaults = GenerationDefaults.from_folder(tmp_path, default_eos=7)
    assert defaults.eos_token_ids == {5, 6}
    sampling = defaults.sampling(top_k=3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 3)
    assert defaults.sampling(temperature=0).temperature == 0
    path.write_text('{"do_sample": false, "temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.05}')
    sampling = GenerationDefaults.from_folder(tmp_path, default_eos=7).sampling()
    assert (sampling.temperature, sampling.min_p, sampling.repetition_penalty) == (0, 0.1, 1.05)
    assert (
        GenerationDefaults.from_folder(tmp_path, default_eos=7).sampling(repetition_penalty=1).repetition_penalty == 1
    )
    path.write_text('{"temperature": "hot"}')
    with pytest.raises(CheckpointError, match="temperature"):
        GenerationDefaults.from_folder(tmp_path, default_eos=7)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_generation_config_may_give(tmp_path, name):
    option = OPTIONS[name]
    values = {"do_sample": True, name: option.example if isinstance(option.kind, Number) else None}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    found = getattr(GenerationDefaults.from_folder(tmp_path, default_eos=7).sampling(max_new_tokens=128), name)
    own = 1.0 if name == "temperature" else DEFAULTS[name]
    assert found == (option.example if option.is_checkpoints else own)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"top_k": 1.5},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**9},
        {"seed": -1},
        {"seed": 2**64},
        {"logprobs": 21},
        {"min_p": 1.5},
        {"min_p": float("nan")},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"repetition_penalty": 0},
        {"min_tokens": -1},
        {"min_tokens": 10, "max_new_tokens": 9},
        {"stop": [""]},
        {"stop": ["a"] * 17},
        {"logit_bias": {-1: 0.5}},
        {"logit_bias": {1: float("nan")}},
    ],
)
def test_numbers_out_of_bounds_are_refused(values):
    with pytest.raises(InputError, match=next(iter(values))):
        GenerationDefaults(frozenset({1})).sampling(**values)
