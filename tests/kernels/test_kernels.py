"""Each kernel against the PyTorch code that it stands in for, and how the library is built."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from mmap import PAGESIZE, mmap
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qwen3vl_disagg.kernels import build, ops
from qwen3vl_disagg.model.layers import Linear, RMSNorm, project
from qwen3vl_disagg.model.moe import Dispatcher, Experts, route, run_experts_kernel, run_experts_loop
from qwen3vl_disagg.model.paged import PagedPlaces, decode_sdpa, extend_sdpa
from qwen3vl_disagg.model.rope import apply_rotary
from tests.support.random_model import small_config

pytestmark = pytest.mark.skipif(build.load() is None, reason="no AVX-512 BF16 or no C++ compiler")
needs_tiles = pytest.mark.skipif(build.load() is None or not ops.has_tiles(), reason="no AMX")


def bf16(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert actual.dtype == torch.bfloat16
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


@given(
    rows=st.integers(1, ops.MAX_LINEAR_ROWS), blocks=st.integers(1, 9), depth=st.integers(1, 7), seed=st.integers(0, 99)
)
def test_linear(rows, blocks, depth, seed):
    x, weight = bf16(rows, 32 * depth, seed=seed), bf16(4 * blocks, 32 * depth, seed=seed + 1)
    assert ops.can_linear(x, weight)
    exact = F.linear(x.double(), weight.double())
    assert distance(torch.ops.q3vl.linear(x, [weight]), exact) < 2**-8


@given(
    rows=st.integers(1, 64),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    depth=st.integers(1, 7),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_linear_by_tiles(rows, blocks, depth, threads, seed):
    """Where the processor has them, from 5 rows on; then a row's bits do not depend on the rows beside it."""
    x, weights = bf16(rows, 32 * depth, seed=seed), [bf16(32 * n, 32 * depth, seed=seed + n) for n in blocks]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = ops.linear(x, weights)
        assert rows <= 5 or torch.equal(ops.linear(x[:5], weights), out[:5])
    finally:
        torch.set_num_threads(before)
    assert distance(out, F.linear(x.double(), torch.cat(weights).double())) < 2**-8


@needs_tiles
@given(
    rows=st.integers(1, 150),
    blocks=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    depth=st.integers(1, 9),
    more=st.sampled_from(["", "bias", "bias and gelu"]),
    threads=st.sampled_from([1, 3]),
    panel=st.sampled_from([1, 1 << 19]),
    seed=st.integers(0, 99),
)
def test_many_rows(rows, blocks, depth, more, threads, panel, seed):
    """Also where rows, columns and depth end within a tile; a row's bits do not depend on the rows beside it, and are
    those that it has among few."""
    x, weights = bf16(rows, 16 * depth, seed=seed), [bf16(16 * n, 16 * depth, seed=seed + n) for n in blocks]
    bias = bf16(16 * sum(blocks), seed=seed + 1, scale=9.0) if more else None
    is_gelu = "gelu" in more
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with patch.object(ops, "PANEL_NUMBERS", panel):
            out = ops.many_rows(x, weights, bias, is_gelu=is_gelu)
            assert torch.equal(ops.many_rows(x[:5], weights, bias, is_gelu=is_gelu), out[:5])
    finally:
        torch.set_num_threads(before)
    products = F.linear(x.double(), torch.cat(weights).double(), None if bias is None else bias.double())
    assert distance(out, F.gelu(products, approximate="tanh") if is_gelu else products) < 2**-7
    if is_gelu:  # of what is rounded already
        assert torch.equal(out, ops.gelu_tanh_(ops.many_rows(x, weights, bias)))
    if not more and rows >= 5 and depth % 2 == 0 and all(n % 2 == 0 for n in blocks):
        assert torch.equal(ops.linear(x[:40], weights), out[:40])


