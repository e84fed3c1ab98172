"""Ways to run experts: each is taken where it can be, and an expert that is broken breaks none but its own tokens."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qwen3vl_disagg.kernels import ops
from qwen3vl_disagg.model import ForwardBatch, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.config import TextConfig
from qwen3vl_disagg.model.kernels import use_kernels
from qwen3vl_disagg.model.moe import (
    EXPERT_IMPLS,
    DispatchPlan,
    Experts,
    SparseMoe,
    run_experts_loop,
    run_gathered,
    takes_grouped_mm,
    used_experts,
)
from qwen3vl_disagg.model.quantized import QuantizedExperts
from qwen3vl_disagg.parallel.dispatch import ExpertDispatcher
from tests.support.random_model import random_language_model, small_config
from tests.support.thread_ranks import on_ranks

BF16 = torch.bfloat16
HAS_KERNELS = ops.is_cpu_bf16(torch.zeros(1, dtype=BF16))


def text_config(hidden: int, width: int) -> TextConfig:
    return replace(small_config().text, hidden_size=hidden, moe_intermediate_size=width)


def make_experts(hidden: int, width: int, dtype: torch.dtype) -> Experts:
    torch.manual_seed(0)
    experts = Experts(text_config(hidden, width)).requires_grad_(False)
    return use_kernels(experts.to(dtype))


def quantized(experts: Experts, weight_dtype: torch.dtype) -> QuantizedExperts:
    made = QuantizedExperts(experts, experts.down_proj.dtype, weight_dtype)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).float()
        largest = 127.0 if weight_dtype == torch.int8 else 448.0
        scale = weight.abs().amax(-1) / largest
        whole = weight / scale[..., None]
        stored = whole.round().to(weight_dtype) if weight_dtype == torch.int8 else whole.to(weight_dtype)
        setattr(made, name, nn.Parameter(stored, requires_grad=False))
        setattr(made, f"{name}_scale", scale)
    return use_kernels(made)


def inputs(hidden: int, dtype: torch.dtype, *, num_tokens: int = 9, num_experts: int = 6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(num_tokens, num_experts, generator=generator).topk(2).indices
    weights = torch.rand(num_tokens, 2, generator=generator).to(dtype)
    return x, weights, ids


@pytest.fixture(autouse=True)
def no_graphs_of_before():
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("hidden", "width"), [(32, 20), (30, 7), (36, 16), (64, 32), (1, 1)])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_any_sizes_in_any_dtype(dtype, hidden, width, is_compiled):
    """`grouped_mm` wants rows that begin at multiples of 16 bytes."""
    experts, given = make_experts(hidden, width, dtype), inputs(hidden, dtype)
    run = torch.compile(experts, backend="eager", fullgraph=True) if is_compiled else experts
    actual = run(*given)
    expected = run_experts_loop(*(t.double() if t.is_floating_point() else t for t in (*given, *experts.parameters())))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    if not HAS_KERNELS:
        is_whole = all(size * dtype.itemsize % 16 == 0 for size in (hidden, width))
        assert experts.impl == ("grouped" if is_whole else "loop")


@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("hidden", "width"), [(32, 20), (30, 7)])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_any_sizes_quantized(weight_dtype, hidden, width, is_compiled):
    plain = make_experts(hidden, width, BF16)
    experts, given = quantized(plain, weight_dtype), inputs(hidden, BF16)
    actual = (torch.compile(experts, backend="eager", fullgraph=True) if is_compiled else experts)(*given)
    torch.testing.assert_close(actual, run_experts_loop(*given, *plain.parameters()), atol=3e-3, rtol=0.2)


@pytest.mark.parametrize(
    ("dtype", "hidden", "is_taken"),
    [(torch.float32, 32, False), (torch.float16, 32, False), (BF16, 32, True), (BF16, 36, False)],
)
@pytest.mark.parametrize("weight_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_where_the_compiler_looks_into_grouped_mm_it_gets_what_that_takes(dtype, hidden, is_taken, weight_dtype):
    """The meta device has the checks that tracing for CUDA meets: bfloat16 alone, and strides of 16 bytes. What they
    refuse has to stay outside of the graph, as does what chooses the experts to dequantize."""
    is_taken = is_taken and weight_dtype is None
    with torch.device("meta"):
        experts = Experts(text_config(hidden, 24)).requires_grad_(False).to(dtype)
        if weight_dtype is not None:
            experts = QuantizedExperts(experts, dtype, weight_dtype)
        x, weights, ids = inputs(hidden, dtype)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    out = torch.compile(experts, backend=backend, fullgraph=True)(x.to("meta"), weights.to("meta"), ids.to("meta"))
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert any("grouped_mm" in name for name in seen) == is_taken
    assert any("experts" in name for name in seen) == (not is_taken)


@settings(max_examples=60)
@given(
    num_tokens=st.integers(0, 7),
    num_choices=st.integers(1, 4),
    num_experts=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_without_asking_which_experts_have_rows(num_tokens, num_choices, num_experts, seed):
    """As the loop: by copies of matrices, and among the experts that can be used alone. Choices from one expert more
    than there are, which are remote; one that nobody chose holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 8, generator=generator)
    ids = torch.randint(0, num_experts + 2, (num_tokens, num_choices), generator=generator)
    weights = torch.rand(num_tokens, num_choices, generator=generator)
    gate_up = torch.randn(num_experts, 12, 8, generator=generator)
    down = torch.randn(num_experts, 8, 6, generator=generator)
    expected = run_experts_loop(x, weights, ids, gate_up, down)
    used, places = used_experts(ids, num_experts)
    assert len(used) == min(num_experts, ids.numel())
    is_here = ids < num_experts
    assert torch.equal(used[places[is_here]], ids[is_here])
    assert (places[~is_here] == len(used)).all()
    if not len(used):
        return
    for poisoned in set(range(num_experts)) - set(ids.flatten().tolist()) - set(used.tolist()):
        gate_up[poisoned] = down[poisoned] = math.nan
    among_used = run_experts_loop(x, weights, places, gate_up[used], down[used])
    torch.testing.assert_close(among_used, expected, rtol=1e-5, atol=1e-5)
    gathered = run_gathered(x, weights, ids, num_experts, lambda numbers: (gate_up[numbers], down[numbers]))
    torch.testing.assert_close(gathered, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_whole_decoder_is_traced_for_another_device_than_the_cpu(dtype):
    with torch.device("meta"):
        model = use_kernels(Qwen3MoeForCausalLMWithDeepStack(small_config()).to(dtype))
        deepstack = torch.zeros(7, 64, dtype=dtype)
        ids = torch.zeros(7, dtype=torch.int64)
    model.model.step = torch.compile(model.model.step, backend="eager", fullgraph=True)
    with torch.no_grad():
        batch = ForwardBatch.for_prompt([7], last_only=False)
        logits = model(ids, ids.expand(3, -1), batch, input_deepstack_embeds=deepstack)
    assert logits.shape == (7, 72)


# ---- an expert that is not finite ----

BROKEN = 2


def ways(dtype: torch.dtype) -> dict[str, Experts]:
    """Every way to run the same experts."""
    plain = make_experts(64, 32, dtype)
    made = {impl: copy.deepcopy(plain) for impl in EXPERT_IMPLS if impl != "kernel" or (dtype == BF16 and HAS_KERNELS)}
    for impl, experts in made.items():
        experts.impl = impl
    return {**made, "int8": quantized(plain, torch.int8), "float8": quantized(plain, torch.float8_e4m3fn)}


def break_expert(experts: Experts, value: float, expert: int = BROKEN) -> None:
    for name in experts.weight_names:
        weight = getattr(experts, name)
        if weight.dtype in (torch.float32, BF16):
            weight.data[expert] = value


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("value", "is_compiled"), [(math.inf, False), (-math.inf, True), (math.nan, False)])
def test_tokens_that_do_not_meet_a_broken_expert_are_untouched(dtype, value, is_compiled):
    x, weights, ids = inputs(64, dtype)
    meets = (ids == BROKEN).any(-1)
    assert meets.any()
    assert not meets.all()
    x[meets.nonzero()[0]] = value  # a row that is broken itself goes on to be
    for name, experts in ways(dtype).items():
        torch._dynamo.reset()
        run = torch.compile(experts, backend="eager", fullgraph=True) if is_compiled else experts
        sound = run(x, weights, ids)
        break_expert(experts, value)
        broken = run(x, weights, ids)
        assert torch.equal(broken[~meets], sound[~meets]), name
        assert not broken[meets].isfinite().any(), name


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kind", ["gather", "all_to_all"])
def test_nor_are_those_of_other_ranks(dtype, kind):
    """Each of 3 ranks has tokens and 2 experts; what they make of a row is summed up across ranks."""
    x, weights, ids = inputs(64, dtype, num_tokens=24)
    meets = (ids == BROKEN).any(-1)

    def outputs(value: float | None) -> torch.Tensor:
        experts = make_experts(64, 32, dtype)
        if value is not None:
            break_expert(experts, value)

        def body(collectives):
            dispatcher = ExpertDispatcher(collectives, 6)
            mine = slice(collectives.rank * 8, collectives.rank * 8 + 8)
            rows = x[mine], weights[mine], ids[mine]
            *sent_rows, sent = dispatcher.dispatch(*rows, DispatchPlan(16, kind))
            here = slice(collectives.rank * 2, collectives.rank * 2 + 2)
            local = (experts.gate_up_proj[here], experts.down_proj[here])
            return dispatcher.combine(experts.run(*sent_rows, *local), sent)

        return torch.cat(on_ranks(3, body))

    sound, broken = outputs(None), outputs(math.inf)
    assert torch.equal(broken[~meets], sound[~meets])
    assert not broken[meets].isfinite().any()


