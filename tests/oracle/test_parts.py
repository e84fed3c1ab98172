"""Single parts against the oracle's, bit for bit: what the tolerance on bfloat16 logits is too wide to see."""

import pytest
import torch

from qwen3vl_disagg.model.moe import route
from qwen3vl_disagg.model.rope import apply_rotary, text_rotary, vision_rotary
from qwen3vl_disagg.model.vision import patch_coordinates
from tests.support.oracle import CONFIGS

DTYPES = [torch.float32, torch.bfloat16]
NAMES = ["moe", "odd"]


@pytest.fixture(params=[(name, dtype) for name in NAMES for dtype in DTYPES], ids=str)
def pair(request, pool):
    """(config, oracle, ours)"""
    name, dtype = request.param
    return CONFIGS[name], pool.oracle(name, dtype).model, pool.ours(name, dtype)


def random(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.no_grad()
def test_rms_norm(pair):
    config, oracle, ours = pair
    norm = ours.language_model.model.layers[1].input_layernorm
    x = random(20, config.text.hidden_size, dtype=norm.weight.dtype) * 3
    assert torch.equal(norm(x), oracle.language_model.layers[1].input_layernorm(x))


@torch.no_grad()
def test_text_rotary(pair):
    config, oracle, ours = pair
    text, dtype = config.text, ours.language_model.lm_head.weight.dtype
    positions = torch.randint(0, text.max_position_embeddings, (3, 40), generator=torch.Generator().manual_seed(0))
    cos, sin = text_rotary(
        positions, head_dim=text.head_dim, theta=text.rope_theta, section=text.mrope_section, dtype=dtype
    )
    oracle_cos, oracle_sin = oracle.language_model.rotary_emb(torch.empty(0, dtype=dtype), positions[:, None])
    assert torch.equal(cos[:, 0], oracle_cos[0])
    assert torch.equal(sin[:, 0], oracle_sin[0])


@torch.no_grad()
def test_first_query_after_norm_and_rotary(pair):
    config, oracle, ours = pair
    text, attention = config.text, ours.language_model.model.layers[0].self_attn
    q = random(9, text.num_attention_heads, text.head_dim, dtype=attention.q_norm.weight.dtype)
    positions = torch.arange(9).expand(3, -1)
    rotary = text_rotary(
        positions, head_dim=text.head_dim, theta=text.rope_theta, section=text.mrope_section, dtype=q.dtype
    )
    cos, sin = (x[:, 0] for x in rotary)
    normed = oracle.language_model.layers[0].self_attn.q_norm(q)
    rotated_half = torch.cat((-normed[..., text.head_dim // 2 :], normed[..., : text.head_dim // 2]), -1)
    assert torch.equal(apply_rotary(attention.q_norm(q), *rotary), normed * cos[:, None] + rotated_half * sin[:, None])


@torch.no_grad()
def test_router(pair):
    config, oracle, ours = pair
    layer = 1  # has experts in both configs
    block = ours.language_model.model.layers[layer].mlp
    x = random(50, config.text.hidden_size, dtype=block.gate.weight.dtype)
    weights, ids = route(block.gate(x), config.text.num_experts_per_tok)
    _, oracle_weights, oracle_ids = oracle.language_model.layers[layer].mlp.gate(x)
    assert torch.equal(ids, oracle_ids)
    assert torch.equal(weights, oracle_weights)


@torch.no_grad()
def test_vision_rotary(pair):
    config, oracle, _ = pair
    vision, grids = config.vision, [(1, 4, 6), (2, 2, 8)]
    coords = patch_coordinates(grids, vision.spatial_merge_size)
    cos, sin = vision_rotary(coords, head_dim=vision.hidden_size // vision.num_heads)
    oracle_cos, oracle_sin = oracle.visual.rotary_pos_emb(torch.empty(0), coords)
    assert torch.equal(cos[:, 0], oracle_cos.view(cos[:, 0].shape))
    assert torch.equal(sin[:, 0], oracle_sin.view(sin[:, 0].shape))


@torch.no_grad()
def test_patches_with_their_positions(pair):
    """What enters the first block; the oracle convolves, so sums may round otherwise."""
    config, oracle, ours = pair
    grids = torch.tensor([(1, 4, 6), (1, 2, 8)])
    pixels = random(40, config.vision.patch_dim, dtype=torch.float32)
    entered = []
    handles = [
        tower.blocks[0].register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
        for tower in (ours.visual, oracle.visual)
    ]
    try:
        ours.visual(pixels, grids)
        oracle.visual(pixels.to(oracle.dtype), grid_thw=grids)
    finally:
        for handle in handles:
            handle.remove()
    mine, theirs = entered
    assert mine.dtype == theirs.dtype
    tolerance = 1e-5 if mine.dtype == torch.float32 else 1e-2  # one rounding of bfloat16
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