@needs_tiles
def test_a_row_that_is_not_finite_stays_alone_among_many():
    """Also where the depth ends within a tile, so that what is beside a row would be read with it."""
    x, weight = bf16(70, 48, seed=0), bf16(64, 48, seed=1)
    x[37, 0] = float("nan")
    assert ops.many_rows(x, [weight]).isnan().any(1).nonzero().flatten().tolist() == [37]


def before_a_wall(x: torch.Tensor) -> torch.Tensor:
    """The same, in front of a page that may not be read."""
    size = -(-x.nbytes // PAGESIZE) * PAGESIZE
    room = mmap(-1, size + PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGESIZE), 0) == 0
    return torch.frombuffer(room, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes).view(x.shape).copy_(x)


@needs_tiles
def test_nothing_is_read_behind_the_last_row_of_many_nor_of_a_weight():
    x, weight, bias = (before_a_wall(bf16(*shape, seed=0)) for shape in ((33, 48), (80, 48), (80,)))
    pid = os.fork()
    if not pid:
        try:
            ops.many_rows(x, [weight], bias)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@needs_tiles
def test_layers_of_one_input_keep_their_biases():
    layers = [Linear(64, 64, bias=True).bfloat16() for _ in range(2)]
    x = bf16(80, 64, seed=0)
    with torch.inference_mode():
        expected = [layer(x) for layer in layers]
        for layer in layers:
            layer.use_tiles = True
        for found, exact in zip(project(x, *layers), expected, strict=True):
            assert distance(found, exact) < 2**-7


def test_several_matrices_side_by_side():
    x, weights = bf16(5, 64, seed=0), [bf16(n, 64, seed=n) for n in (8, 4, 20)]
    alone = [torch.ops.q3vl.linear(x, [weight]) for weight in weights]
    assert torch.equal(torch.ops.q3vl.linear(x, weights), torch.cat(alone, 1))


def test_linear_reads_rows_where_they_lie():
    x, weight = bf16(6, 128, seed=0), bf16(8, 64, seed=1)
    assert torch.equal(
        torch.ops.q3vl.linear(x[::2, :64], [weight]), torch.ops.q3vl.linear(x[::2, :64].clone(), [weight])
    )


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 130),
    experts=st.integers(1, 9),
    away=st.integers(0, 2),
    choices=st.integers(1, 4),
    hidden=st.integers(1, 4),
    width=st.integers(1, 4),
    skew=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_experts(tokens, experts, away, choices, hidden, width, skew, seed):
    """Also when all tokens go to few experts, which then have more rows than a block, and when the last are away."""
    x = bf16(tokens, 32 * hidden, seed=seed)
    logits = bf16(tokens, experts + away, seed=seed + 1) + skew * (torch.arange(experts + away) < 2)
    weights, ids = route(logits.bfloat16(), min(choices, experts + away))
    gate_up = bf16(experts, 64 * width, 32 * hidden, seed=seed + 2, scale=0.2)
    down = bf16(experts, 32 * hidden, 32 * width, seed=seed + 3, scale=0.2)
    assert ops.can_experts(x, gate_up, down)
    expected = run_experts_loop(x.double(), weights.double(), ids, gate_up.double(), down.double())
    loop = run_experts_loop(x, weights, ids, gate_up, down)
    actual = run_experts_kernel(x, weights, ids, gate_up, down)
    assert distance(actual, expected) <= distance(loop, expected) + 2**-8


