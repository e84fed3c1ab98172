"""float8 with a scale for each block: the arithmetic, both namings and every layout, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.checkpoint import check_weights, load_language_model, load_model, open_checkpoint, read_config
from qwen3vl_disagg.checkpoint.fp8 import (
    dequantize,
    dequantize_into,
    quantize_matrix,
    scale_rows,
    scale_shape,
)
from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.core.settings import ModelOptions
from qwen3vl_disagg.plan.dry_run import dry_run
from tests.support.float8 import make_float8
from tests.support.weights import SMALLEST, edit_json, edit_tensors, write_smallest
from tools.checkpoints import RANDOM_PRESETS, module_tensors

FILE = "model.safetensors"
LAYER = "model.language_model.layers.1"
GATE_UP, DOWN, QUERY = (
    f"{LAYER}.mlp.experts.gate_up_proj",
    f"{LAYER}.mlp.experts.down_proj",
    f"{LAYER}.self_attn.q_proj.weight",
)
CPU = torch.device("cpu")
LAYOUTS = ["hub", "v5", "per_expert"]
SIDES = st.integers(1, 9)


def problems(folder, loader=load_model):
    with pytest.raises(CheckpointError) as caught:
        loader(folder)
    return caught.value.problems


def random(*shape, seed=0, size=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


@given(
    shape=st.tuples(SIDES, SIDES),
    block=st.tuples(SIDES, SIDES),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_each_number_is_its_float8_times_its_block_s_scale(shape, block, data, dtype):
    """Also of rows that begin within a block, with no more scales than they need."""
    q = (random(*shape, seed=shape[0]) * 100).to(torch.float8_e4m3fn)
    scale = random(*scale_shape(shape, block), seed=shape[1]).to(dtype)
    expected = torch.tensor(
        [
            [float(q[i, j]) * float(scale[i // block[0], j // block[1]]) for j in range(shape[1])]
            for i in range(shape[0])
        ]
    )  # in float64, of which float32 is the rounding
    assert torch.equal(dequantize(q, scale, block, torch.float32, CPU), expected)
    assert torch.equal(dequantize(q, scale, block, torch.bfloat16, CPU), expected.bfloat16())
    start = data.draw(st.integers(0, shape[0] - 1))
    rows = range(start, data.draw(st.integers(start + 1, shape[0])))
    needed = scale_rows(rows, 2, block)
    out = torch.empty(len(rows), shape[1])
    dequantize_into(q[rows.start : rows.stop], scale[needed.start : needed.stop], block, out, rows.start % block[0])
    assert torch.equal(out, expected[rows.start : rows.stop])
    assert len(needed) == len({row // block[0] for row in rows})


@given(shape=st.tuples(SIDES, SIDES), block=st.tuples(SIDES, SIDES), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_quantized_numbers_are_half_a_step_off_at_most(shape, block, size):
    """A float8's step is an eighth of its power of two; below 2^-6 it is 2^-9. Quantized again, nothing changes."""
    weight = random(*shape, seed=sum(shape), size=size)
    q, scale = quantize_matrix(weight, block)
    assert (q.dtype, scale.dtype, tuple(scale.shape)) == (
        torch.float8_e4m3fn,
        torch.bfloat16,
        scale_shape(shape, block),
    )
    back = dequantize(q, scale, block, torch.float32, CPU)
    steps = scale.double().repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
    bound = torch.maximum(weight.double().abs() * 2**-4, steps * 2**-10) * (1 + 1e-6)
    assert ((back.double() - weight.double()).abs() <= bound).all()
    again, scale_again = quantize_matrix(back, block)
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(scale_again, scale)


def test_zeros_and_what_is_not_finite():
    q, scale = quantize_matrix(torch.tensor([[0.0, 0.0, 0.0, 1e-45]]), (1, 2))
    assert scale.tolist() == [[1.0, 1.0]]
    assert not q.float().any()
    for number in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="numbers that are not finite"):
            quantize_matrix(torch.tensor([[1.0, number]]), (1, 1))


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize(("block", "scale_dtype"), [((128, 128), torch.bfloat16), ((16, 24), torch.float32)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loaded_as_what_it_stands_for(tmp_path, layout, block, scale_dtype, quantize):
    """Sides of 40, 64, 80 and 128: whole blocks and cut ones, and with 16 x 24 none that is square."""
    folder = write_smallest(tmp_path / "float8", layout=layout, dtype="bfloat16")
    meant = make_float8(folder, block, scale_dtype, hub=layout == "hub")
    assert any(name.endswith("q_proj.weight") for name in meant)
    assert len([name for name in meant if ".experts." in name]) == 2 * (2 if layout != "per_expert" else 9)
    plain = write_smallest(tmp_path / "plain", layout=layout, dtype="bfloat16")
    edit_tensors(plain, lambda tensors: tensors.update(meant))
    for dtype in (torch.float32, None):
        loaded = load_language_model(folder, dtype=dtype, quantize=quantize).state_dict()
        expected = load_language_model(plain, dtype=dtype, quantize=quantize).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_dense_tied_and_partly_float8(tmp_path):
    """Which tensors are float8 is what their scales say; here also the embedding, and one projection is not."""
    folder = write_smallest(tmp_path / "float8", RANDOM_PRESETS["tiny-random-dense"])
    plain = write_smallest(tmp_path / "plain", RANDOM_PRESETS["tiny-random-dense"])
    before = module_tensors(load_model(folder))[QUERY]
    meant = make_float8(folder)
    assert meant.keys() == {name for name in module_tensors(load_model(plain)) if ".layers." in name and "proj" in name}
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: before}) or tensors.pop(f"{QUERY}_scale_inv"))
    edit_json(folder, lambda config: config.pop("quantization_config"))
    edit_tensors(plain, lambda tensors: tensors.update(meant | {QUERY: before}))
    model, expected = load_model(folder), module_tensors(load_model(plain))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module_tensors(model).items())
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight


def test_everything_wrong_is_named_at_once(tmp_path):
    folder = write_smallest(tmp_path)
    make_float8(folder)
    norm, key, value, out = f"{LAYER}.input_layernorm.weight", *(f"{LAYER}.self_attn.{p}_proj.weight" for p in "kvo")
    head = "lm_head.weight"

    def damage(tensors):
        del tensors[f"{QUERY}_scale_inv"]
        tensors[f"{GATE_UP}_scale_inv"] = torch.ones(3, 2, 1)
        del tensors[DOWN]
        tensors[norm] = tensors[norm].to(torch.float8_e4m3fn)
        tensors[f"{norm}_scale_inv"] = torch.ones(1)
        tensors[key] = tensors[key].float().to(torch.float8_e5m2)
        tensors[f"{value}_scale_inv"] = tensors[f"{value}_scale_inv"].half()
        tensors[out] = tensors[out].bfloat16()
        tensors[f"{head}_scale"] = torch.ones(1)
        tensors["model.gone.weight_scale_inv"] = torch.ones(1, 1)

    edit_tensors(folder, damage)
    assert set(problems(folder)) == {
        f"{FILE}: {QUERY}: dtype F8_E4M3, but there is no {QUERY}_scale_inv",
        f"{FILE}: {GATE_UP}_scale_inv: shape [3, 2, 1], expected [3, 1, 1] for [3, 64, 80] in blocks of [128, 128]",
        f"{DOWN}: missing, expected [3, 64, 40]",
        f"{FILE}: {DOWN}_scale_inv: scales without their tensor BF16 [3, 1, 1]",
        f"{FILE}: {norm}: F8_E4M3 [64]: only matrices and experts may be float8",
        f"{FILE}: {key}: dtype F8_E5M2, expected one of F64, F32, F16, BF16",
        f"{FILE}: {value}_scale_inv: dtype F16, expected one of BF16, F32",
        f"{FILE}: {out}: dtype BF16 with scales beside it, expected F8_E4M3",
        f"{FILE}: {head}_scale: unknown tensor F32 [1]",
        f"{FILE}: model.gone.weight_scale_inv: scales without their tensor F32 [1, 1]",
    }


@pytest.mark.parametrize("layout", ["hub", "v5"])
def test_scales_of_the_wrong_shape(tmp_path, layout):
    """Experts' scales belong to the orientation of their weights: a block of 16 x 24 is one of 24 x 16 in the hub's."""
    folder = write_smallest(tmp_path, layout=layout)
    make_float8(folder, (16, 24), hub=layout != "hub")
    found = problems(folder)
    experts = [problem for problem in found if ".experts." in problem]
    assert found == experts
    assert len(experts) == 4
    assert all("_scale_inv: shape [3, " in problem for problem in experts)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "awq", "bits": 4}, ".quant_method 'awq' is not supported (only 'fp8', block-scaled)"),
        ({"quant_method": "gptq"}, ".quant_method 'gptq' is not supported"),
        ({"quant_method": "bitsandbytes"}, ".quant_method 'bitsandbytes' is not supported"),
        ({"quant_method": "compressed-tensors"}, ".quant_method 'compressed-tensors' is not supported"),
        ({"load_in_4bit": True}, ".quant_method None is not supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, ".fmt 'e5m2' is not supported (only 'e4m3')"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, ".activation_scheme 'static' is not supported"),
        (
            {"quant_method": "fp8", "weight_block_size": None},
            ".weight_block_size must be two sides in 1..65536, got None",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, ".weight_block_size must be two sides"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, ".weight_block_size must be two sides"),
        ({"quant_method": "fp8", "weight_block_size": [128, True]}, ".weight_block_size must be two sides"),
        ("fp8", " must be an object, got fp8"),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config.quantization_config"])
def test_other_methods_are_refused_by_name(tmp_path, settings, reason, place):
    folder = write_smallest(tmp_path)
    *section, name = place.split(".")
    edit_json(folder, lambda config: (config[section[0]] if section else config).update({name: settings}))
    for loader in (read_config, open_checkpoint):
        (problem,) = problems(folder, loader)
        assert problem.startswith(f"config.json: {place}{reason}")


def test_the_block_is_the_config_s(tmp_path):
    folder = write_smallest(tmp_path)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.block == (128, 128)
    edit_json(folder, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.block == (128, 128)
    make_float8(folder, (16, 24))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.block == (16, 24)
        check_weights(checkpoint)
        assert checkpoint.bytes_read == 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_dry_run_counts_the_weights_and_not_the_scales(tmp_path, tied):
    config = replace(SMALLEST, tie_word_embeddings=tied)
    planned = []
    for name in ("float8", "plain"):
        folder = write_smallest(tmp_path / name, config)
        if name == "float8":
            make_float8(folder, (16, 24))
        planned.append(dry_run(ModelOptions(model=str(folder)), None, range(1), range(1, 3)))
    assert planned[0].model_bytes == planned[1].model_bytes
