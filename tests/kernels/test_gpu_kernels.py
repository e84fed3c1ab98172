"""Triton kernels of the expert layer, run by Triton's interpreter on the CPU: numbers and bounds, no speed, no GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: its kernels are tested where it is", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu runs the kernels on it", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton was imported without its interpreter: run this file alone", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from qwen3vl_disagg.kernels import gpu
from qwen3vl_disagg.model import moe
from qwen3vl_disagg.model.moe import SparseMoe, run_experts_triton

gpu.register()

from tests.support import expert_kernels as checks  # noqa: E402 - needs the operators
from tests.support.random_model import small_config  # noqa: E402 - as above
from tests.support.triton_interpreter import rounding  # noqa: E402

OPS = torch.ops.q3vl
CHECKS = {
    "route": (checks.check_route, lambda: OPS.gpu_route),
    "broken rows": (checks.check_route_of_broken_rows, lambda: OPS.gpu_route),
    "order": (checks.check_order, lambda: OPS.gpu_order),
    "pick": (checks.check_pick, lambda: OPS.gpu_pick),
    "swiglu": (checks.check_swiglu, lambda: OPS.gpu_swiglu),
    "combine": (checks.check_combine, lambda: OPS.gpu_combine),
    "few rows": (checks.check_experts, lambda: OPS.gpu_few_rows),
    "sorted": (checks.check_sorted_experts, lambda: run_experts_triton),
    "slices": (checks.check_sorted_experts, lambda: in_slices),
}
QUICK, MANY = 8, 300


def in_slices(*given: torch.Tensor) -> torch.Tensor:
    """By the kernels, as on CUDA."""
    with pytest.MonkeyPatch.context() as patch, Names() as names:
        patch.setattr(gpu, "takes", lambda x: True)
        out = moe.run_experts_in_slices(*given)
    assert not len(given[-1]) or {"gpu_pick", "gpu_combine"} <= names.seen
    return out


@pytest.fixture(autouse=True)
def conversions_as_on_a_gpu(monkeypatch):
    """The interpreter cuts bfloat16 off, the hardware rounds to nearest (and this is ten times as fast)."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(moe, "MAX_ROUTED_ROWS", 24)  # so that few rows are several slices

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding(InterpreterBuilder.cast_impl))


def holds(name: str, count: int, op=None, phases=tuple(Phase)) -> None:
    check, made = CHECKS[name]

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=phases, report_multiple_bugs=False
    )
    @given(data=st.data())
    def run(data):
        check(data.draw, op or made())

    with torch.inference_mode():
        run()


@pytest.mark.parametrize("name", CHECKS)
def test_equals_the_reference(name):
    holds(name, QUICK)


@pytest.mark.acceptance
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CHECKS)
def test_equals_the_reference_on_many_shapes(name):
    """2,700 altogether."""
    holds(name, MANY)


