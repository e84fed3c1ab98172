"""A config that passes every check runs: tower, prefill and decode, in each dtype, whatever its sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.checkpoint.random import random_language_model, random_vision_model
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.disagg.messages import Finished
from qwen3vl_disagg.disagg.rows import VisualRows
from qwen3vl_disagg.model import ModelConfig, separate_deepstack
from qwen3vl_disagg.model.config import ConfigError
from tests.support.engine import make_engine, make_item, run

IMAGE = 5


@st.composite
def raw_configs(draw):
    """Small sizes of every kind, most of them possible."""
    kv_heads, group, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    height = draw(st.integers(0, half // 3))
    width = draw(st.integers(0, half // 3))
    hidden, layers = draw(st.integers(1, 70)), draw(st.integers(1, 4))
    vision_heads, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    text = {
        "vocab_size": draw(st.integers(10, 90)),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * half,
        "intermediate_size": draw(st.integers(1, 70)),
        "rms_norm_eps": draw(st.sampled_from([0.0, 1e-6, 1e-5])),
        "rope_theta": draw(st.sampled_from([0.5, 1.0, 1e4, 5e6])),
        "rope_scaling": {"rope_type": "default", "mrope_section": [half - height - width, height, width]},
        "max_position_embeddings": draw(st.sampled_from([0, 200, 4096])),
        "num_experts": draw(st.integers(0, 6)),
        "num_experts_per_tok": draw(st.integers(0, 4)),
        "moe_intermediate_size": draw(st.integers(0, 70)),
        "mlp_only_layers": draw(st.lists(st.integers(0, layers), max_size=2)),
        "decoder_sparse_step": draw(st.integers(1, 2)),
    }
    vision = {
        "depth": depth,
        "hidden_size": 4 * vision_heads * draw(st.integers(1, 20)),
        "num_heads": vision_heads,
        "intermediate_size": draw(st.integers(1, 70)),
        "out_hidden_size": hidden,
        "num_position_embeddings": draw(st.integers(1, 5)) ** 2,
        "deepstack_visual_indexes": sorted(draw(st.sets(st.integers(0, depth - 1)))),
        "in_channels": draw(st.sampled_from([3, 3, 3, 1, 4])),
        "patch_size": draw(st.integers(1, 5)),
        "temporal_patch_size": draw(st.integers(1, 3)),
        "spatial_merge_size": draw(st.integers(1, 3)),
        "rope_theta": draw(st.sampled_from([1.0, 500.0, 1e4])),
    }
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
        "vision_start_token_id": IMAGE + 2,
        "vision_end_token_id": IMAGE + 3,
        "tie_word_embeddings": draw(st.booleans()),
        "text_config": text,
        "vision_config": vision,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(raw=raw_configs())
@torch.inference_mode()
def test_it_runs_or_is_refused(dtype, raw):
    try:
        config = ModelConfig.from_dict(raw)
    except ConfigError:
        assume(False)
    vision, model = random_vision_model(config, dtype, "cpu", 0), random_language_model(config, dtype, "cpu", 1)
    merge = config.vision.spatial_merge_size
    grid = (2, 2 * merge, 3 * merge)
    pixels = torch.randn(2 * 6 * merge**2, config.vision.patch_dim, generator=torch.Generator().manual_seed(0))
    rows = vision.get_image_feature(pixels, [grid])
    main, deepstack = separate_deepstack(rows, config.text.hidden_size)
    assert main.shape == (12, config.text.hidden_size)
    assert deepstack.shape == (12, config.num_deepstack_levels * config.text.hidden_size)
    assert rows.isfinite().all()

    item = make_item(2, grid=(1, 4, 6))
    ids = [0, 1, *[IMAGE] * item.num_rows, 2]
    given_rows = VisualRows(1, 0, item.num_rows, ((0, main[: item.num_rows]),), ((0, deepstack[: item.num_rows]),))
    engine = make_engine(model, max_prefill_tokens=5)
    sampling = SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=1)
    if config.vision.spatial_merge_size != 2:
        ids, item, requests = [0, 1, 2, 3], None, {}
    requests = {"r": (ids, [item] if item else [], [given_rows]), "s": ([3, 4], [], [])}
    for events in run(engine, requests, sampling).values():
        assert isinstance(events[-1], Finished), events[-1]
