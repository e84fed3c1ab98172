"""Which rank holds what: the arithmetic, and that no parameter is without a placement."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.parallel import expert_placement as placement
from qwen3vl_disagg.parallel.expert_placement import (
    LANGUAGE_PLAN,
    placements,
    shard_rows,
)
from qwen3vl_disagg.plan.presets import PRESETS
from tools.checkpoints import RANDOM_PRESETS

CONFIGS = {**PRESETS, **RANDOM_PRESETS}


@given(size=st.integers(1, 300), num_ranks=st.integers(1, 40))
def test_rows_are_those_of_chunk(size, num_ranks):
    """And so those of DTensor; ranks behind the last chunk hold none."""
    rows = [shard_rows(size, num_ranks, rank) for rank in range(num_ranks)]
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(num_ranks)]
    assert [list(r) for r in rows] == chunks + [[]] * (num_ranks - len(chunks))


@given(size=st.integers(0, 300), num_ranks=st.integers(1, 40))
def test_rows_are_those_of_dtensor(size, num_ranks):
    for rank in range(num_ranks):
        local, offset = Shard(0).local_shard_size_and_offset(size, num_ranks, rank)
        rows = shard_rows(size, num_ranks, rank)
        assert (len(rows), rows.start) == (local, min(offset, size))


def test_known_splits():
    assert [len(shard_rows(128, 6, rank)) for rank in range(6)] == [22] * 5 + [18]
    assert [len(shard_rows(12, 5, rank)) for rank in range(5)] == [3, 3, 3, 3, 0]
    assert shard_rows(12, 5, 4) == range(12, 12)


@pytest.mark.parametrize(("size", "num_ranks", "rank"), [(8, 4, 4), (8, 4, -1), (8, 0, 0), (-1, 2, 0)])
def test_no_such_rank(size, num_ranks, rank):
    with pytest.raises(ValueError, match=f"no rows of {size} for rank {rank} of {num_ranks}"):
        shard_rows(size, num_ranks, rank)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_placement(name):
    """Experts are spread, nothing else is."""
    config = CONFIGS[name]
    with torch.device("meta"):
        language = Qwen3MoeForCausalLMWithDeepStack(config)
    placed = placements([name for name, _ in language.named_parameters(remove_duplicate=False)], LANGUAGE_PLAN)
    spread = {name for name, where in placed.items() if where == Shard(0)}
    moe_layers = [i for i in range(config.text.num_hidden_layers) if config.text.is_moe_layer(i)]
    assert spread == {f"model.layers.{i}.mlp.experts.{p}_proj" for i in moe_layers for p in ("gate_up", "down")}
    assert all(placed[name] == Replicate() for name in placed.keys() - spread)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.experts.gate_up_proj_scale",
        "visual.merger.norm.weight",
    ],
)
def test_unknown_parameters_are_refused(name):
    with pytest.raises(ValueError, match=f"parameter {name}: 0 patterns"):
        placements([name], LANGUAGE_PLAN)


def test_a_plan_that_says_two_things_is_refused():
    plan = [*LANGUAGE_PLAN, (r"lm_head\..*", Shard(0))]
    with pytest.raises(ValueError, match=r"parameter lm_head\.weight: 2 patterns"):
        placements(["model.norm.weight", "lm_head.weight"], plan)


def test_docstring_examples():
    results = doctest.testmod(placement)
    assert results.attempted > 0
    assert results.failed == 0
