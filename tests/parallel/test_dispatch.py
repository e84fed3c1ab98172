"""Dispatch and combine against all experts in one place: one contract for both kinds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen3vl_disagg.model.moe import DispatchPlan, run_experts_grouped, run_experts_loop
from qwen3vl_disagg.parallel.dispatch import ExpertDispatcher, choose_kind, pack, unpack
from qwen3vl_disagg.parallel.expert_placement import shard_rows
from tests.support.thread_ranks import ThreadCollectives, on_ranks

D, F = 8, 4
KINDS = pytest.mark.parametrize("kind", ["gather", "all_to_all"])
Rows = tuple[Tensor, Tensor, Tensor]


def make_weights(num_experts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_experts)
    shapes = (num_experts, 2 * F, D), (num_experts, D, F)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def make_rows(num_tokens: int, ids: list[list[int]], seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.tensor(ids, dtype=torch.int64).reshape(num_tokens, -1 if num_tokens else 2)
    x_TD = torch.randn(num_tokens, D, generator=generator)
    return x_TD, torch.rand(ids_TK.shape, generator=generator), ids_TK


def run_on_ranks(kind: str, num_experts: int, rows: list[Rows], num_rows: int) -> list[Tensor]:
    """What each rank gets for its rows, with its own part of the weights alone."""
    weights = make_weights(num_experts)

    def body(collectives: ThreadCollectives) -> Tensor:
        here = shard_rows(num_experts, collectives.num_ranks, collectives.rank)
        local = [weight[here.start : here.stop] for weight in weights]
        dispatcher = ExpertDispatcher(collectives, num_experts)
        *mine, sent = dispatcher.dispatch(*rows[collectives.rank], DispatchPlan(num_rows, kind))  # type: ignore[arg-type]
        return dispatcher.combine(run_experts_grouped(*mine, *local), sent)

    return on_ranks(len(rows), body)


def check(kind: str, num_experts: int, rows: list[Rows], spare: int = 0) -> None:
    num_rows = max(len(x) for x, _, _ in rows) + spare
    for mine, out in zip(rows, run_on_ranks(kind, num_experts, rows, num_rows), strict=True):
        torch.testing.assert_close(out, run_experts_loop(*mine, *make_weights(num_experts)), rtol=1e-5, atol=1e-5)


@st.composite
def worlds(draw) -> tuple[int, list[Rows]]:
    """Experts, and the rows of each rank: any counts, any skew of the routing."""
    num_experts = draw(st.integers(2, 9))
    num_choices = draw(st.integers(1, min(3, num_experts)))
    favourites = draw(st.lists(st.integers(0, num_experts - 1), min_size=num_choices, unique=True))
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    if sum(counts) == 0:
        counts[0] = 1
    rows = []
    for rank, count in enumerate(counts):
        choices = st.lists(st.sampled_from(favourites), min_size=num_choices, max_size=num_choices, unique=True)
        ids = [draw(choices) for _ in range(count)]
        x_TD, _, _ = make_rows(count, ids, rank)
        ids_TK = torch.tensor(ids, dtype=torch.int64).reshape(count, num_choices)
        rows.append((x_TD, torch.rand(count, num_choices), ids_TK))
    return num_experts, rows


@KINDS
@given(world=worlds(), spare=st.integers(0, 3))
def test_spread_experts_add_up_to_all_of_them(kind, world, spare):
    check(kind, *world, spare)


@KINDS
@pytest.mark.parametrize("num_experts", [7, 8, 12, 16])
@pytest.mark.parametrize("num_ranks", [2, 3, 5, 6])
def test_every_token_to_one_expert(kind, num_experts, num_ranks):
    """Also with ranks that have no expert (12 over 5), and the last one without a token."""
    last = num_experts - 1
    rows = [make_rows(3 if rank < num_ranks - 1 else 0, [[last, 0]] * 3, rank) for rank in range(num_ranks - 1)]
    check(kind, num_experts, [*rows, make_rows(0, [], 0)])


def test_a_row_goes_once_to_each_rank_that_has_one_of_its_experts():
    """4 experts over 2 ranks: token 0 has both of its experts on rank 1, token 1 one on each."""
    rows = [make_rows(2, [[2, 3], [1, 2]], 0), make_rows(0, [], 1)]

    def body(collectives: ThreadCollectives):
        dispatcher = ExpertDispatcher(collectives, 4)
        return dispatcher.dispatch(*rows[collectives.rank], DispatchPlan(2, "all_to_all"))

    (x0, _, ids0, sent0), (x1, _, ids1, sent1) = on_ranks(2, body)
    assert (sent0.send, sent0.receive, sent1.send, sent1.receive) == ([1, 2], [1, 0], [0, 0], [2, 0])
    assert ids0.tolist() == [[1, 2]]  # expert 2 is not here: 2 is nobody's on a rank with two experts
    assert ids1.tolist() == [[0, 1], [2, 0]]  # and 1, which rank 0 has, is nobody's here
    assert torch.equal(x0, rows[0][0][1:])
    assert torch.equal(x1, rows[0][0])


@KINDS
def test_nothing_is_kept_between_steps(kind):
    """Two dispatches before the first combine: what a combine needs comes from its own dispatch."""
    first, second = make_rows(2, [[0, 1], [2, 3]], 1), make_rows(3, [[3, 1], [1, 0], [2, 1]], 2)
    weights = make_weights(4)

    def body(collectives: ThreadCollectives) -> list[Tensor]:
        here = shard_rows(4, 2, collectives.rank)
        local = [weight[here.start : here.stop] for weight in weights]
        dispatcher = ExpertDispatcher(collectives, 4)
        sent = [dispatcher.dispatch(*rows, DispatchPlan(3, kind)) for rows in (first, second)]
        return [dispatcher.combine(run_experts_grouped(*rows, *local), how) for *rows, how in sent]

    for outs in on_ranks(2, body):
        for rows, out in zip((first, second), outs, strict=True):
            torch.testing.assert_close(out, run_experts_loop(*rows, *weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "num_rows", "hidden", "kind"),
    [
        ([512, 0], 512, 1024, "all_to_all"),
        ([64, 0], 64, 1024, "gather"),
        ([64, 0, 0, 0, 0, 0], 64, 1024, "all_to_all"),
        ([64, 0, 0, 0, 0, 0], 64, 256, "gather"),
        ([96] * 6, 96, 1024, "gather"),
        ([2] * 6, 2, 1024, "gather"),
        ([1, 0, 0, 0, 0, 0], 2, 1024, "gather"),
    ],
)
def test_rows_of_one_rank_go_where_they_must_and_rows_of_all_to_all(rows, num_rows, hidden, kind):
    """As measured: docs/benchmarks.md."""
    assert choose_kind(rows, num_rows, num_choices=4, row_bytes=2 * hidden) == kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_survive_the_way_as_bits(dtype):
    ids = torch.tensor([[0, 1], [127, 128], [255, 32766]])
    x, weights = torch.randn(3, 5, dtype=dtype), torch.rand(3, 2, dtype=dtype)
    got = unpack(pack(x, weights, ids), 2)
    assert all(torch.equal(a, b) for a, b in zip(got, (x, weights, ids), strict=True))


def test_what_cannot_be_is_refused():
    def more_than_agreed(collectives: ThreadCollectives) -> None:
        dispatcher = ExpertDispatcher(collectives, 4)
        with pytest.raises(ValueError, match="2 tokens, but the ranks agreed on 1 rows"):
            dispatcher.dispatch(*make_rows(2, [[0, 1], [1, 2]], 0), DispatchPlan(1))
        with pytest.raises(ValueError, match="spread over 1 ranks: a step needs their plan"):
            dispatcher.dispatch(*make_rows(2, [[0, 1], [1, 2]], 0), None)

    on_ranks(1, more_than_agreed)
