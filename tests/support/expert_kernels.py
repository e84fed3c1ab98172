"""What the Triton kernels of the expert layer have to hold, on random and hostile shapes: for the interpreter on a CPU
and for a GPU. Each check draws its case, runs an operator that it is given and compares it with the reference.

Bounds. One step of bfloat16 (u) is 2**-7 of a number at most, and rounding is off by half of it. Products in float32
may be summed up in any order, which for the lengths here is less than 2**-16 of the sum of their absolute values.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from qwen3vl_disagg.kernels.gpu.combine import combine_reference
from qwen3vl_disagg.kernels.gpu.order import order_reference
from qwen3vl_disagg.kernels.gpu.swiglu import swiglu_reference
from qwen3vl_disagg.model.moe import route, run_experts_loop

BF16 = torch.bfloat16
U, SUMMED = 2.0**-7, 2.0**-16
SIZES = st.integers(1, 40)
ROWS = st.integers(0, 12)
STRIDES = ("plain", "transposed", "apart", "behind")


def strided(x: Tensor, how: str) -> Tensor:
    """The same numbers with other strides; between and around them lies NaN, where the dtype has it."""
    if how == "plain" or x.numel() == 0:
        return x
    if how == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    step = 3 if how == "apart" else 1
    shape = (*x.shape[:-1], step * x.shape[-1] + 5)
    room = torch.full(shape, float("nan") if x.is_floating_point() else 10**6, dtype=x.dtype, device=x.device)
    view = room[..., 2 : 2 + step * x.shape[-1] : step]
    view.copy_(x)
    return view


class Case:
    """One draw: sizes, seeds, strides."""

    def __init__(self, draw, device: str = "cpu", *, rows=ROWS) -> None:
        self.draw, self.device = draw, device
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.rows = draw(rows)
        self.experts = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 128])))
        self.choices = draw(st.integers(1, min(self.experts, 9)))

    def normal(self, *shape: int, scale: float = 1.0, is_plain: bool = False) -> Tensor:
        x = (torch.randn(shape, generator=self.generator) * scale).to(BF16).to(self.device)
        return x if is_plain else strided(x, self.draw(st.sampled_from(STRIDES)))

    def ids(self) -> tuple[Tensor, int]:
        """Different ones in each row, and how many of the experts are here: from none to all; ids beyond mean those
        that are elsewhere. Sometimes all rows want the same."""
        here = self.draw(st.integers(0, self.experts))
        scores = torch.rand(self.rows, self.experts, generator=self.generator)
        if self.draw(st.booleans()):
            scores = scores[:1].expand(self.rows, -1) if self.rows else scores
        ids = scores.topk(self.choices).indices
        return strided(ids.to(self.device), self.draw(st.sampled_from(STRIDES))), here

    def weights(self) -> Tensor:
        """Positive, as a router's are."""
        return self.normal(self.rows, self.choices).abs()


def close(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str) -> None:
    """The difference of each number is within its bound."""
    assert actual.shape == expected.shape, what
    off = (actual.double() - expected.double()).abs()
    is_far = ~(off <= bound)
    assert not is_far.any(), f"{what}: {int(is_far.sum())} of {off.numel()} differ, the most by {off.max():.4g}"


def check_route(draw, op, device: str = "cpu") -> None:
    """Ids are those of a stable sort, so of equal logits the first; weights within a step of the reference."""
    case = Case(draw, device)
    logits = case.normal(case.rows, case.experts, scale=draw(st.sampled_from([0.5, 4.0, 200.0])))
    kind = draw(st.sampled_from(["any", "ties", "zeros", "all equal"]))
    if kind != "any":
        rounded = {"ties": logits.round().clamp(-2, 2), "zeros": logits.sign() * 0.0, "all equal": logits * 0 + 3}
        logits = strided(rounded[kind], draw(st.sampled_from(STRIDES)))
    weights, ids = op(logits, case.choices)
    expected, _ = route(logits, case.choices)
    order = (logits.float() + 0.0).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(ids, order[:, : case.choices]), "ids"
    assert weights.dtype == logits.dtype
    close(weights, expected, U * expected.double().abs() + 1e-30, "weights")


def check_route_of_broken_rows(draw, op, device: str = "cpu") -> None:
    """NaN and infinity in a row: its weights are NaN, its ids different ones of experts, and other rows as before."""
    case = Case(draw, device)
    logits = case.normal(case.rows + 1, case.experts)
    sound = op(logits, case.choices)
    broken = logits.clone()
    value = draw(st.sampled_from([float("nan"), float("inf"), -float("nan")]))
    row, column = draw(st.integers(0, case.rows)), draw(st.integers(0, case.experts - 1))
    broken[row, column] = value
    if draw(st.booleans()):
        broken[row] = draw(st.sampled_from([value, -float("inf")]))
    weights, ids = op(broken, case.choices)
    assert not weights[row].isfinite().any()
    assert len(set(ids[row].tolist())) == case.choices
    assert 0 <= int(ids.min()) <= int(ids.max()) < case.experts
    others = torch.arange(case.rows + 1, device=device) != row
    assert torch.equal(weights[others], sound[0][others])
    assert torch.equal(ids[others], sound[1][others])


