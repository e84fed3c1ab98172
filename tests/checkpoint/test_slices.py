"""Loading by slices: put together they are the whole, and a rank reads its own bytes and no others."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from qwen3vl_disagg.checkpoint import load, load_language_model, open_checkpoint
from qwen3vl_disagg.checkpoint.folder import Checkpoint
from qwen3vl_disagg.core.errors import CheckpointError
from tests.support.float8 import make_float8
from tests.support.shards import PlainShards
from tests.support.weights import SMALLEST, edit_tensors, load_text_model, write_smallest
from tools.checkpoints import RANDOM_PRESETS

SPLITS = [(7, 2), (8, 3), (12, 5), (16, 4), (3, 5), (8, 1)]
"""Experts and ranks. 12 over 5 and 3 over 5 leave ranks without any, 8 over 3 is uneven."""
LAYOUTS = ["hub", "v5", "per_expert"]
EXPERT = re.compile(r".*\.mlp\.experts\.(?:(\d+)\.)?.*")


def with_experts(num_experts, **changes):
    return replace(SMALLEST, text=replace(SMALLEST.text, num_experts=num_experts), **changes)


def is_expert(name):
    return ".mlp.experts." in name


@pytest.fixture
def watched(monkeypatch):
    """What each load read: `(tensor name, row)` of every row, and the bytes as the checkpoint counted them."""
    loads = []

    class Watched(Checkpoint):
        def read(self, name, rows):
            self.rows_read += [(name, row) for row in rows]
            return super().read(name, rows)

        def close(self):
            loads.append((self.rows_read, self.bytes_read))
            super().close()

    def open_watched(folder):
        checkpoint = open_checkpoint(folder)
        seen = Watched(checkpoint.folder, checkpoint.config, checkpoint.tensors, checkpoint.block)
        seen.rows_read = []
        return seen

    monkeypatch.setattr(load, "open_checkpoint", open_watched)
    return loads


@pytest.fixture
def bars(monkeypatch):
    """`(total, count)` of each bar that was shown."""
    seen = []

    class Bar(load.tqdm):
        def __exit__(self, *error):
            if not self.disable:
                seen.append((self.total, self.n))
            super().__exit__(*error)

    monkeypatch.setattr(load, "tqdm", Bar)
    return seen


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_experts", "num_ranks"), SPLITS)
def test_the_slices_are_the_whole(tmp_path, monkeypatch, num_experts, num_ranks, layout, dtype, quantize):
    folder = write_smallest(tmp_path, with_experts(num_experts), layout=layout, num_shards=2)
    whole = load_language_model(folder, dtype=dtype, quantize=quantize).state_dict()
    monkeypatch.setattr(load, "BLOCK", 12000)  # two experts, or part of a matrix
    shards = [PlainShards(num_ranks, rank) for rank in range(num_ranks)]
    parts = [load_language_model(folder, dtype=dtype, quantize=quantize, shards=s).state_dict() for s in shards]
    for name, tensor in whole.items():
        locals_ = [part[name] for part in parts]
        assert {local.dtype for local in locals_} == {tensor.dtype}
        if is_expert(name):
            assert torch.equal(torch.cat(locals_), tensor)
            sizes = [len(chunk) for chunk in torch.empty(num_experts).chunk(num_ranks)]
            assert [len(local) for local in locals_] == sizes + [0] * (num_ranks - len(sizes))
            assert all(local.untyped_storage().nbytes() == local.nbytes for local in locals_)
        else:
            assert all(torch.equal(local, tensor) for local in locals_)
    assert all(part.keys() == whole.keys() for part in parts)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_experts", "num_ranks"), SPLITS)
def test_bytes_read(tmp_path, watched, num_experts, num_ranks, layout, stored, quantize):
    """Over all ranks: what is sharded once, the rest once by each. No row twice by one rank, none of another's."""
    folder = write_smallest(tmp_path, with_experts(num_experts), layout=layout, dtype=stored)
    for rank in range(num_ranks):
        load_language_model(folder, dtype=torch.float32, quantize=quantize, shards=PlainShards(num_ranks, rank))
    with open_checkpoint(folder) as checkpoint:
        language = {name: info for name, info in checkpoint.tensors.items() if not name.startswith("model.visual.")}
    experts = sum(info.num_bytes for name, info in language.items() if is_expert(name))
    rest = sum(info.num_bytes for name, info in language.items() if not is_expert(name))
    assert sum(num_bytes for _, num_bytes in watched) == experts + num_ranks * rest
    most = -(-num_experts // num_ranks)
    for rank, (rows, _) in enumerate(watched):
        assert len(rows) == len(set(rows))
        mine = {
            (name, row)
            for name, info in language.items()
            for row in range(info.shape[0])
            if not is_expert(name) or _expert(name, row) // most == rank
        }
        assert set(rows) == mine


def _expert(name, row):
    """Whose row it is: of a tensor for each expert, the name says it."""
    index = EXPERT.fullmatch(name)[1]
    return row if index is None else int(index)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_what_the_shards_are_asked(tmp_path, quantize):
    folder = write_smallest(tmp_path, with_experts(4))
    shards = PlainShards(3, 2)
    model = load_language_model(folder, quantize=quantize, shards=shards)
    shapes = {"gate_up_proj": (4, 80, 64), "down_proj": (4, 64, 40)}
    if quantize == "int8":
        shapes |= {f"{name}_scale": shape[:-1] for name, shape in shapes.items()}
    layers = range(SMALLEST.text.num_hidden_layers)
    assert shards.held == {f"model.layers.{i}.mlp.experts.{n}": shape for i in layers for n, shape in shapes.items()}
    assert shards.finished == [model]
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, torch.nn.Parameter)
    assert dict(experts.named_buffers()).keys() == {name for name in shapes if name.endswith("_scale")}
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_what_hold_gives_is_what_the_module_keeps(tmp_path):
    class Doubled(PlainShards):
        def hold(self, name, local, shape):
            return super().hold(name, local * 2, shape)

    folder = write_smallest(tmp_path, with_experts(4))
    plain = load_language_model(folder, shards=PlainShards(2, 0)).state_dict()
    doubled = load_language_model(folder, shards=Doubled(2, 0)).state_dict()
    for name, tensor in plain.items():
        assert torch.equal(doubled[name], tensor * (2 if is_expert(name) else 1))