@torch.inference_mode()
def test_a_router_that_gives_an_expert_no_weight_does_not_meet_it():
    """Through the router: tokens of one half go to some experts, those of the other half to others."""
    model = random_language_model(small_config(), seed=0)
    moe = model.model.layers[0].mlp
    assert isinstance(moe, SparseMoe)
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    sound = moe(x)
    ids = (moe.gate(x)).topk(2).indices
    break_expert(moe.experts, math.inf, int(ids[0, 0]))
    broken = moe(x)
    meets = (ids == ids[0, 0]).any(-1)
    assert torch.equal(broken[~meets], sound[~meets])
    assert (~meets).any()


def test_what_grouped_mm_is_said_to_take_it_takes():
    """On this build, and no more than that, so that the loop is not taken without need."""
    for dtype in (torch.float32, torch.float16, BF16, torch.float64):
        for hidden in (1, 2, 4, 6, 8, 12, 16, 20, 32):
            x, weights = torch.ones(3, hidden, dtype=dtype), torch.ones(2, 8, hidden, dtype=dtype)
            try:
                torch.nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=torch.tensor([1, 3], dtype=torch.int32))
                takes = True
            except RuntimeError:
                takes = False
            assert takes_grouped_mm("cpu", dtype, hidden, 16) == takes, (dtype, hidden)
