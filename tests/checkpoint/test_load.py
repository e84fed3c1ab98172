"""Loading: the right numbers in the right places, only the wanted bytes, and every problem named at once."""

import mmap
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qwen3vl_disagg.checkpoint import (
    fingerprint,
    load,
    load_language_model,
    load_model,
    load_vision_model,
    open_checkpoint,
)
from qwen3vl_disagg.checkpoint.folder import Checkpoint
from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.model import Qwen3MoeForCausalLM, Qwen3MoeForCausalLMWithDeepStack
from tests.support.memory_maps import asks_for_huge_pages
from tests.support.weights import SMALLEST, edit_tensors, load_text_model, write_smallest
from tools.checkpoints import module_tensors, write_checkpoint

FILE = "model.safetensors"
EXPERTS = "model.language_model.layers.1.mlp.experts"
LOADERS = [load_model, load_language_model, load_text_model, load_vision_model]
TIED = replace(SMALLEST, tie_word_embeddings=True)


@pytest.fixture
def folder(tmp_path):
    return write_smallest(tmp_path / "checkpoint")


def problems(folder, loader=load_model, **options):
    with pytest.raises(CheckpointError) as caught:
        loader(folder, **options)
    return caught.value.problems


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_loaded_model_is_ready_for_inference(folder, loader, dtype):
    model = loader(folder, dtype=dtype)
    parameters = list(model.parameters())
    assert {p.dtype for p in parameters} == {dtype or torch.float32}
    assert not any(p.is_meta or p.requires_grad for p in parameters)
    assert not any(module.training for module in model.modules())


def test_dtype_none_is_the_checkpoint_s_own(tmp_path):
    folder = write_smallest(tmp_path, dtype="bfloat16")
    assert load_language_model(folder).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("num_shards", [1, 4])
def test_values(tmp_path, num_shards):
    folder = write_smallest(tmp_path, layout="v5", num_shards=num_shards)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    loaded = module_tensors(load_model(folder))
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_the_parts_are_the_whole(folder):
    whole = module_tensors(load_model(folder))
    parts = module_tensors(load_language_model(folder)) | module_tensors(load_vision_model(folder))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    text = load_text_model(folder)
    assert type(text) is Qwen3MoeForCausalLM
    assert type(load_language_model(folder)) is Qwen3MoeForCausalLMWithDeepStack
    assert all(torch.equal(whole[name], tensor) for name, tensor in module_tensors(text).items())


def test_written_again_it_loads_the_same(folder, tmp_path):
    model = load_model(folder)
    write_checkpoint(tmp_path / "again", SMALLEST, module_tensors(model), layout="per_expert", num_shards=2)
    again = module_tensors(load_model(tmp_path / "again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in module_tensors(model).items())


@pytest.mark.parametrize("layout", ["hub", "v5", "per_expert"])
def test_each_part_reads_its_own_bytes_only(tmp_path, monkeypatch, layout):
    folder = write_smallest(tmp_path, layout=layout)
    read = []

    class Watched(Checkpoint):
        def read(self, name, rows):
            read.append(name)
            return super().read(name, rows)

        def close(self):
            sizes.append(self.bytes_read)
            super().close()

    def watched(folder):
        checkpoint = open_checkpoint(folder)
        return Watched(checkpoint.folder, checkpoint.config, checkpoint.tensors)

    monkeypatch.setattr(load, "open_checkpoint", watched)
    with open_checkpoint(folder) as checkpoint:
        tensors = checkpoint.tensors
    for loader, wanted in [
        (load_vision_model, {name for name in tensors if name.startswith("model.visual.")}),
        (load_language_model, {name for name in tensors if not name.startswith("model.visual.")}),
    ]:
        read.clear()
        sizes = []
        loader(folder)
        assert set(read) == wanted
        assert len(read) == len(wanted)
        assert sizes == [sum(tensors[name].num_bytes for name in wanted)]


def test_weights_are_copies_of_the_file(folder):
    """A file that changes under a running server changes nothing in it."""
    model = load_model(folder)
    before = {name: tensor.clone() for name, tensor in module_tensors(model).items()}
    size = (folder / FILE).stat().st_size
    with (folder / FILE).open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in module_tensors(model).items())


@pytest.mark.skipif(asks_for_huge_pages(0) is None, reason="the kernel has no huge pages, or does not tell")
def test_weights_are_asked_for_on_huge_pages(folder, monkeypatch):
    monkeypatch.setattr("qwen3vl_disagg.core.tensors.HUGE_PAGE", 2 * mmap.PAGESIZE)
    weights = load_language_model(folder).state_dict().values()
    large = [weight for weight in weights if weight.nbytes > 4 * mmap.PAGESIZE]
    assert large
    assert all(asks_for_huge_pages(weight.data_ptr() + mmap.PAGESIZE) for weight in large)


def test_every_problem_is_listed_at_once(folder):
    def damage(tensors):
        del tensors["lm_head.weight"]
        del tensors["model.visual.merger.norm.bias"]
        tensors["model.language_model.norm.weight"] = torch.zeros(63)
        tensors["model.visual.pos_embed.weight"] = torch.zeros(64, 48, dtype=torch.int32)
        tensors["model.extra"] = torch.zeros(2, 3)

    edit_tensors(folder, damage)
    head = "lm_head.weight: missing, expected [304, 64]"
    bias = "model.visual.merger.norm.bias: missing, expected [48]"
    norm = f"{FILE}: model.language_model.norm.weight: shape [63], expected [64]"
    table = f"{FILE}: model.visual.pos_embed.weight: dtype I32, expected one of F64, F32, F16, BF16"
    extra = f"{FILE}: model.extra: unknown tensor F32 [2, 3]"
    assert set(problems(folder)) == {head, bias, norm, table, extra}
    assert set(problems(folder, load_language_model)) == {head, norm, extra}
    assert set(problems(folder, load_vision_model)) == {bias, table, extra}


@pytest.mark.parametrize("loader", [load_model, load_language_model, load_text_model])
def test_tied_head(tmp_path, loader):
    folder = write_smallest(tmp_path, TIED)
    assert "lm_head.weight" not in load_file(folder / FILE)
    model = loader(folder)
    language = getattr(model, "language_model", model)
    assert language.lm_head.weight is language.model.embed_tokens.weight


def test_a_head_in_the_file_wins_over_tying(tmp_path):
    folder = write_smallest(tmp_path, TIED)
    head = torch.randn(304, 64)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    model = load_language_model(folder)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.model.embed_tokens.weight, head)
    load_vision_model(folder)