def test_any_parameter_can_be_cut(tmp_path):
    """Which ones is not this room's business."""

    class Every(PlainShards):
        def rows(self, name, shape):
            return range(shape[0] // 3, shape[0] // 2)

    folder = write_smallest(tmp_path, with_experts(8), layout="per_expert")
    whole = load_text_model(folder, quantize="int8").state_dict()
    for name, part in load_text_model(folder, quantize="int8", shards=Every(1, 0)).state_dict().items():
        assert torch.equal(part, whole[name][len(whole[name]) // 3 : len(whole[name]) // 2])


def test_tied_and_dense(tmp_path):
    folder = write_smallest(tmp_path / "tied", with_experts(4, tie_word_embeddings=True))
    model = load_language_model(folder, shards=PlainShards(2, 1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    dense = write_smallest(tmp_path / "dense", RANDOM_PRESETS["tiny-random-dense"])
    shards = PlainShards(3, 1)
    part, whole = load_language_model(dense, shards=shards).state_dict(), load_language_model(dense).state_dict()
    assert shards.held == {}
    assert all(torch.equal(part[name], whole[name]) for name in whole)


def test_all_problems_are_found_by_each_rank(tmp_path):
    """Also in experts that it would not read."""
    folder = write_smallest(tmp_path, layout="per_expert")
    name = "model.language_model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    shards = PlainShards(3, 0)
    with pytest.raises(CheckpointError) as caught:
        load_language_model(folder, shards=shards)
    assert caught.value.problems == [f"{name}: missing, expected [40, 64]"]
    assert shards.held == {}


@pytest.mark.parametrize("rows", [range(-1, 2), range(1, 9), range(2, 1), range(0, 4, 2), range(5, 4)])
def test_impossible_rows(tmp_path, rows):
    class Wrong(PlainShards):
        def rows(self, name, shape):
            return rows if is_expert(name) else None

    with pytest.raises(
        ValueError, match=r"experts\.gate_up_proj: range\(.* is no range of the 4 rows of \[4, 80, 64\]"
    ):
        load_language_model(write_smallest(tmp_path, with_experts(4)), shards=Wrong(1, 0))


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_experts", "num_ranks"), [(7, 2), (3, 5)])
def test_float8_by_slices(tmp_path, watched, bars, monkeypatch, num_experts, num_ranks, layout, quantize):
    """Together they are the whole, and each rank reads its experts' rows and their scales once, and no others."""
    folder = write_smallest(tmp_path, with_experts(num_experts), layout=layout)
    make_float8(folder, (16, 24), hub=layout == "hub")
    whole = load_language_model(folder, quantize=quantize).state_dict()
    monkeypatch.setattr(load, "BLOCK", 1000)  # less than a row of scales has weights
    shards = [PlainShards(num_ranks, rank) for rank in range(num_ranks)]
    parts = [load_language_model(folder, quantize=quantize, shards=s, progress=True).state_dict() for s in shards]
    for name, tensor in whole.items():
        locals_ = [part[name] for part in parts]
        assert torch.equal(torch.cat(locals_), tensor) if is_expert(name) else torch.equal(locals_[-1], tensor)
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: info for name, info in checkpoint.tensors.items() if not name.startswith("model.visual.")}
    assert sum(name.endswith("_scale_inv") for name in tensors) > 8
    most = -(-num_experts // num_ranks)
    for rank, (rows, num_bytes) in enumerate(watched[1:]):
        mine = {
            (name, row)
            for name, info in tensors.items()
            for row in range(info.shape[0])
            if not is_expert(name) or _expert(name, row) // most == rank
        }
        assert set(rows) == mine
        assert len(rows) == len(mine)
        assert num_bytes == sum(tensors[name].rows_bytes(range(1)) for name, _ in mine)
        assert bars[rank] == (num_bytes, num_bytes)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float8_cut_within_a_block(tmp_path, watched, bars, monkeypatch, layout, quantize):
    """Any rows of any parameter, with just the scales that they need."""

    class Every(PlainShards):
        def rows(self, name, shape):
            return range(shape[0] // 3, shape[0] // 2)

    folder = write_smallest(tmp_path, with_experts(8), layout=layout)
    make_float8(folder, (16, 24), hub=layout == "hub")
    whole = load_text_model(folder, quantize=quantize).state_dict()
    monkeypatch.setattr(load, "BLOCK", 1000)
    parts = load_text_model(folder, quantize=quantize, shards=Every(1, 0), progress=True).state_dict()
    for name, part in parts.items():
        assert torch.equal(part, whole[name][len(whole[name]) // 3 : len(whole[name]) // 2])
    rows, num_bytes = watched[1]
    assert len(rows) == len(set(rows))
    query = "model.language_model.layers.0.self_attn.q_proj.weight"  # [128, 64]: rows 42 to 64 of blocks of 16
    assert {row for name, row in rows if name == query} == set(range(42, 64))
    assert {row for name, row in rows if name == f"{query}_scale_inv"} == {2, 3}
    assert bars == [(num_bytes, num_bytes)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bar_counts_the_slices(tmp_path, watched, bars, layout):
    folder = write_smallest(tmp_path, with_experts(16), layout=layout)
    for shards in (PlainShards(16, 3), None):
        load_language_model(folder, progress=True, shards=shards)
    assert bars == [(num_bytes, num_bytes) for _, num_bytes in watched]
    assert bars[0] < bars[1]
