"""`--dry-run`: the bytes of each rank, against the whole model and against what loading makes."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from qwen3vl_disagg.checkpoint import load_language_model, load_vision_model, open_checkpoint
from qwen3vl_disagg.cluster.rendezvous import World
from qwen3vl_disagg.core.devices import DTYPES
from qwen3vl_disagg.core.errors import CheckpointError, DisaggError
from qwen3vl_disagg.core.settings import ModelOptions
from qwen3vl_disagg.launch import serve as launch
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.options import DryRunOptions, ServeOptions
from qwen3vl_disagg.plan.dry_run import dry_run
from qwen3vl_disagg.plan.presets import PRESETS
from recipes import serve
from tests.support.shards import PlainShards
from tests.support.weights import SMALLEST, edit_json, edit_tensors, write_smallest
from tools.checkpoints import RANDOM_PRESETS

TIED = replace(SMALLEST, tie_word_embeddings=True)
MIXED = RANDOM_PRESETS["tiny-random-mixed"]
DENSE = RANDOM_PRESETS["tiny-random-dense"]


def run(monkeypatch, capsys, *args):
    """Exit status, stdout and stderr of serve.py."""
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, args)])
    status = serve.main()
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def count(module):
    return sum(math.prod(parameter.shape) for parameter in module.parameters())


@pytest.mark.parametrize(
    ("preset", "encode", "world", "experts"),
    [("30b-a3b", 2, 8, [22] * 5 + [18]), ("235b-a22b", 4, 16, [11] * 11 + [7])],
)
def test_published_sizes(monkeypatch, capsys, preset, encode, world, experts):
    """The parts add up to the model, counted from its module and not by any rule of placement."""
    args = ("--dry-run", "--preset", preset, "--world", world, "--json")
    status, out, _ = run(monkeypatch, capsys, *args)
    made = json.loads(out)
    config = PRESETS[preset]
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(config)
    numbers, tower = count(model), count(model.visual)
    of_experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    rest = numbers - tower - of_experts
    assert status == 0
    assert (made["encode_ranks"], made["language_ranks"], made["world"]) == (encode, world - encode, world)
    assert made["model_bytes"] == made["sum_bytes"] == 2 * numbers
    ranks = made["ranks"]
    assert [entry["rank"] for entry in ranks] == list(range(world))
    assert [entry["role"] for entry in ranks] == ["encode"] * encode + ["language"] * (world - encode)
    assert [entry["bytes"] for entry in ranks[:encode]] == [2 * tower] * encode
    assert [entry["shards"] for entry in ranks[:encode]] == [{"vision": {"bytes": 2 * tower}}] * encode
    held = [entry["shards"]["experts"] for entry in ranks[encode:]]
    assert [entry["count"] for entry in held] == experts
    assert [entry["first"] for entry in held] == [sum(experts[:i]) for i in range(len(experts))]
    assert [entry["bytes"] for entry in held] == [2 * of_experts * n // 128 for n in experts]
    assert [entry["bytes"] for entry in ranks[encode:]] == [2 * (of_experts * n // 128 + rest) for n in experts]
    total = sum(entry["bytes"] for entry in ranks)
    assert total - (world - encode - 1) * 2 * rest - (encode - 1) * 2 * tower == 2 * numbers


@pytest.mark.parametrize(
    ("dtype", "quantize", "own_head"),
    [("auto", "none", False), ("bfloat16", "none", True), ("auto", "float8", True), ("bfloat16", "int8", False)],
)
@pytest.mark.parametrize("config", [SMALLEST, TIED, MIXED, DENSE])
def test_what_is_said_is_what_is_loaded(tmp_path, config, dtype, quantize, own_head):
    folder = write_smallest(tmp_path, config, layout="per_expert" if config.text.num_experts else "hub")
    if own_head:
        head = torch.zeros(config.text.vocab_size, config.text.hidden_size)
        edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    options = ModelOptions(model=str(folder), dtype=dtype, quantize=quantize)
    made = dry_run(options, None, range(1), range(1, 6))
    wanted = None if dtype == "auto" else DTYPES[dtype]
    tower = load_vision_model(folder, dtype=wanted)
    assert made.ranks[0].num_bytes == sum(tensor.nbytes for tensor in tower.state_dict().values())
    for part in made.ranks[1:]:
        shards = PlainShards(5, part.rank - 1)
        model = load_language_model(folder, dtype=wanted, quantize=quantize, shards=shards)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        experts = [tensor for name, tensor in tensors.items() if ".mlp.experts." in name]
        assert part.expert_bytes == sum(tensor.nbytes for tensor in experts)
        assert part.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert part.experts is None if not experts else {len(part.experts)} == {len(t) for t in experts}


def test_a_folder_is_counted_by_its_headers(tmp_path):
    folder = write_smallest(tmp_path, num_shards=3, dtype="bfloat16")
    with open_checkpoint(folder) as checkpoint:
        stored = sum(info.num_bytes for info in checkpoint.tensors.values())
    for dtype, times in (("auto", 1), ("float32", 2)):
        made = dry_run(ModelOptions(model=str(folder), dtype=dtype), None, range(2), range(2, 7))
        assert made.model_bytes == sum(made.sums.values()) == stored * times


def test_a_folder_that_cannot_be_loaded(tmp_path):
    folder = write_smallest(tmp_path / "one")
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        dry_run(ModelOptions(model=str(folder)), None, range(1), range(1, 2))
    folder = write_smallest(tmp_path / "two")
    edit_json(folder, lambda config: config["text_config"].update(vocab_size=303))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: shape \[304, 64\], expected \[303, 64\]"):
        dry_run(ModelOptions(model=str(folder)), None, range(1), range(1, 2))


def test_parts_that_are_not_the_model():
    made = dry_run(ModelOptions(), "2b", range(1), range(1, 2))
    with pytest.raises(DisaggError, match=rf"add up to {made.model_bytes} bytes, .* to {made.model_bytes + 2}"):
        replace(made, model_bytes=made.model_bytes + 2).check()


def test_a_wrong_split_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr("qwen3vl_disagg.plan.dry_run.shard_rows", lambda size, num_ranks, rank: range(size))
    status, out, err = run(monkeypatch, capsys, "--dry-run", "--preset", "30b-a3b")
    assert (status, out) == (1, "")
    assert "the ranks' parts add up to" in err


def test_one_rank_holds_everything():
    made = dry_run(ModelOptions(), None, range(1), range(1))
    (part,) = made.ranks
    assert (part.role, part.experts, part.num_bytes) == ("both", range(12), made.model_bytes)


def test_ranks_without_experts():
    made = dry_run(ModelOptions(), None, range(1), range(1, 6))
    assert [len(part.experts) for part in made.ranks[1:]] == [3, 3, 3, 3, 0]
    assert "none of 12" in made.to_text()


def test_dense_models_are_not_spread(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "--dry-run", "--preset", "8b", "--world", 3, "--json")
    made = json.loads(out)
    _, first, second = made["ranks"]
    assert status == 0
    assert first["shards"] == second["shards"] == {"decoder": {"bytes": first["bytes"]}}
    assert made["sum_bytes"] == made["model_bytes"] == made["ranks"][0]["bytes"] + first["bytes"]


def test_the_table(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "--dry-run", "--preset", "30b-a3b", "--hardware", "h200")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0].startswith("30b-a3b (bfloat16), world of 8.")
    assert [line.split()[0] for line in lines[4:12]] == [str(rank) for rank in range(8)]
    assert lines[11].split()[1:5] == ["language", "110-127", "of", "128"]
    *parts, whole = (int(re.search(r"\d[\d,]+", line)[0].replace(",", "")) for line in lines[15:])
    assert sum(parts) == whole == 62_141_508_064
    assert lines[18].endswith("57.87 GiB")
    assert lines[13] == "The largest image of the processor, 16,384 visual tokens, fits."


def test_the_world_is_torchrun_s(capsys):
    options = ServeOptions(dry=DryRunOptions(dry_run=True, json=True))
    for world in (World(size=5, has_agent=True), World(rank=1, size=5, has_agent=True), World()):
        assert launch.show_dry_run(options, world) == 0
    under_torchrun, alone = map(json.loads, capsys.readouterr().out.splitlines())
    assert (under_torchrun["world"], alone["world"]) == (5, 8)


def test_other_slots_do_nothing(monkeypatch):
    monkeypatch.setattr(launch, "dry_run", lambda *_: pytest.fail("worked"))
    assert launch.show_dry_run(ServeOptions(dry=DryRunOptions(dry_run=True)), World(rank=1, size=5, local_rank=1)) == 0


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--world", 3], "--world 3: qwen3vl-disagg serve or torchrun start more"),
        (["--preset", "2b"], "--preset goes with --dry-run only"),
        (["--json"], "--json goes with --dry-run only"),
        (["--dry-run", "--world", 0], "--world 0: must be 1 to"),
        (["--world", 0], "--world 0: must be 1 to"),
        (["--dry-run", "--preset", "31b"], "--preset 31b: must be one of 30b-a3b, 235b-a22b, 2b"),
        (["--dry-run", "--preset", "2b", "--model", "x"], "--preset and --model: one of both"),
        (["--dry-run", "--encode-ranks", 8], "8 encode ranks of 8 ranks: must be 1 to 7"),
        (["--dry-run", "--model", "/no/such"], "--model /no/such: no such folder"),
    ],
)
def test_what_is_refused(monkeypatch, capsys, args, reason):
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {reason}")
    assert err.count("\n") == 1