@needs_tiles
@settings(max_examples=40)
@given(
    tokens=st.integers(1, 300),
    experts=st.integers(1, 9),
    away=st.integers(0, 2),
    choices=st.integers(1, 4),
    hidden=st.integers(1, 4),
    width=st.integers(1, 4),
    skew=st.sampled_from([0.0, 30.0]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_experts_by_tiles(tokens, experts, away, choices, hidden, width, skew, threads, seed):
    """Whatever number of rows an expert has, none, one, or more than a block, its answers are those of few rows."""
    x = bf16(tokens, 32 * hidden, seed=seed)
    logits = bf16(tokens, experts + away, seed=seed + 1) + skew * (torch.arange(experts + away) < 2)
    given = (x, *route(logits.bfloat16(), min(choices, experts + away)))
    gate_up = bf16(experts, 64 * width, 32 * hidden, seed=seed + 2, scale=0.2)
    down = bf16(experts, 32 * hidden, 32 * width, seed=seed + 3, scale=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(ops, "takes_tiles", lambda *_: False)
        few = run_experts_kernel(*given, gate_up, down)
        patch.setattr(ops, "takes_tiles", lambda *_: True)
        tiled = run_experts_kernel(*given, gate_up, down)
    assert distance(tiled, few) < 2**-6
    assert (tiled != few).double().mean() < 0.25  # sums in another order round apart, not more


@needs_tiles
def test_a_row_s_bits_do_not_depend_on_others_in_the_tiles(monkeypatch):
    monkeypatch.setattr(ops, "takes_tiles", lambda *_: True)
    x = bf16(200, 64, seed=0)
    weights, ids = route(bf16(200, 3, seed=1), 2)
    experts = (bf16(3, 128, 64, seed=2, scale=0.2), bf16(3, 64, 64, seed=3, scale=0.2))
    whole = run_experts_kernel(x, weights, ids, *experts)
    parts = [run_experts_kernel(x[a:b], weights[a:b], ids[a:b], *experts) for a, b in ((0, 1), (1, 90), (90, 200))]
    assert torch.equal(torch.cat(parts), whole)
    x[7] = float("nan")
    broken = run_experts_kernel(x, weights, ids, *experts).isnan().any(1)
    assert broken.nonzero().flatten().tolist() == [7]


class Spread(Dispatcher):
    """Brings rows of other ranks along."""

    def __init__(self, others: int) -> None:
        self.others = others

    def dispatch(self, x_TD, weights_TK, ids_TK, plan):
        more = bf16(self.others, x_TD.shape[1], seed=9)
        weights, ids = weights_TK[:1].expand(self.others, -1), ids_TK[:1].expand(self.others, -1)
        rows = (torch.cat(pair) for pair in ((x_TD, more), (weights_TK, weights), (ids_TK, ids)))
        return *rows, len(x_TD)

    def combine(self, y_RD, sent):
        return y_RD[:sent]


@needs_tiles
def test_rows_of_other_ranks_do_not_decide_how_one_s_own_are_computed():
    config = replace(small_config().text, num_experts=4, hidden_size=2048, moe_intermediate_size=256)
    experts = Experts(config).bfloat16()
    experts.impl = "kernel"
    x = bf16(48, 2048, seed=0)
    given = (x, *route(bf16(48, 4, seed=1), 2))
    found = []
    for others in (0, 300):
        experts.dispatcher = Spread(others)
        with torch.inference_mode():
            found.append(experts(*given))
    assert torch.equal(*found)


@needs_tiles
def test_no_decode_step_takes_tiles_and_no_few_rows_of_many_experts():
    assert [ops.takes_tiles(tokens, 4, 32) for tokens in (1, 32, 48)] == [False] * 3
    assert ops.takes_tiles(1024, 4, 32)
    assert not ops.takes_tiles(64, 4, 64 * 4)


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (3, 48), (700, 96)])
def test_swiglu(tokens, width):
    gate, up = (bf16(tokens, 2 * width, seed=0, scale=4.0)).split(width, dim=1)
    found, expected = ops.swiglu(gate, up), F.silu(gate) * up
    assert distance(found, expected) < 2**-8
    assert (found != expected).double().mean() < 0.01  # it rounds where they round; e^x is not torch's by the bit


def test_swiglu_does_not_overflow():
    """Gates of +-90: silu is the gate, and almost 0."""
    gate_up, down = torch.zeros(1, 64, 32).bfloat16(), torch.zeros(1, 32, 32).bfloat16()
    gate_up[0, 0, 0], gate_up[0, 1, 0], gate_up[0, 32:34, 0] = 90.0, -90.0, 1.0
    down[0, 0, 0] = down[0, 1, 1] = 1.0
    x = torch.zeros(1, 32).bfloat16()
    x[0, 0] = 1.0
    one = torch.ones(1, 1).bfloat16()
    out = run_experts_kernel(x, one, torch.zeros(1, 1, dtype=torch.int64), gate_up, down)
    assert out[0, :2].tolist() == [90.0, pytest.approx(0.0, abs=1e-30)]


def test_what_is_not_finite_stays_so():
    x, weight = bf16(2, 32, seed=0), bf16(4, 32, seed=1)
    x[1, 3] = float("nan")
    assert torch.ops.q3vl.linear(x, [weight]).isnan().any(1).tolist() == [False, True]
    q = bf16(2, 1, 64, seed=2)
    q[1] = float("nan")
    pool = bf16(8, 1, 64, seed=3)
    slots, new = torch.tensor([4, 4]), bf16(2, 1, 64, seed=4)
    places = (torch.zeros(2, 1, dtype=torch.int64), torch.tensor([5, 5]), slots)
    decoded = ops.decode_attention(q, new, new, pool, pool, *places, 8)
    assert decoded.isnan().flatten(1).any(1).tolist() == [False, True]
    assert ops.prefill_attention(q, pool, pool, torch.arange(5)).isnan().flatten(1).any(1).tolist() == [False, True]
    pool[2, 0, 0] = float("nan")  # one key among those of both
    assert ops.decode_attention(bf16(2, 1, 64, seed=2), new, new, pool, pool.clone(), *places, 8).isnan().all()


def pools(num_slots: int, heads: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return bf16(num_slots, heads, size, seed=seed), bf16(num_slots, heads, size, seed=seed + 1)


@settings(max_examples=40)
@given(
    contexts=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 3, 4, 11]),
    group=st.sampled_from([1, 2, 3, 4, 5, 16]),
    size=st.sampled_from([64, 128]),
    page_size=st.sampled_from([1, 7, 16, 128]),
    seed=st.integers(0, 99),
)
def test_decode_attention(contexts, kv_heads, group, size, page_size, seed):
    width = -(-max(contexts) // page_size)
    num_pages = width * len(contexts) + 3
    keys, values = pools(num_pages * page_size, kv_heads, size, seed)
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randperm(num_pages, generator=generator)[: width * len(contexts)].view(-1, width)
    heads, contexts_B = kv_heads * group, torch.tensor(contexts)
    # As they come from one product with several weights.
    q, k, v = bf16(len(contexts), heads + 2 * kv_heads, size, seed=seed + 2).split([heads, kv_heads, kv_heads], dim=1)
    v = v.clone() if seed % 2 else v  # or not
    last_B = contexts_B - 1
    slots_B = tables.gather(1, (last_B // page_size)[:, None])[:, 0] * page_size + last_B % page_size
    expected_pools = [pool.index_copy(0, slots_B, new) for pool, new in ((keys, k), (values, v))]
    places = PagedPlaces(torch.ones_like(slots_B), contexts_B, tables, slots_B, page_size, torch.device("cpu"))
    expected = decode_sdpa(q.double(), *(pool.double() for pool in expected_pools), *places.padded_slots)
    assert ops.can_attend(q, kv_heads)
    found = ops.decode_attention(q, k, v, keys, values, tables, contexts_B, slots_B, page_size)
    assert distance(found, expected) < 2**-8
    assert torch.equal(keys, expected_pools[0])
    assert torch.equal(values, expected_pools[1])


@settings(max_examples=40)
@given(
    tokens=st.sampled_from([1, 2, 7, 600]),
    heads=st.integers(1, 5),
    size=st.sampled_from([32, 64, 96, 128]),
    scale=st.sampled_from([1.0, 2**-10]),  # epsilon counts for small ones
    seed=st.integers(0, 99),
)
def test_norm_and_rotary(tokens, heads, size, scale, seed):
    norm = RMSNorm(size, 1e-6).bfloat16()
    norm.weight.data = bf16(size, seed=seed)
    assert ops.can_norm(size, norm.weight)
    _, x, _ = (bf16(tokens, heads + 2, size, seed=seed + 1) * scale).split([1, heads, 1], dim=1)
    cos, sin = bf16(tokens, 1, size, seed=seed + 2), bf16(tokens, 1, size, seed=seed + 3)
    normed, its = ops.rms_norm(x, norm.weight, 1e-6), norm(x)
    assert distance(normed, its) < 2**-7  # a step of bfloat16, where the sums differ
    assert (normed != its).double().mean() < 0.01
    rows, more = x[:, 0], bf16(tokens, size, seed=seed + 4) * scale
    total, normed = ops.add_rms_norm(rows, more, norm.weight, 1e-6)
    assert torch.equal(total, rows + more)
    assert torch.equal(normed, ops.rms_norm(rows + more, norm.weight, 1e-6))
    found, expected = ops.norm_rotary(x, norm.weight, 1e-6, cos, sin), apply_rotary(norm(x), cos, sin)
    assert distance(found, expected) < 2**-7
    assert (found != expected).double().mean() < 0.01  # it rounds where they round; a sum in another order may differ


@settings(max_examples=40)
@given(
    new=st.integers(1, 200),
    before=st.integers(0, 300),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 4, 16]),
    size=st.sampled_from([64, 128]),
    seed=st.integers(0, 99),
)
def test_prefill_attention(new, before, kv_heads, group, size, seed):
    total = new + before
    keys, values = pools(total + 5, kv_heads, size, seed)
    *order, apart = torch.randperm(total + 5, generator=torch.Generator().manual_seed(seed))
    slots = torch.stack(order[:total])
    keys[apart] = values[apart] = float("nan")  # what nobody wrote is not read
    q = bf16(new, kv_heads * group, size, seed=seed + 2)
    reference, kernel = extend_sdpa, ops.prefill_attention
    expected = reference(q.double(), keys.double(), values.double(), slots)
    # Probabilities are rounded to bfloat16 before they meet the values, as in every flash attention.
    assert distance(kernel(q, keys, values, slots), expected) < 2**-7


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    size=st.sampled_from([64, 128]),
    tiles=st.booleans(),
    seed=st.integers(0, 99),
)
def test_full_attention(lengths, heads, size, tiles, seed):
    """Also from pieces of one product, with AMX (where it is) and without; a frame gives the same bits in any batch."""
    q, k, v = (bf16(sum(lengths), heads, size, seed=seed + i) for i in range(3))
    frames = zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True)
    expected = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in frame)).transpose(0, 1) for frame in frames]
    actual = ops.full_attention(q, k, v, lengths, tiles)
    assert distance(actual, torch.cat(expected)) < 2**-7
    assert torch.equal(actual, ops.full_attention(*torch.stack([q, k, v], dim=1).unbind(1), lengths, tiles))
    assert torch.equal(actual, ops.full_attention(q, torch.stack([k, k], dim=2)[:, :, 0], v, lengths, tiles))
    first = [x[: lengths[0]] for x in (q, k, v)]
    assert torch.equal(actual[: lengths[0]], ops.full_attention(*first, lengths[:1], tiles))


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("broken", ["key", "value"])
def test_a_patch_that_is_not_finite_stays_in_its_frame(tiles, broken):
    q, k, v = (bf16(70, 2, 64, seed=i) for i in range(3))
    (k if broken == "key" else v)[50] = float("nan")
    assert ops.full_attention(q, k, v, [37, 33], tiles).isnan().flatten(1).any(1).tolist() == [False] * 37 + [True] * 33