def check_order(draw, op, device: str = "cpu") -> None:
    """Exactly the stable sort's, also of more choices than a program looks at together."""
    case = Case(draw, device, rows=st.one_of(ROWS, st.sampled_from([200, 1025, 1100])))
    ids, here = case.ids()
    for name, actual, expected in zip(
        ("tokens", "places", "ends"), op(ids, here), order_reference(ids, here), strict=True
    ):
        assert actual.dtype == expected.dtype == torch.int32
        assert torch.equal(actual, expected), name


def ends_within(case: Case, num_rows: int) -> tuple[Tensor, int]:
    """Ends of some experts' rows, of `num_rows` at most, and the last of them."""
    count = case.draw(st.integers(1, 5))
    ends = sorted(case.draw(st.lists(st.integers(0, num_rows), min_size=count, max_size=count)))
    return torch.tensor(ends, dtype=torch.int32, device=case.device), ends[-1]


def check_pick(draw, op, device: str = "cpu") -> None:
    """The same bits up to the last end; what tokens past it say is not looked at."""
    case = Case(draw, device)
    hidden = draw(st.one_of(st.integers(1, 70), st.sampled_from([1024, 1030])))
    x = case.normal(case.rows + 1, hidden)
    tokens = torch.randint(case.rows + 1, (draw(st.integers(0, 30)),), generator=case.generator).int()
    ends, last = ends_within(case, len(tokens))
    tokens = tokens.to(device)
    expected = x[tokens[:last].long()]
    actual = op(x, tokens, ends)
    assert actual.shape == (len(tokens), hidden)
    assert torch.equal(actual[:last], expected), "rows differ"


def check_swiglu(draw, op, device: str = "cpu") -> None:
    """Within a step of each of the two roundings, and nearly always the same; of rows up to the last end."""
    case = Case(draw, device)
    width = draw(st.one_of(st.integers(1, 70), st.sampled_from([768, 1025])))
    gate_up = case.normal(case.rows, 2 * width, scale=draw(st.sampled_from([1.0, 30.0])))
    ends, last = ends_within(case, case.rows)
    actual, expected = op(gate_up, ends)[:last], swiglu_reference(gate_up)[:last]
    close(actual, expected, 2 * U * expected.double().abs() + 1e-37, "silu(gate) * up")
    assert (actual == expected).float().mean() > 0.97 or actual.numel() < 200


def check_combine(draw, op, device: str = "cpu") -> None:
    """Rows past the last expert's are NaN here, and must not be read."""
    case = Case(draw, device)
    ids, here = case.ids()
    hidden = draw(st.one_of(st.integers(1, 70), st.sampled_from([1024, 1030])))
    _, places, ends = order_reference(ids, here)
    y = case.normal(places.numel(), hidden)
    y[int(ends[-1]) if here else 0 :] = float("nan")
    weights = case.weights()
    actual, expected = op(y, places, weights), combine_reference(y, places, weights)
    parts = combine_reference(y.double().abs(), places, weights.double().abs())
    close(actual, expected, U * expected.double().abs() + SUMMED * parts.double(), "weighted sum")


def check_experts(draw, op, device: str = "cpu", *, rows=ROWS, sizes=SIZES, is_plain=False) -> None:
    """Against the loop over experts in float64: each of the roundings to bfloat16 (gate, up, silu, product, output) is
    half a step at most of what it rounds, silu's slope makes of the gate's up to 1 + |gate|; a whole step is allowed.
    Besides, not much further off altogether than the loop in bfloat16."""
    case = Case(draw, device, rows=rows)
    ids, here = case.ids()
    hidden, width = draw(sizes), draw(sizes)
    x, weights = case.normal(case.rows, hidden), case.weights()
    gate_up = case.normal(here, 2 * width, hidden, scale=hidden**-0.5, is_plain=is_plain)
    down = case.normal(here, hidden, width, scale=width**-0.5, is_plain=is_plain)
    actual = op(x, weights, ids, gate_up, down)
    assert actual.dtype == BF16
    rounded = run_experts_loop(x, weights, ids, gate_up, down)
    exact = exact_experts(x, weights, ids, gate_up, down)
    close(actual, exact[0], exact[1] * U + 1e-30, "experts")
    off, most = ((each.double() - exact[0]).norm() for each in (actual, rounded))
    assert off <= 1.5 * most + 4 * U * exact[0].norm() / max(exact[0].numel(), 1) ** 0.5, (
        f"{off:.4g}, the loop {most:.4g}"
    )


def check_sorted_experts(draw, op, device: str = "cpu") -> None:
    """More rows than go by the kernel of few, and sizes and strides of weights that `grouped_mm` takes."""
    check_experts(draw, op, device, rows=st.integers(0, 20), sizes=st.sampled_from([8, 16, 40]), is_plain=True)


def exact_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """In float64: the sum `[T, D]`, and what an error of one part in each of the five roundings adds up to at most."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    spread = out.clone()
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            if expert < down.shape[0]:
                gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
                h = torch.nn.functional.silu(gate) * up
                out[token] += weight * (down[expert].double() @ h)
                spread[token] += weight * (down[expert].double().abs() @ (h.abs() * (4 + gate.abs())))
    return out, spread + out.abs()
