"""Checkpoints written again: the same bits in every layout, float8 and back, whole folders or none."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qwen3vl_disagg import cli
from qwen3vl_disagg.checkpoint import (
    convert,
    fingerprint,
    load_model,
    load_vision_model,
    open_checkpoint,
    read_config,
    write,
)
from qwen3vl_disagg.checkpoint.convert import convert as write_again
from qwen3vl_disagg.checkpoint.fp8 import quantize_matrix
from qwen3vl_disagg.core.errors import CheckpointError, InputError
from tests.support.float8 import make_float8
from tests.support.weights import SMALLEST, edit_json, edit_tensors, write_smallest
from tools.checkpoints import RANDOM_PRESETS, module_tensors

INDEX = "model.safetensors.index.json"
LAYOUTS = ["hub", "v5", "per_expert"]
LAYER = "model.language_model.layers.0"


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(ours, theirs):
    as_bytes = [{name: t.contiguous().view(torch.uint8) for name, t in side.items()} for side in (ours, theirs)]
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(as_bytes[0][name], as_bytes[1][name]) for name in ours
    )


def raw_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("preset", ["moe", "mixed", "tied and dense"])
def test_around_all_layouts_and_back(tmp_path, preset, dtype):
    config = {
        "moe": SMALLEST,
        "mixed": replace(SMALLEST, text=replace(SMALLEST.text, mlp_only_layers=(1,))),
        "tied and dense": RANDOM_PRESETS["tiny-random-dense"],
    }[preset]
    folder = write_smallest(tmp_path / "0", config, dtype=dtype, num_shards=2)
    for i, layout in enumerate(["v5", "per_expert", "hub"]):
        write_again(tmp_path / str(i), tmp_path / str(i + 1), layout=layout, max_shard_bytes=10**6)
        written = stored(tmp_path / str(i + 1))
        names = [name for name in written if ".experts." in name]
        assert all(name.endswith(".weight") == (layout == "per_expert") for name in names)
        assert read_config(tmp_path / str(i + 1)) == read_config(folder)
        assert ("lm_head.weight" in written) == (preset != "tied and dense")
    assert same_bits(stored(tmp_path / "3"), stored(folder))
    assert raw_config(tmp_path / "3") == raw_config(folder)
    assert fingerprint(tmp_path / "3")["vision_weights"] == fingerprint(folder)["vision_weights"]
    if preset == "moe":
        fused = stored(tmp_path / "1")[f"{LAYER}.mlp.experts.gate_up_proj"]
        assert fused.shape == (3, 80, 64)
        assert same_bits({"up": stored(tmp_path / "2")[f"{LAYER}.mlp.experts.2.up_proj.weight"]}, {"up": fused[2, 40:]})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_float8_made_plain(tmp_path, source, layout):
    """What loading gives is what is written: rounded once, in float32 not at all."""
    folder = write_smallest(tmp_path / "float8", layout=source, dtype="bfloat16")
    make_float8(folder, (16, 24), hub=source == "hub")
    for name, dtype in (("plain", None), ("float32", torch.float32)):
        write_again(folder, tmp_path / name, layout=layout, dtype=dtype)
        assert "quantization_config" not in raw_config(tmp_path / name)
        assert raw_config(tmp_path / name)["text_config"]["dtype"] == read_config(tmp_path / name).dtype
        loaded = module_tensors(load_model(tmp_path / name))
        assert same_bits(loaded, module_tensors(load_model(folder, dtype=dtype)))
        assert {tensor.dtype for tensor in stored(tmp_path / name).values()} == {dtype or torch.bfloat16}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_made_float8(tmp_path, layout):
    text = replace(SMALLEST.text, mlp_only_layers=(1,), hidden_size=136, moe_intermediate_size=128, num_hidden_layers=2)
    config = replace(SMALLEST, text=text, vision=replace(SMALLEST.vision, out_hidden_size=136))
    folder = write_smallest(tmp_path / "plain", config, dtype="bfloat16")
    write_again(folder, tmp_path / "float8", layout=layout, quantize="fp8")
    tensors = stored(tmp_path / "float8")
    float8 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {f"{name}_scale_inv" for name in float8} == {name for name in tensors if name.endswith("_scale_inv")}
    kinds = {name.split(".mlp.experts.")[0].removeprefix("model.language_model.layers.") for name in float8}
    attention = {f"{i}.self_attn.{which}_proj.weight" for i in (0, 1) for which in "qkvo"}
    assert kinds == attention | {"0"} | {f"1.mlp.{which}_proj.weight" for which in ("gate", "up", "down")}
    assert {t.dtype for name, t in tensors.items() if name not in float8} == {torch.bfloat16}
    if layout == "hub":
        assert tensors[f"{LAYER}.mlp.experts.gate_up_proj"].shape == (3, 136, 256)
        assert tensors[f"{LAYER}.mlp.experts.gate_up_proj_scale_inv"].shape == (3, 2, 2)
        assert tensors[f"{LAYER}.mlp.experts.down_proj_scale_inv"].shape == (3, 1, 2)
    if layout == "per_expert":
        assert tensors[f"{LAYER}.mlp.experts.2.gate_proj.weight_scale_inv"].shape == (1, 2)
    settings = raw_config(tmp_path / "float8")["quantization_config"]
    assert settings | {"modules_to_not_convert": None} == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": None,
    }
    assert "model.language_model.layers.0.mlp.gate" in settings["modules_to_not_convert"]
    before, after = module_tensors(load_model(folder)), module_tensors(load_model(tmp_path / "float8"))
    for name, tensor in before.items():
        worst = (tensor.float() - after[name].float()).abs().max().item()
        assert worst <= tensor.float().abs().max().item() / 16
        is_float8 = ".experts." in name or name in float8
        assert (worst > 0) == is_float8, name
    # Quantized again, in another layout, and back: no number changes where experts are whole blocks wide.
    write_again(tmp_path / "float8", tmp_path / "again", layout="v5", quantize="fp8")
    write_again(tmp_path / "again", tmp_path / "back", layout=layout, quantize="fp8")
    assert same_bits(stored(tmp_path / "back"), tensors)


def test_float8_is_made_of_the_numbers_in_the_files(tmp_path):
    """Not of what they become in another dtype."""
    folder = write_smallest(tmp_path / "0", layout="v5")
    write_again(folder, tmp_path / "1", layout="v5", dtype=torch.bfloat16, quantize="fp8")
    before, after = stored(folder), stored(tmp_path / "1")
    for name in (f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.experts.down_proj"):
        matrices = before[name] if before[name].dim() == 3 else before[name][None]
        values, scales = zip(*(quantize_matrix(matrix, (128, 128)) for matrix in matrices), strict=True)
        assert torch.equal(torch.stack(values).view(torch.uint8), after[name].view(torch.uint8).view(matrices.shape))
        assert torch.equal(torch.stack(scales).flatten(), after[f"{name}_scale_inv"].flatten())


def test_shards(tmp_path):
    """As many bytes as asked for at most, but for a tensor that is larger; the index names each tensor's file."""
    folder = write_smallest(tmp_path / "0")
    num_bytes, num_files = write_again(folder, tmp_path / "1", max_shard_bytes=200_000)
    files = sorted((tmp_path / "1").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)
    ]
    index = json.loads((tmp_path / "1" / INDEX).read_text())
    for file in files:
        held = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in held)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 200_000
    assert any(len(load_file(file)) > 10 for file in files)
    assert index["metadata"]["total_size"] == num_bytes == sum(tensor.nbytes for tensor in stored(folder).values())
    assert same_bits(stored(tmp_path / "1"), stored(folder))
    assert write_again(tmp_path / "1", tmp_path / "2") == (num_bytes, 1)
    assert not (tmp_path / "2" / INDEX).exists()


