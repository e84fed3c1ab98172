"""Ours against the oracle: positions exact, every stage within 1e-5 in float32, within rounding in bfloat16."""

import itertools

import pytest
import torch

from qwen3vl_disagg.checkpoint import load_model
from tests.support.oracle import CASES, CONFIGS, make_case, relative_error, run_oracle, run_ours

TOLERANCE = 1e-5


@pytest.mark.parametrize(("name", "case"), list(itertools.product(CONFIGS, CASES)))
def test_float32(pool, name, case):
    theirs = pool.expected(name, case)
    ours = run_ours(pool.ours(name), make_case(CONFIGS[name], case))
    assert torch.equal(ours.positions, theirs.positions)
    assert len(ours.levels) == len(theirs.levels)
    assert len(ours.layers) == len(theirs.layers) == CONFIGS[name].text.num_hidden_layers - 1
    stages = {"main": (ours.main, theirs.main), "logits": (ours.logits, theirs.logits)}
    stages |= {f"level {i}": pair for i, pair in enumerate(zip(ours.levels, theirs.levels, strict=True))}
    stages |= {f"layer {i}": pair for i, pair in enumerate(zip(ours.layers, theirs.layers, strict=True))}
    errors = {stage: relative_error(*pair) for stage, pair in stages.items()}
    assert max(errors.values()) < TOLERANCE, errors
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_form_of_the_oracle_agrees(pool, attention, experts):
    oracle, prompts = pool.oracle("moe"), make_case(CONFIGS["moe"], "two images")
    oracle.set_attn_implementation(attention)
    oracle.set_experts_implementation(experts)
    try:
        theirs = run_oracle(oracle, CONFIGS["moe"], prompts)
    finally:
        oracle.set_attn_implementation("eager")
        oracle.set_experts_implementation("grouped_mm")
    assert relative_error(run_ours(pool.ours("moe"), prompts).logits, theirs.logits) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16(pool, name):
    case = "batch"
    exact = pool.expected(name, case)
    theirs = pool.expected(name, case, torch.bfloat16)
    ours = run_ours(pool.ours(name, torch.bfloat16), make_case(CONFIGS[name], case))
    for stage in ("main", "logits"):
        mine, other, true = getattr(ours, stage), getattr(theirs, stage), getattr(exact, stage)
        assert mine.dtype == torch.bfloat16
        assert relative_error(mine, other) < 3e-2
        assert relative_error(mine, true) <= 1.25 * relative_error(other, true)


@pytest.mark.parametrize("name", ["moe", "odd"])
def test_without_deepstack_the_logits_differ(pool, name, monkeypatch):
    model = load_model(pool.folder(name))
    monkeypatch.setattr(model.language_model.model, "num_deepstack_levels", 0)
    ours = run_ours(model, make_case(CONFIGS[name], "one image"))
    theirs = pool.expected(name, "one image")
    assert relative_error(ours.main, theirs.main) < TOLERANCE
    assert relative_error(ours.logits, theirs.logits) > 1e-2


@pytest.mark.parametrize("name", ["moe", "odd"])
def test_without_the_position_table_the_rows_differ(pool, name):
    model = load_model(pool.folder(name))
    model.visual.pos_embed.weight.zero_()
    ours = run_ours(model, make_case(CONFIGS[name], "one image"))
    theirs = pool.expected(name, "one image")
    assert relative_error(ours.main, theirs.main) > 1e-3
    assert relative_error(ours.logits, theirs.logits) > 1e-4
