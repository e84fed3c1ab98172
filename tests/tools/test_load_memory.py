"""The tool that measures loading by slices, on a folder that takes no time."""

from __future__ import annotations

import torch

from qwen3vl_disagg.checkpoint import load_model, open_checkpoint
from qwen3vl_disagg.model.config import check_config
from tests.support.weights import SMALLEST, write_smallest
from tools import load_memory
from tools.checkpoints import write_checkpoint


def test_ranks_read_their_slices_and_hold_them(tmp_path, capsys):
    """3 experts over 2 ranks."""
    folder = write_smallest(tmp_path / "checkpoint", dtype="bfloat16")
    options = load_memory.Options(folder=folder, ranks=2)
    with open_checkpoint(folder) as checkpoint:
        language = {name: info for name, info in checkpoint.tensors.items() if "visual" not in name}
    total = sum(info.num_bytes for info in language.values())
    one_expert = sum(info.num_bytes // 3 for name, info in language.items() if ".mlp.experts." in name)
    results = load_memory.measure(options)
    assert [result["bytes_read"] for result in results] == [total - one_expert, total - 2 * one_expert]
    assert [result["shard"] for result in results] == [total - one_expert, total - 2 * one_expert]
    assert all(0 < result["before"] <= result["private"] <= load_memory.limit(result) for result in results)
    assert load_memory.table(results).count("\n") == 3
    assert capsys.readouterr().out == ""


def test_too_much_is_an_exit_status(tmp_path, monkeypatch, capsys):
    held = {"shard": 2**30, "bytes_read": 2**30, "before": 0, "mapped": 0, "seconds": 1.0}
    folder = write_smallest(tmp_path)
    for private, status in [(int(2.19 * 2**30), 0), (int(2.21 * 2**30), 1)]:
        monkeypatch.setattr(load_memory, "measure", lambda _, private=private: [held | {"private": private}])
        assert load_memory.main(load_memory.Options(folder=folder)) == status
    assert "| 0 | 1,024 | 1,024 |" in capsys.readouterr().out


def test_weights_made_one_by_one(tmp_path):
    write_checkpoint(tmp_path, SMALLEST, load_memory.RandomWeights(SMALLEST), num_shards=3)
    weights = list(load_model(tmp_path).parameters())
    assert all(0 < weight.abs().max() < 1 for weight in weights)
    assert not torch.equal(weights[-1], weights[-2])


def test_the_large_config_is_sound():
    assert check_config(load_memory.large_config(3)) == []
