"""Any config, not only those that were chosen, against the oracle."""

import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, assume, given, settings

from qwen3vl_disagg.checkpoint import load_model
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.model.config import ConfigError
from tests.support.any_config import raw_configs
from tests.support.oracle import load_oracle, make_prompt, relative_error, run_oracle, run_ours
from tools.checkpoints import write_random_checkpoint


def runnable(raw) -> ModelConfig:
    """The config with room for the prompts; assumes one that the oracle can run and report on."""
    ids = {"vision_start_token_id": 40, "vision_end_token_id": 41, "image_token_id": 42, "video_token_id": 43}
    text = raw["text_config"] | {"vocab_size": 64, "max_position_embeddings": 512}
    try:
        config = ModelConfig.from_dict({**raw, **ids, "text_config": text})
    except ConfigError:
        assume(False)
    assume(config.text.num_hidden_layers > 1)  # it reports what is between layers
    width, hidden = config.text.moe_intermediate_size, config.text.hidden_size
    assume(not config.text.num_experts or hidden not in (width, 2 * width))  # it takes square experts the other way
    return replace(config, dtype="float32")


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(raw=raw_configs())
def test_same_numbers(raw):
    config = runnable(raw)
    if not config.text.num_experts:
        config = replace(config, architecture="Qwen3VLForConditionalGeneration")
    merge = config.vision.spatial_merge_size
    prompts = [
        make_prompt(config, parts, seed=seed)
        for seed, parts in enumerate([[7], [3, (1, 2 * merge, 3 * merge), 2], [1, (1, merge, merge)]])
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), config, seed=3)
        oracle = load_oracle(Path(folder))
        oracle.set_experts_implementation("eager")
        ours = load_model(Path(folder))
    theirs, mine = run_oracle(oracle, config, prompts), run_ours(ours, prompts)
    assert (mine.positions == theirs.positions).all()
    pairs = [(mine.logits, theirs.logits), (mine.main, theirs.main), *zip(mine.levels, theirs.levels, strict=True)]
    assert max(relative_error(*pair) for pair in pairs) < 5e-5
