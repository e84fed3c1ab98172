"""A config that passes every check runs: tower, prefill and decode, in each dtype, whatever its sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.model import ModelConfig, separate_deepstack
from qwen3vl_disagg.model.config import ConfigError
from qwen3vl_disagg.protocol.messages import Finished
from qwen3vl_disagg.transport.buffers import VisualRows
from tests.support.any_config import IMAGE, raw_configs
from tests.support.engine import make_engine, run
from tools.checkpoints import random_language_model, random_vision_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
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

    item = VisualItem(
        modality="image", digest="", num_bytes=1, grid=(1, *grid[1:]), num_rows=6, offset=2, param="messages[0]"
    )
    ids = [0, 1, *[IMAGE] * item.num_rows, 2]
    given_rows = VisualRows(1, 0, item.num_rows, ((0, main[: item.num_rows]),), ((0, deepstack[: item.num_rows]),))
    model.model.embed_tokens.weight[3] = 0
    engine = make_engine(model, max_prefill_tokens=5)
    sampling = SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=20)
    requests = {"r": (ids, [item], [given_rows]), "s": ([3, 4], [], [])}
    for events in run(engine, requests, sampling).values():
        assert isinstance(events[-1], Finished), events[-1]
