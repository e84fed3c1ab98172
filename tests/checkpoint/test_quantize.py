"""int8 and float8 weights: how far from what they were, which they are, their size, and what the model still knows."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.assets import tiny_folder
from qwen3vl_disagg.checkpoint import load, load_language_model, load_model, quantize
from qwen3vl_disagg.checkpoint.quantize import quantize_into
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.compiled import graph_kinds
from qwen3vl_disagg.engine.engine import EngineOptions
from qwen3vl_disagg.kernels import build
from qwen3vl_disagg.llm.llm import LLM
from qwen3vl_disagg.model.moe import route, run_experts_grouped
from qwen3vl_disagg.model.quantized import QuantizedExperts, QuantizedLinear, dequantize
from tests.support.quantize import quantize_, quantize_tensor
from tests.support.scenes import ask_scenes
from tests.support.weights import SMALLEST, write_smallest
from tools.checkpoints import RANDOM_PRESETS, module_tensors, random_language_model

GREEDY = SamplingParams(max_new_tokens=40, temperature=0.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return ask_scenes(tmp_path_factory.mktemp("scenes"), seed=77, count=200)


of_any_weight = given(
    shape=st.lists(st.integers(2, 9), min_size=2, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
    block=st.sampled_from([1, 20, quantize.BLOCK]),
    seed=st.integers(0, 99),
)


@of_any_weight
def test_half_a_step_at_most(shape, dtype, size, block, seed):
    """Each weight is at most half a step off, the step being its row's; whatever blocks the rows go in."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "BLOCK", block)
        values, scale = quantize_tensor(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (values.shape, scale.shape) == (weight.shape, weight.shape[:-1])
    assert values.min() >= -127
    errors = (values.double() * scale.double().unsqueeze(-1) - weight.double()).abs()
    assert (errors <= scale.double().unsqueeze(-1) * (0.5 + 1e-4)).all()
    assert (scale.double() * 127.5 <= weight.double().abs().amax(-1).clamp(min=2e-5) * (1 + 1e-6)).all()


@of_any_weight
def test_half_a_float8_step_at_most(shape, dtype, size, block, seed):
    """Three bits after the first, down to where a row's steps end; the row's largest weight is float8's largest."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "BLOCK", block)
        values, scale = quantize_tensor(weight, torch.float8_e4m3fn)
    assert (values.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert (values.shape, scale.shape) == (weight.shape, weight.shape[:-1])
    steps, exact = scale.double().unsqueeze(-1), weight.double()
    errors = (values.double() * steps - exact).abs()
    assert (errors <= torch.maximum(exact.abs() / 16, steps * 2**-10) * (1 + 1e-4)).all()
    assert torch.allclose(scale.double() * 448, exact.abs().amax(-1), rtol=1e-5)


@pytest.mark.parametrize("dtype", quantize.QUANTIZED_DTYPES.values())
def test_a_row_of_zeros_stays_zero(dtype):
    values, scale = quantize_tensor(torch.tensor([[0.0, 0.0], [1.0, -0.5]]), dtype)
    assert not values[0].float().any()
    assert scale.isfinite().all()
    assert dequantize(values, scale, torch.float32)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("preset", ["tiny-random-mixed", "tiny-random-dense"])
def test_which_parameters(preset, kind):
    """The projections, the MLPs and a head of its own; the dense preset's head is its embedding."""
    model = quantize_(random_language_model(RANDOM_PRESETS[preset], torch.float32, "cpu", 0), kind)
    dtype = quantize.QUANTIZED_DTYPES[kind]
    parameters = dict(model.named_parameters())
    kept = {name for name, parameter in parameters.items() if parameter.dtype != dtype}
    assert all("norm" in name or name.endswith(("embed_tokens.weight", "mlp.gate.weight")) for name in kept)
    assert len([name for name in kept if name.endswith("mlp.gate.weight")]) == (4 if "mixed" in preset else 0)
    assert ("lm_head.weight" in parameters) == ("mixed" in preset)
    for name, parameter in parameters.items():
        if parameter.dtype == dtype:
            assert not any(word in name for word in ("norm", "embed", "mlp.gate.weight"))
            assert model.get_buffer(f"{name}_scale").shape == parameter.shape[:-1]


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("layout", ["hub", "per_expert"])
def test_loading_quantizes_what_is_loaded(tmp_path, layout, kind):
    folder = write_smallest(tmp_path, layout=layout)
    loaded = load_language_model(folder, quantize=kind).state_dict()
    expected = quantize_(load_language_model(folder), kind).state_dict()
    assert loaded.keys() == expected.keys()
    assert quantize.QUANTIZED_DTYPES[kind] in {tensor.dtype for tensor in loaded.values()}
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    whole = load_model(folder, quantize=kind)
    assert {p.dtype for p in whole.visual.parameters()} == {torch.float32}
    assert torch.equal(whole.language_model.lm_head.weight, loaded["lm_head.weight"])


def test_a_tied_head_stays_the_embedding(tmp_path):
    folder = write_smallest(tmp_path, replace(SMALLEST, tie_word_embeddings=True))
    model = load_language_model(folder, quantize="int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8


@pytest.mark.parametrize("block", [3000, quantize.BLOCK])
def test_one_plain_block_at_a_time(tmp_path, monkeypatch, block):
    """While a model is loaded, a block of rows or an expert is there in both forms, and nothing larger."""
    sizes = []

    def watched(weight, quantized, scales):
        sizes.append(weight.numel())
        quantize_into(weight, quantized, scales)

    folder = write_smallest(tmp_path)
    expected = load_language_model(folder, quantize="int8").state_dict()
    monkeypatch.setattr(load, "BLOCK", block)
    monkeypatch.setattr(load, "quantize_into", watched)
    model = load_language_model(folder, quantize="int8")
    one_expert = model.model.layers[0].mlp.experts.gate_up_proj[0].numel()
    assert sum(sizes) == sum(p.numel() for p in model.parameters() if p.dtype == torch.int8)
    assert max(sizes) <= max(block, one_expert)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_kept_of_a_block():
    """Not until the next garbage collection either."""

    def tensors():
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    weight = torch.randn(8, 16)
    made = quantize_tensor(weight)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(5):
            made = quantize_tensor(weight)
        assert tensors() == before
    finally:
        gc.enable()
    assert made[0].dtype == torch.int8


def test_weights_weigh_half():
    """Of the shape of the large models, where experts are nearly everything."""
    text = replace(RANDOM_PRESETS["mid"].text, num_hidden_layers=2, vocab_size=4096)
    model = random_language_model(replace(RANDOM_PRESETS["mid"], text=text), torch.bfloat16, "cpu", 0)
    before = sum(tensor.nbytes for tensor in module_tensors(model).values())
    after = sum(tensor.nbytes for tensor in quantize_(model, "int8").state_dict().values())
    assert after <= 0.6 * before


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_are_their_dequantized_selves(dtype, kind):
    """Few rows and many, with kernels (bfloat16) and without."""
    model = quantize_(random_language_model(_with_kernels(), dtype, "cpu", 0), kind)
    linear, experts = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.experts
    assert isinstance(linear, QuantizedLinear)
    assert isinstance(experts, QuantizedExperts)
    has_kernels = kind == "int8" and dtype == torch.bfloat16 and build.load() is not None
    assert (linear.use_kernel, experts.impl) == (has_kernels, "kernel" if has_kernels else "grouped")
    for rows in (1, 60):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = x.float() @ dequantize(linear.weight, linear.weight_scale, torch.float32).T
        assert torch.allclose(linear(x).float(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
        weights, ids = route(torch.randn(rows, 8, generator=torch.Generator().manual_seed(2)).to(dtype), 2)
        plain = (
            dequantize(experts.gate_up_proj, experts.gate_up_proj_scale, torch.float32),
            dequantize(experts.down_proj, experts.down_proj_scale, torch.float32),
        )
        expected = run_experts_grouped(x.float(), weights.float(), ids, *plain)
        actual = experts(x, weights, ids).float()
        assert torch.allclose(actual, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def _with_kernels():
    """Sizes that the kernels take."""
    config = RANDOM_PRESETS["tiny-random"]
    return replace(config, text=replace(config.text, num_hidden_layers=1, moe_intermediate_size=96))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        pytest.param("float32", "int8", marks=pytest.mark.slow),
        ("bfloat16", "int8"),
        pytest.param("bfloat16", "float8", marks=pytest.mark.slow),
    ],
)
def test_answers_stay(scenes, dtype, kind):
    """Within a point, and nearly always the very same words."""
    said = {}
    for each in ("none", kind):
        results = LLM(dtype=dtype, quantize=each).chat([asked.messages() for asked in scenes], GREEDY)
        said[each] = [result.text for result in results]
    right = {kind: sum(t == a.answer for t, a in zip(said[kind], scenes, strict=True)) for kind in said}
    assert right["none"] > 0.9 * len(scenes)
    assert abs(right[kind] - right["none"]) <= 0.01 * len(scenes)
    assert sum(a == b for a, b in zip(said["none"], said[kind], strict=True)) >= 0.98 * len(scenes)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kind"), [("float32", "int8"), ("bfloat16", "int8"), ("bfloat16", "float8")])
def test_compiled(scenes, dtype, kind):
    """As many graphs as for plain weights, none broken, none made later, and the same answers."""
    torch._dynamo.reset()
    messages = [asked.messages() for asked in scenes[:12]]
    expected = [result.text for result in LLM(dtype=dtype, quantize=kind).chat(messages, GREEDY)]
    llm = LLM(dtype=dtype, quantize=kind, engine_options=EngineOptions(compile=True))
    compiled = llm.engine.runner.compiled
    made = compiled.counts
    has_kernels = dtype == "bfloat16" and build.load() is not None  # of float8, for the router
    assert made.graphs == len(graph_kinds(llm.config, has_kernels=has_kernels)) + 1  # and the tower's
    assert made.breaks == 0
    with torch.compiler.set_stance("fail_on_recompile"):
        answers = [result.text for result in llm.chat(messages, GREEDY)]
    torch._dynamo.reset()
    assert answers == expected
    assert compiled.counts == made


def test_what_is_refused(monkeypatch):
    with pytest.raises(InputError, match="--quantize int3: must be one of none, int8, float8"):
        LLM(quantize="int3")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for attempt in (LLM, lambda **kind: load_language_model(tiny_folder(), **kind)):
        for kind in ("int8", "float8"):
            reason = rf"--quantize {kind} needs torchao: pip install 'qwen3vl-disagg\[quantize\]'"
            with pytest.raises(InputError, match=reason):
                attempt(quantize=kind)


def test_torchao_comes_quietly_and_only_when_asked():
    code = (
        "import os, sys\n"
        "from qwen3vl_disagg.checkpoint import load_language_model, quantize\n"
        "assert 'torchao' not in sys.modules\n"
        "quantize.load_torchao()\n"
        "assert 'TORCHAO_FORCE_SKIP_LOADING_SO_FILES' not in os.environ\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("TORCHAO")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