@pytest.mark.parametrize("length", [1, 2, 17, 127, 130])
def test_what_scratch_held_before_is_not_used(length, monkeypatch):
    """NaN behind the last token would stay, whatever it is multiplied by."""
    nan = float("nan")
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, size: x.new_full(torch.empty(size).shape, nan))
    q, k, v = (bf16(length, 2, 64, seed=i) for i in range(3))
    assert ops.prefill_attention(q, k, v, torch.arange(length)).isfinite().all()
    assert ops.full_attention(q, k, v, [length]).isfinite().all()


@settings(max_examples=30)
@given(patches=st.integers(1, 99), heads=st.integers(1, 9), size=st.sampled_from([32, 64, 96]), seed=st.integers(0, 99))
def test_rotate_the_bits_of_the_module_and_no_others(patches, heads, size, seed):
    """Of the heads it is given, in rows that are wider."""
    wide = bf16(patches, heads + 2, size, seed=seed, scale=3.0)
    angles = torch.randn(patches, 1, size, generator=torch.Generator().manual_seed(seed)) * 9
    expected = wide.clone()
    expected[:, :heads] = apply_rotary(wide[:, :heads].float(), angles.cos(), angles.sin()).bfloat16()
    ops.rotate_(wide[:, :heads], angles.cos(), angles.sin())
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("count", [1, 15, 33, 70_000])
def test_gelu(count):
    x = bf16(count + 1, seed=0, scale=4.0)
    x[: min(count, 4)] = torch.tensor([0.0, 1e30, -60.0, float("nan")])[:count].bfloat16()
    expected, last = F.gelu(x[:count].double(), approximate="tanh"), x[count].item()
    actual = ops.gelu_tanh_(x[:count])
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-6, equal_nan=True)
    assert x[count].item() == last