@pytest.mark.parametrize(
    ("width", "which"),
    [(32, "gate_up_proj"), (64, "down_proj")],
)
@pytest.mark.parametrize("layout", ["hub", "v5"])
def test_ambiguous_expert_shapes_need_a_name(tmp_path, layout, width, which):
    config = replace(SMALLEST, text=replace(SMALLEST.text, moe_intermediate_size=width))
    folder = write_smallest(tmp_path, config, layout=layout)
    found = problems(folder)
    assert len(found) == config.text.num_hidden_layers
    assert all(f".mlp.experts.{which}: " in problem and "is ambiguous" in problem for problem in found)
    expected = module_tensors(load_model(write_smallest(tmp_path / "each", config, layout="per_expert")))
    named = module_tensors(load_model(folder, expert_layout=layout))
    assert all(torch.equal(named[name], expected[name]) for name in expected)
    other = module_tensors(load_model(write_smallest(tmp_path / "clear", layout=layout), expert_layout=layout))
    assert other.keys() == expected.keys()


@pytest.mark.parametrize(
    ("layout", "named", "reason"),
    [
        ("hub", "v5", "shape [3, 64, 80], expected [3, 80, 64]"),
        ("v5", "hub", "shape [3, 80, 64], expected [3, 64, 80]"),
        ("hub", "per_expert", "although expert_layout='per_expert' was asked for"),
        ("per_expert", "hub", "although expert_layout='hub' was asked for"),
    ],
)
def test_wrongly_named_layout(tmp_path, layout, named, reason):
    found = problems(write_smallest(tmp_path, layout=layout), expert_layout=named)
    assert any(reason in problem for problem in found)


def test_expert_tensors_missing_and_too_many(tmp_path):
    folder = write_smallest(tmp_path, layout="per_expert")

    def damage(tensors):
        tensors[f"{EXPERTS}.3.up_proj.weight"] = tensors.pop(f"{EXPERTS}.2.up_proj.weight")

    edit_tensors(folder, damage)
    assert problems(folder) == [
        f"{EXPERTS}.2.up_proj.weight: missing, expected [40, 64]",
        f"{FILE}: {EXPERTS}.3.up_proj.weight: unknown tensor F32 [40, 64]",
    ]


def test_experts_stored_twice(tmp_path):
    folder = write_smallest(tmp_path, layout="per_expert")
    edit_tensors(folder, lambda tensors: tensors.update({f"{EXPERTS}.down_proj": torch.zeros(3, 64, 40)}))
    assert problems(folder) == [f"{FILE}: {EXPERTS}.down_proj: there both fused and one tensor for each expert"]


def test_progress_goes_to_stderr_if_it_takes_long(folder, capsys, monkeypatch):
    load_model(folder, progress=True)
    assert "100%" not in capsys.readouterr().err
    monkeypatch.setattr(load, "BAR_S", 0.0)
    load_model(folder, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "100%" in shown.err
    load_model(folder)
    assert capsys.readouterr().err == ""


def test_vision_digest_follows_the_tower_alone(folder, tmp_path):
    digest = fingerprint(folder)["vision_weights"]
    assert (
        fingerprint(write_smallest(tmp_path / "other", layout="per_expert", num_shards=4))["vision_weights"] == digest
    )
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].zero_())
    assert fingerprint(folder)["vision_weights"] == digest
    edit_tensors(folder, lambda tensors: tensors["model.visual.merger.norm.bias"].mul_(1.001))
    assert fingerprint(folder)["vision_weights"] != digest


@pytest.mark.parametrize(
    ("file", "field"),
    [("preprocessor_config.json", "processor"), ("tokenizer.json", "tokenizer"), ("config.json", "hidden_size")],
)
def test_fingerprint_names_what_differs(folder, tmp_path, file, field):
    same = write_smallest(tmp_path / "same", num_shards=2)
    assert fingerprint(folder) == fingerprint(same)
    if file == "config.json":
        text = replace(SMALLEST.text, hidden_size=72)
        other = replace(SMALLEST, text=text, vision=replace(SMALLEST.vision, out_hidden_size=72))
        same = write_smallest(tmp_path / "wider", other)
    else:
        (same / file).write_text('{"size": {}}')
    theirs = fingerprint(same)
    differing = {name for name, value in fingerprint(folder).items() if theirs[name] != value}
    assert field in differing
    assert {name for name in differing if "." not in name} <= {field, "vision_weights"}
