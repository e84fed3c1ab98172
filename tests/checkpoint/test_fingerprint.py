"""What ranks must agree on: each entry of the config, all of the tower, a sample of every tensor and every expert."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch

from qwen3vl_disagg.checkpoint import fingerprint
from qwen3vl_disagg.checkpoint.fingerprint import decoder_digest
from qwen3vl_disagg.cluster.registry import check_fingerprint
from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.model import TextConfig, VisionConfig
from tests.support.weights import SMALLEST, edit_json, edit_tensors, write_smallest

LAYOUTS = ("hub", "v5", "per_expert")


@pytest.mark.parametrize(
    ("section", "name", "value", "field"),
    [
        ("vision_config", "num_heads", 2, "vision.num_heads"),
        ("vision_config", "rope_theta", 500.0, "vision.rope_theta"),
        ("vision_config", "deepstack_visual_indexes", [0], "deepstack_visual_indexes"),
        ("text_config", "num_experts_per_tok", 1, "text.num_experts_per_tok"),
        ("text_config", "rope_theta", 1e4, "text.rope_theta"),
        ("text_config", "rms_norm_eps", 1e-5, "text.rms_norm_eps"),
        ("text_config", "max_position_embeddings", 512, "text.max_position_embeddings"),
    ],
)
def test_an_entry_that_no_weight_shows_is_named(tmp_path, section, name, value, field):
    folder = write_smallest(tmp_path / "0")
    before = fingerprint(folder)
    edit_json(folder, lambda config: config[section].update({name: value}))
    with pytest.raises(HandshakeError) as caught:
        check_fingerprint(before, fingerprint(folder))
    assert caught.value.field == field


def test_every_entry_is_there_and_spelling_does_not_count(tmp_path):
    told = fingerprint(write_smallest(tmp_path / "0"))
    for kind, config in (("vision", VisionConfig), ("text", TextConfig)):
        assert {f"{kind}.{field.name}" for field in fields(config)} <= told.keys()
    assert fingerprint(write_smallest(tmp_path / "1", spelling="v5", layout="per_expert")) == told
    assert len(json.dumps(told)) < 8192


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_in_any_tensor_and_any_expert_shows(tmp_path, layout):
    folder = write_smallest(tmp_path / "0", layout=layout)
    digest = decoder_digest(folder)
    names: list[tuple[str, int | None]] = []

    def note(tensors):
        for name, tensor in tensors.items():
            if "visual" not in name:
                names.extend((name, row) for row in (range(len(tensor)) if tensor.dim() == 3 else [None]))

    edit_tensors(folder, note)
    assert sum("experts" in name for name, _ in names) == 2 * SMALLEST.text.num_experts * (
        3 if layout == "per_expert" else 2
    )
    for name, row in names:
        kept = []

        def noise(tensors, name=name, row=row, kept=kept):
            part = tensors[name] if row is None else tensors[name][row]
            kept.append(part.clone())
            part.copy_(torch.randn(part.shape))

        def heal(tensors, name=name, row=row, kept=kept):
            (tensors[name] if row is None else tensors[name][row]).copy_(kept[0])

        edit_tensors(folder, noise)
        assert decoder_digest(folder) != digest, (name, row)
        edit_tensors(folder, heal)
    assert decoder_digest(folder) == digest


def test_rows_that_trade_places_show(tmp_path):
    """Experts exchanged with one another."""
    folder = write_smallest(tmp_path / "0")
    digest = decoder_digest(folder)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][[0, 2, 1]].contiguous()}))
    assert decoder_digest(folder) != digest
