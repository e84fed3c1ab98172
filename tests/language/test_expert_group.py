"""What language ranks compare before they load: each thing that would make their parts or their steps differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen3vl_disagg.checkpoint import decoder_digest
from qwen3vl_disagg.cluster.rank_setup import RankSetup
from qwen3vl_disagg.cluster.registry import check_fingerprint
from qwen3vl_disagg.cluster.rendezvous import Layout, RankContext, World
from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.core.settings import ModelOptions
from qwen3vl_disagg.language.expert_group import shared_facts, shares_experts
from qwen3vl_disagg.options import ServeOptions
from qwen3vl_disagg.parallel.lockstep import PaceLimits
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint

LIMITS = PaceLimits(64, 4096)


def setup_of(options: ModelOptions, world: int = 3) -> RankSetup:
    layout, where = Layout.of(world, 1), World(local_rank=1, num_local_ranks=world)
    return RankSetup.of(RankContext(1, layout, ("127.0.0.1", 1), "token", ServeOptions(model=options), where))


def facts_of(options: ModelOptions, limits: PaceLimits = LIMITS) -> dict[str, str]:
    return shared_facts(setup_of(options), limits)


@pytest.mark.parametrize(
    ("field", "options", "limits"),
    [
        ("dtype", ModelOptions(dtype="bfloat16"), LIMITS),
        ("compile", ModelOptions(compile="on"), LIMITS),
        ("quantize", ModelOptions(quantize="int8"), LIMITS),
        ("image_resize", ModelOptions(image_resize="pillow"), LIMITS),
        ("chunk_tokens", ModelOptions(), PaceLimits(32, 4096)),
        ("max_prefill_tokens", ModelOptions(), PaceLimits(64, 128)),
    ],
)
def test_a_rank_that_differs_is_refused_by_name(field, options, limits):
    with pytest.raises(HandshakeError, match=field):
        check_fingerprint(facts_of(ModelOptions()), facts_of(options, limits))
    check_fingerprint(facts_of(ModelOptions()), facts_of(ModelOptions()))
    assert "decoder_weights" in facts_of(ModelOptions())


def test_other_weights_of_the_same_shapes_are_another_decoder(tmp_path):
    for seed in (1, 2):
        write_random_checkpoint(tmp_path / str(seed), RANDOM_PRESETS["tiny-random"], seed=seed)
    assert decoder_digest(tmp_path / "1") != decoder_digest(tmp_path / "2")
    assert decoder_digest(tmp_path / "1") == decoder_digest(tmp_path / "1")


def test_one_language_rank_or_a_dense_model_shares_nothing():
    setup = setup_of(ModelOptions())
    assert shares_experts(setup)
    assert not shares_experts(setup_of(ModelOptions(), world=2))
    dense = replace(setup.config, text=replace(setup.config.text, num_experts=0))
    assert not shares_experts(replace(setup, config=dense))
