"""Configs of small sizes of every kind, as a checkpoint's config.json says them."""

from __future__ import annotations

from hypothesis import strategies as st

from qwen3vl_disagg.model.config import ARCHITECTURES, MAX_SIZE, SMALLEST_EPS

IMAGE = 5


def sizes(most):
    """Any number, the multiples at which grouped matmuls and the CPU kernels begin more often than by chance."""
    some = st.integers(1, most) | st.integers(1, most // 4).map(lambda n: 4 * n)
    return some | st.integers(1, 3).map(lambda n: 32 * n)


@st.composite
def yarns(draw):
    """Entries of a rotary embedding for a longer context."""
    yarn = {
        "rope_type": "yarn",
        "factor": draw(st.sampled_from([1.0, 1.5, 4.0, 1e18])),
        "original_max_position_embeddings": draw(st.sampled_from([1, 100, 262144])),
    }
    optional = {
        "attention_factor": st.sampled_from([1e-30, 0.5, MAX_SIZE]),
        "beta_fast": st.sampled_from([1.0, 32.0, 1e18]),
        "beta_slow": st.sampled_from([1e-18, 1.0]),
        "mscale": st.sampled_from([0.5, 1e3]),
        "mscale_all_dim": st.sampled_from([0.5, 1.0]),
        "truncate": st.booleans(),
    }
    return yarn | draw(st.fixed_dictionaries({}, optional=optional))


@st.composite
def raw_configs(draw):
    """Small sizes of every kind, most of them possible."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 17]))
    half = draw(st.integers(1, 40) | st.sampled_from([32, 64, 128]))
    height = draw(st.integers(0, (half + 1) // 3))
    width = draw(st.integers(0, half // 3))
    hidden, layers = draw(sizes(70)), draw(st.integers(1, 4))
    num_experts = draw(st.integers(0, 6))
    vision_heads, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    levels = draw(st.sets(st.integers(0, depth - 1), max_size=layers))
    text = {
        "vocab_size": draw(st.integers(IMAGE + 4, 90)),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * half,
        "intermediate_size": draw(sizes(70)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, SMALLEST_EPS, 1e6])),
        "rope_theta": draw(st.sampled_from([1.0, 1e4, 5e6, 1e18])),
        "rope_scaling": {"mrope_section": [half - height - width, height, width]},
        "max_position_embeddings": draw(st.sampled_from([20, 200, 4096])),
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(min(1, num_experts), num_experts)),
        "moe_intermediate_size": draw(sizes(70)),
        "mlp_only_layers": draw(st.lists(st.integers(-1, layers), max_size=2)),
        "decoder_sparse_step": draw(st.integers(1, 3)),
    }
    text["rope_scaling"] |= draw(st.just({}) | yarns())
    vision = {
        "depth": depth,
        "hidden_size": 4 * vision_heads * draw(st.integers(1, 20)),
        "num_heads": vision_heads,
        "intermediate_size": draw(sizes(70)),
        "out_hidden_size": hidden,
        "num_position_embeddings": draw(st.integers(1, 5)) ** 2,
        "deepstack_visual_indexes": sorted(levels),
        "in_channels": 3,
        "patch_size": draw(st.integers(1, 5)),
        "temporal_patch_size": draw(st.integers(1, 3)),
        "spatial_merge_size": draw(st.integers(1, 3)),
        "rope_theta": draw(st.sampled_from([1.0, 500.0, 1e4, 1e18])),
    }
    return {
        "architectures": [draw(st.sampled_from(ARCHITECTURES[: 1 if num_experts else 2]))],
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
        "vision_start_token_id": IMAGE + 2,
        "vision_end_token_id": IMAGE + 3,
        "tie_word_embeddings": draw(st.booleans()),
        "text_config": text,
        "vision_config": vision,
    }