@pytest.mark.parametrize("scale", [100.0, 1e5, 1e10])
def test_large_scores_do_not_overflow(scale):
    q = bf16(3, 1, 64, seed=0, scale=scale)
    keys, values = (x * scale for x in pools(203, 1, 64, 1))
    expected = extend_sdpa(q.double(), keys.double(), values.double(), torch.arange(203))
    assert distance(ops.prefill_attention(q, keys, values, torch.arange(203)), expected) < 2**-6
    frame = [x.double().transpose(0, 1) for x in (keys, keys, values)]
    expected = F.scaled_dot_product_attention(*frame).transpose(0, 1)
    for tiles in (True, False):
        assert distance(ops.full_attention(keys, keys, values, [203], tiles), expected) < 2**-6


def test_other_dtypes_and_sizes_are_left_to_torch():
    assert not ops.can_linear(torch.zeros(1, 64), torch.zeros(8, 64))
    assert not ops.can_linear(bf16(1, 48, seed=0), bf16(8, 48, seed=0))
    assert not ops.can_linear(bf16(ops.MAX_LINEAR_ROWS + 1, 64, seed=0), bf16(8, 64, seed=0))
    assert not ops.can_attend(bf16(1, 2, 32, seed=0), 1)
    assert not ops.can_experts(bf16(1, 64, seed=0), bf16(2, 96, 64, seed=0), bf16(2, 64, 48, seed=0))


def test_operators_tell_the_compiler_the_truth():
    x, weight = bf16(3, 64, seed=0), bf16(8, 64, seed=1)
    torch.library.opcheck(torch.ops.q3vl.linear.default, (x, [weight, weight]))
    q = bf16(10, 2, 64, seed=2)
    torch.library.opcheck(torch.ops.q3vl.attend_frames.default, (q, q, q, torch.tensor([0, 4, 10])))
    ids, weights = torch.tensor([[0, 1], [1, 0], [0, 1]]), bf16(3, 2, seed=3)
    experts = (bf16(2, 64, 64, seed=4), bf16(2, 64, 32, seed=5))
    torch.library.opcheck(torch.ops.q3vl.experts.default, (x, weights, ids, *experts, True))
