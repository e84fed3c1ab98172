"""Ceilings against sums worked by hand."""

from dataclasses import replace

import pytest
import torch

from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack, Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.model.config import TextConfig, VisionConfig
from qwen3vl_disagg.plan.presets import PRESETS
from tools.bench_ceilings import Rates, Work, decode_step, distinct_experts, image, prefill
from tools.checkpoints import RANDOM_PRESETS

TEXT = TextConfig(
    vocab_size=100,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    intermediate_size=10,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(1, 0, 0),
    max_position_embeddings=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=5,
    mlp_only_layers=(1,),
)
# q 8*8, o 8*8, k 8*4, v 8*4
ATTENTION = 3 * (64 + 64 + 32 + 32)
DENSE, ROUTERS, EXPERT = 3 * 8 * 10, 2 * 4 * 8, 3 * 8 * 5
HEAD = 100 * 8


@pytest.mark.parametrize(
    ("experts", "per_token", "tokens", "expected"),
    [
        (4, 2, 0, 0),
        (4, 2, 1, 2),
        (4, 2, 2, 3),  # the second token's 2 are new with probability 1/2 each
        (32, 4, 1, 4),
        (32, 4, 8, 32 * (1 - (7 / 8) ** 8)),
        (8, 8, 5, 8),
    ],
)
def test_distinct_experts(experts, per_token, tokens, expected):
    assert distinct_experts(experts, per_token, tokens) == pytest.approx(expected)


def test_bytes_of_a_step_at_batch_1():
    work = decode_step(TEXT, batch=1, context=10)
    # Two layers with 2 experts each, one dense, the head, one embedding row; keys and values 3 layers * 2 heads * 2.
    weights = ATTENTION + DENSE + ROUTERS + 2 * 2 * EXPERT + HEAD + 8
    assert work.num_bytes == 2 * weights + 2 * (2 * 3 * 2 * 2 * 10)


def test_bytes_of_a_step_at_batch_2_with_other_item_sizes():
    work = decode_step(TEXT, batch=2, context=10, weight_bytes=1, kv_bytes=4)
    weights = ATTENTION + DENSE + ROUTERS + 2 * 3 * EXPERT + HEAD + 2 * 8
    assert work.num_bytes == pytest.approx(weights + 2 * 4 * (2 * 3 * 2 * 2 * 10))


def test_operations_of_a_step_grow_with_the_batch():
    one = ATTENTION + DENSE + ROUTERS + 2 * 2 * EXPERT + HEAD
    scores = 3 * 2 * 2 * (4 * 2) * 10  # layers, two products, multiply and add, heads * head size, context
    assert decode_step(TEXT, batch=1, context=10).flop == 2 * one + scores
    assert decode_step(TEXT, batch=5, context=10).flop == 5 * (2 * one + scores)


def test_prefill_reads_every_expert_and_scores_half_a_square():
    work = prefill(TEXT, tokens=200)
    layers = ATTENTION + DENSE + ROUTERS
    assert work.num_bytes == pytest.approx(2 * (layers + 2 * 4 * EXPERT + HEAD + 200 * 8))
    pairs = 200 * 201 // 2
    assert work.flop == 2 * (200 * (layers + 2 * 2 * EXPERT) + HEAD) + 3 * 2 * 2 * 8 * pairs


def test_a_dense_model_has_no_experts():
    dense = replace(TEXT, num_experts=0, num_experts_per_tok=0, mlp_only_layers=())
    layers = ATTENTION + 3 * DENSE
    assert decode_step(dense, batch=3, context=1).num_bytes == 2 * (layers + HEAD + 3 * 8) + 3 * 2 * 24
    assert prefill(dense, tokens=1).flop == 2 * (layers + HEAD) + 3 * 2 * 2 * 8


def test_operations_of_an_image():
    vision = VisionConfig(
        depth=2,
        hidden_size=8,
        num_heads=2,
        intermediate_size=12,
        out_hidden_size=8,
        num_position_embeddings=16,
        deepstack_visual_indexes=(0,),
        patch_size=2,
    )
    config = replace(RANDOM_PRESETS["tiny-random"], text=TEXT, vision=vision)
    patches, rows = 2 * 4 * 6, 2 * 2 * 3
    per_patch = 3 * 2 * 2 * 2 * 8 + 2 * (4 * 64 + 2 * 8 * 12)
    per_row = 2 * (32 * 32 + 32 * 8)
    scores = 2 * 2 * (2 * 2 * 24 * 24 * 8)  # blocks, frames
    work = image(config, (2, 4, 6))
    assert work.flop == 2 * (patches * per_patch + rows * per_row) + scores
    assert work.num_bytes == 2 * (per_patch + per_row)


@pytest.mark.parametrize("config", [RANDOM_PRESETS["mid"], PRESETS["30b-a3b"]])
def test_a_step_that_uses_every_expert_reads_all_weights_but_norms(config):
    with torch.device("meta"):
        model = Qwen3MoeForCausalLMWithDeepStack(config)
        tower = Qwen3VLMoeForConditionalGeneration(config, language_model=False)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in name)
    embeddings = 100_000 * config.text.hidden_size
    assert decode_step(config.text, batch=100_000, context=0, weight_bytes=1).num_bytes == matrices + embeddings
    matrices = sum(p.numel() for name, p in tower.named_parameters() if p.dim() > 1 and "pos_embed" not in name)
    assert image(config, (1, 2, 2), weight_bytes=1).num_bytes == matrices


def test_30b_reads_about_6_gb_for_a_token():
    assert decode_step(PRESETS["30b-a3b"].text, batch=1, context=0).num_bytes == pytest.approx(6.1e9, rel=0.02)


def test_the_slower_of_memory_and_arithmetic_decides():
    work = Work(num_bytes=100, flop=1000)
    assert work.seconds(Rates(bytes_s=10, flop_s=1000)) == 10
    assert work.seconds(Rates(bytes_s=1000, flop_s=10)) == 100