@pytest.mark.parametrize(
    ("file", "good", "bad", "check"),
    [
        ("route", "BLOCK_E - 1 - expert", "expert", "route"),
        ("route", "key = tl.where(expert == best, least, key)", "key = key", "route"),
        ("route", "chosen = chosen / tl.sum(chosen, 0)", "chosen = chosen", "route"),
        ("route", "tl.where(x == 0.0, 0.0, x)", "x", "route"),
        ("order", "chosen < expert", "chosen > expert", "order"),
        ("order", "tl.where(expert < E, place, -1)", "place", "order"),
        ("order", "before + count, mask", "count, mask", "order"),
        ("order", "before += tl.sum(is_mine.to(tl.int32), 0)", "before += 0", "order"),
        ("pick", "ends + E - 1", "ends + E - 2", "pick"),
        ("pick", "row < tl.load", "row + 1 < tl.load", "pick"),
        ("pick", "token * row_stride", "row * row_stride", "pick"),
        ("swiglu", "ends + E - 1", "ends + E - 2", "swiglu"),
        ("swiglu", "(column + width) * column_stride", "(column + width) * 1", "swiglu"),
        ("swiglu", "1.0 + tl.exp(-gate)", "1.0 + tl.exp(gate)", "swiglu"),
        ("combine", "place >= 0", "place > 0", "combine"),
        ("combine", "k * choice_stride", "k", "combine"),
        ("few_rows", "+ F * row_stride", "+ 0", "few rows"),
        ("few_rows", "token * K + k) * F", "token + k) * F", "few rows"),
        ("few_rows", "total += weight * tl.sum(part, 1)", "total = weight * tl.sum(part, 1)", "few rows"),
        ("few_rows", "depth[None, :] * column_stride", "depth[None, :]", "few rows"),
    ],
)
def test_a_planted_bug_is_caught(file, good, bad, check, tmp_path):
    """The kernel's file with one change; none that writes where nothing of its own lies."""
    source = importlib.util.find_spec(f"qwen3vl_disagg.kernels.gpu.{file}").loader.get_source(None)
    assert good in source
    space = f"q3vl_bug{abs(hash((good, bad)))}"
    path = tmp_path / f"{file}_bug.py"
    path.write_text(source.replace(good, bad).replace("q3vl::", f"{space}::"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    with pytest.raises(BaseException, match=r"differ|ids|tokens|places|ends|loop|index|Error") as caught:
        holds(check, 60, getattr(module, f"gpu_{file}"), (Phase.generate,))
    assert not isinstance(caught.value, (KeyboardInterrupt, SystemExit))


class Names(TorchDispatchMode):
    """Operators of ours that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        self.seen |= {name} if space == "q3vl" else set()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (0, {"gpu_route", "gpu_few_rows"}),
        (gpu.MAX_FEW_ROWS, {"gpu_route", "gpu_few_rows"}),
        (gpu.MAX_FEW_ROWS + 1, {"gpu_route", "gpu_order", "gpu_pick", "gpu_swiglu", "gpu_combine"}),
    ],
)
def test_a_layer_takes_them_where_they_are_on(rows, names, monkeypatch):
    """As on CUDA: nothing but where a tensor lies is different here. And not otherwise."""
    text = replace(small_config().text, moe_intermediate_size=24)
    torch.manual_seed(0)
    layer = SparseMoe(text).bfloat16().requires_grad_(False)
    x = torch.randn(rows, text.hidden_size).bfloat16()
    with Names() as off:
        expected = layer(x)
    assert not {name for name in off.seen if name.startswith("gpu_")}
    monkeypatch.setattr(gpu, "takes", lambda x: x.dtype == torch.bfloat16)
    with Names() as on:
        actual = layer(x)
    assert on.seen == names
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=4e-2)
    layer.experts.impl = "loop"
    with Names() as loop:
        layer(x)
    assert loop.seen == {"gpu_route"}, "who asks for the reference gets it"


def test_experts_of_several_ranks_are_always_sorted(monkeypatch):
    """The rows of all ranks come together, and a graph does not know whether they are few."""
    monkeypatch.setattr(gpu, "takes", lambda x: x.dtype == torch.bfloat16)
    experts = SparseMoe(replace(small_config().text, moe_intermediate_size=24)).bfloat16().experts
    assert experts.takes_few_rows(experts.down_proj)
    experts.dispatcher = type("Spread", (moe.Dispatcher,), {})()
    assert not experts.takes_few_rows(experts.down_proj)


def arguments() -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    ids = torch.rand(5, 6, generator=generator).topk(3).indices
    tokens, places, ends = OPS.gpu_order(ids, 4)
    return {
        "gpu_route": (normal(5, 6), 3),
        "gpu_order": (ids, 4),
        "gpu_pick": (normal(5, 6), tokens[: int(ends[-1])], ends),
        "gpu_swiglu": (normal(int(ends[-1]), 14), ends),
        "gpu_combine": (normal(15, 7), places, normal(5, 3)),
        "gpu_few_rows": (normal(5, 8), normal(5, 3), ids, normal(4, 12, 8), normal(4, 8, 6)),
    }


@pytest.mark.parametrize("name", ["gpu_route", "gpu_order", "gpu_pick", "gpu_swiglu", "gpu_combine", "gpu_few_rows"])
def test_operators_are_what_they_say(name):
    """Schema, fake, no mutation. What the compiler makes of them the compile-only tool shows: the interpreter's kernels
    cannot be traced."""
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    result = torch.library.opcheck(getattr(OPS, name).default, arguments()[name], test_utils=utils)
    assert set(result.values()) == {"SUCCESS"}
