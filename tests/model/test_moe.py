"""Router and experts: the two ways agree, and one-hot weights show which half is the gate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from qwen3vl_disagg.model.moe import EXPERT_IMPLS, SparseMoe, route, run_experts_grouped, run_experts_loop
from tests.support.oracle import CONFIGS

HIDDEN, WIDTH = 16, 8


@given(
    num_tokens=st.integers(0, 20),
    num_experts=st.integers(1, 9),
    num_away=st.integers(0, 3),
    choices=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
def test_grouped_equals_loop(num_tokens, num_experts, num_away, choices, dtype, seed):
    """Also where the last experts are away: ids that nobody has here."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x = random(num_tokens, HIDDEN)
    weights, ids = route(x @ random(num_experts + num_away, HIDDEN).T, min(choices, num_experts + num_away))
    experts = (random(num_experts, 2 * WIDTH, HIDDEN), random(num_experts, HIDDEN, WIDTH))
    expected = run_experts_loop(x, weights, ids, *experts)
    actual = run_experts_grouped(x, weights, ids, *experts)
    assert actual.dtype == expected.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("impl", ["loop", "grouped"])
def test_first_half_is_the_gate(impl):
    """One token, one expert: gate 3, up 5."""
    gate_up = torch.zeros(1, 2 * WIDTH, HIDDEN)
    gate_up[0, 2, 0], gate_up[0, WIDTH + 2, 0] = 3.0, 5.0
    down = torch.zeros(1, HIDDEN, WIDTH)
    down[0, 7, 2] = 1.0
    x = F.one_hot(torch.tensor([0]), HIDDEN).float()
    out = EXPERT_IMPLS[impl](x, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), gate_up, down)
    assert out[0, 7].item() == pytest.approx(F.silu(torch.tensor(3.0)).item() * 5.0)
    assert out.count_nonzero() == 1


@pytest.mark.parametrize("impl", ["loop", "grouped"])
def test_each_choice_is_weighted(impl):
    """Expert e multiplies by e + 1; weights 0.25 of expert 2 and 0.75 of expert 0."""
    gate_up = torch.zeros(3, 2 * WIDTH, HIDDEN)
    gate_up[:, 0, 0], gate_up[:, WIDTH, 0] = 1.0, torch.arange(1.0, 4.0)
    down = torch.zeros(3, HIDDEN, WIDTH)
    down[:, 0, 0] = 1.0
    x = F.one_hot(torch.tensor([0]), HIDDEN).float()
    out = EXPERT_IMPLS[impl](x, torch.tensor([[0.25, 0.75]]), torch.tensor([[2, 0]]), gate_up, down)
    assert out[0, 0].item() == pytest.approx(F.silu(torch.tensor(1.0)).item() * (0.25 * 3 + 0.75 * 1))


def test_router_renormalises_the_chosen():
    gate = torch.eye(4)
    x = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    weights, ids = route(x @ gate.T, 2)
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7]]))


def test_router_weights_take_the_model_s_dtype():
    x, gate = torch.randn(5, 16).bfloat16(), torch.randn(4, 16).bfloat16()
    weights, _ = route(x @ gate.T, 2)
    assert weights.dtype == torch.bfloat16


def test_tokens_are_independent():
    """No token is dropped, however the others are routed."""
    torch.manual_seed(0)
    block = SparseMoe(CONFIGS["moe"].text)
    x = torch.randn(30, 64)
    together = block(x)
    for i in (0, 13, 29):
        torch.testing.assert_close(block(x[i : i + 1])[0], together[i], atol=1e-6, rtol=1e-4)