@pytest.mark.parametrize("quantize", ["none", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_are_known_before(tmp_path, monkeypatch, layout, quantize):
    """And what is written is no more than a file's worth at a time, every byte read once."""
    written, bars = [], []

    def watched(tensors, path, **options):
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, path, **options)

    class Bar(convert.tqdm):
        def __exit__(self, *error):
            bars.append((self.total, self.n))
            super().__exit__(*error)

    folder = write_smallest(tmp_path / "0", layout="per_expert")
    make_float8(folder, (16, 24))
    save = write.save_file
    monkeypatch.setattr(write, "save_file", watched)
    monkeypatch.setattr(convert, "tqdm", Bar)
    num_bytes, num_files = write_again(
        folder, tmp_path / "1", layout=layout, quantize=quantize, max_shard_bytes=300_000, progress=True
    )
    assert (sum(written), len(written)) == (num_bytes, num_files)
    assert max(written) <= 300_000
    assert num_files >= 5
    with open_checkpoint(folder) as checkpoint:
        total = sum(info.num_bytes for info in checkpoint.tensors.values())
    assert bars == [(total, total)]


def test_a_head_is_written_unless_it_is_the_embedding(tmp_path):
    tied = write_smallest(tmp_path / "tied", replace(SMALLEST, tie_word_embeddings=True))
    write_again(tied, tmp_path / "1")
    embedding = stored(tied)["model.language_model.embed_tokens.weight"]
    for name, head, is_written in (("copy", embedding.clone(), False), ("own", embedding + 1, True)):
        edit_tensors(tied, lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
        write_again(tied, tmp_path / name)
        assert ("lm_head.weight" in stored(tmp_path / name)) == is_written
        assert torch.equal(load_model(tmp_path / name).language_model.lm_head.weight, head)


def test_the_config_keeps_what_it_says(tmp_path):
    folder = write_smallest(tmp_path / "0", dtype="bfloat16")

    def edit(config):
        config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.57.0"}
        config["text_config"] |= {"bos_token_id": 3, "use_cache": True}

    edit_json(folder, edit)
    write_again(folder, tmp_path / "1", dtype=torch.float32)
    raw, expected = raw_config(tmp_path / "1"), raw_config(folder)
    expected |= {"torch_dtype": "float32"}
    expected["text_config"]["dtype"] = "float32"
    assert raw == expected
    edit_json(folder, lambda config: (config.pop("torch_dtype"), config["text_config"].pop("dtype")))
    write_again(folder, tmp_path / "2", layout="v5")
    raw = raw_config(tmp_path / "2")
    assert raw["dtype"] == "bfloat16"
    assert raw["text_config"]["rope_parameters"]["rope_theta"] == 5e6
    assert "rope_scaling" not in raw["text_config"]
    assert raw["text_config"]["num_local_experts"] == 3
    assert raw["vision_config"]["model_type"] == "qwen3_vl_moe_vision"


def test_small_files_are_copied(tmp_path):
    folder = write_smallest(tmp_path / "0", num_shards=2)
    for name, text in (
        ("chat_template.jinja", "{{ 1 }}"),
        ("vocab.json", "{}"),
        ("merges.txt", "a b"),
        ("LICENSE", ""),
    ):
        (folder / name).write_text(text)
    for name in ("evil.py", "weights.bin", "pytorch_model.bin.index.json", "old.safetensors"):
        (folder / name).write_text("")
    write_again(folder, tmp_path / "1")
    names = {path.name for path in (tmp_path / "1").iterdir()}
    small = {"chat_template.jinja", "vocab.json", "merges.txt", "LICENSE", "preprocessor_config.json"}
    assert {"config.json", "generation_config.json", "model.safetensors"} | small <= names
    assert not names & {"evil.py", "weights.bin", "pytorch_model.bin.index.json", "old.safetensors", INDEX}
    for name in small:
        assert (tmp_path / "1" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o755
    (folder / "secret.txt").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match=r"secret\.txt: a link that leaves the folder"):
        write_again(folder, tmp_path / "2")
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), CheckpointError("", [])]
)
def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch, error):
    folder = write_smallest(tmp_path / "0")
    calls = []

    def failing(tensors, path, **options):
        calls.append(path)
        if len(calls) == 3:
            raise error
        save(tensors, path, **options)

    save = write.save_file
    monkeypatch.setattr(write, "save_file", failing)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)) as caught:
        write_again(folder, tmp_path / "1", max_shard_bytes=10**5)
    if isinstance(error, OSError):
        assert str(caught.value) == f"--out {tmp_path / '1'}: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_what_is_refused(tmp_path, monkeypatch):
    folder = write_smallest(tmp_path / "0")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (folder, tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(InputError, match="is there already and is no empty folder"):
            write_again(folder, out)
    with pytest.raises(InputError, match=r"--out .*/out: (Not a directory|File exists)"):
        write_again(folder, tmp_path / "file" / "out")
    with pytest.raises(InputError, match="--max-shard-bytes 0: must be positive"):
        write_again(folder, tmp_path / "1", max_shard_bytes=0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    with pytest.raises(InputError, match=r"needs 1,589,120 bytes, 1,000 are free"):
        write_again(folder, tmp_path / "1")
    assert not (tmp_path / "1").exists()
    monkeypatch.undo()
    square = replace(SMALLEST, text=replace(SMALLEST.text, moe_intermediate_size=32))
    write_smallest(tmp_path / "square", square, layout="per_expert")
    for layout in ("hub", "v5"):
        with pytest.raises(InputError, match="would look the same in the layouts hub and v5: take per_expert"):
            write_again(tmp_path / "square", tmp_path / "1", layout=layout)
    write_again(tmp_path / "square", tmp_path / "1", layout="per_expert")


def test_numbers_that_are_not_finite(tmp_path):
    folder = write_smallest(tmp_path / "0")
    edit_tensors(folder, lambda tensors: tensors[f"{LAYER}.mlp.experts.down_proj"][2, 3].fill_(float("nan")))
    problem = f"model.safetensors: {LAYER}.mlp.experts.down_proj: numbers that are not finite"
    for name, options in (("1", {}), ("2", {"quantize": "fp8"})):
        with pytest.raises(CheckpointError) as caught:
            write_again(folder, tmp_path / name, **options)
        assert caught.value.problems == [problem]


def test_an_empty_folder_may_be_there(tmp_path):
    folder = write_smallest(tmp_path / "0")
    (tmp_path / "1").mkdir()
    write_again(folder, tmp_path / "1")
    load_vision_model(tmp_path / "1")


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["qwen3vl-disagg", "convert", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = write_smallest(tmp_path / "0", layout="v5", dtype="bfloat16")
    size = sum(tensor.nbytes for tensor in stored(folder).values())
    args = ("--model", folder, "--out", tmp_path / "1")
    assert run(monkeypatch, capsys, *args) == (0, f"{tmp_path / '1'}: {size:,} bytes of weights in 1 file\n", "")
    assert stored(tmp_path / "1")[f"{LAYER}.mlp.experts.down_proj"].shape == (3, 40, 64)
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, out) == (2, "")
    assert err == f"error: out: --out {tmp_path / '1'}: is there already and is no empty folder\n"
    more = ("--layout", "per_expert", "--dtype", "float32", "--quantize", "fp8", "--max-shard-bytes", 200_000)
    status, out, _ = run(monkeypatch, capsys, "--model", folder, "--out", tmp_path / "2", *more)
    assert status == 0
    assert out.endswith(f" in {len(list((tmp_path / '2').glob('*.safetensors')))} files\n")
    tensors = stored(tmp_path / "2")
    assert tensors["lm_head.weight"].dtype == torch.float32
    assert tensors[f"{LAYER}.mlp.experts.1.up_proj.weight"].dtype == torch.float8_e4m3fn
    (folder / "model.safetensors").unlink()
    status, _, err = run(monkeypatch, capsys, "--model", folder, "--out", tmp_path / "3")
    assert status == 2
    assert "neither model.safetensors nor" in err
    assert "Traceback" not in err
