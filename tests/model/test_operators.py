"""What the package's own operators tell the compiler of themselves: schema, shapes, what they write."""

from __future__ import annotations

import pytest
import torch

from qwen3vl_disagg.model import PagedBatch
from tests.model.test_expert_impls import inputs, make_experts

OPS = torch.ops.q3vl
BF16 = torch.bfloat16


@pytest.mark.parametrize("name", ["grouped_experts", "experts_ungrouped", "experts_in_slices"])
def test_operators_of_experts(name):
    given = [*inputs(32, BF16), *make_experts(32, 24, BF16).local_weights()]
    given[2][0, 0] = 6  # remote
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    result = torch.library.opcheck(getattr(OPS, name).default, tuple(given), test_utils=utils)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("impl", ["sdpa", "flex"])
@pytest.mark.parametrize("new", [[1, 1], [3, 5]])
def test_operators_of_attention(impl, new):
    """Keys and values are written into the pools, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    q, *kv, k_pool, v_pool = (
        torch.randn(*shape, 16, generator=generator)
        for shape in [(sum(new), 4), (sum(new), 2), (sum(new), 2), (128, 2), (128, 2)]
    )
    batch = PagedBatch(new, [9, 7], torch.tensor([[3], [6]]), 16, [(k_pool, v_pool)], impl=impl)
    if impl == "flex":
        places = (batch.new_slots_T, batch.unwritten, batch.plan.lists, batch.plan.sizes)
        op = OPS.flex_attention.default
    else:
        places, op = (batch._packed, 16, impl), OPS.paged_attention.default
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    result = torch.library.opcheck(op, (q, *kv, k_pool, v_pool, *places), test_utils=utils)
    assert set(result.values()) == {"SUCCESS"}
