"""What PyTorch does between the matrix products of a decode step, as kernels, against PyTorch; and the tape."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.kernels import build, ops
from qwen3vl_disagg.kernels.calls import NotRecordable, Tape, num_threads
from qwen3vl_disagg.model.moe import route
from qwen3vl_disagg.model.rope import mrope_axes
from tests.support.quantize import quantize_tensor

pytestmark = pytest.mark.skipif(build.load() is None, reason="no AVX-512 BF16 or no C++ compiler")
INF, NAN = float("inf"), float("nan")


def bf16(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 300),
    choices=st.integers(1, 9),
    steps=st.sampled_from([1, 4, 1000]),
    seed=st.integers(0, 999),
)
def test_route(tokens, experts, choices, steps, seed):
    """With few different logits, most of which are equal: then it takes the same ones of these as PyTorch."""
    logits = (bf16(tokens, experts, seed=seed).float() * steps).round().div(steps).mul(3).bfloat16()
    choices = min(choices, experts)
    weights, ids = ops.route(logits, choices)
    expected, expected_ids = route(logits, choices)
    assert torch.equal(ids, expected_ids)
    assert (weights.float() - expected.float()).abs().max() <= 2**-8
    assert (weights.float().sum(-1) - 1).abs().max() < 0.02


@given(tokens=st.integers(1, 9), last=st.sampled_from([9, 5_000, 262_143]), yarn=st.booleans(), seed=st.integers(0, 99))
def test_text_rotary(tokens, last, yarn, seed):
    positions = torch.randint(0, last + 1, (3, tokens), generator=torch.Generator().manual_seed(seed))
    frequencies, axes = 1e6 ** -(torch.arange(32) / 32), torch.tensor(mrope_axes(32, (12, 10, 10)))
    factor = 1.2 if yarn else 1.0
    cos, sin = ops.text_rotary(positions, frequencies, axes, factor)
    angles = (positions[axes].float() * frequencies[:, None]).T.double().repeat(1, 2)[:, None]
    for actual, exact in ((cos, angles.cos()), (sin, angles.sin())):
        assert actual.shape == (tokens, 1, 64)
        assert ((actual.double() - factor * exact).abs() <= 2**-8 * factor * exact.abs() + 1e-6).all()


@given(
    rows=st.integers(1, 5),
    size=st.integers(3, 80),
    steps=st.sampled_from([1, 100]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_largest(rows, size, steps, seed, data):
    logits = (bf16(rows, size, seed=seed).float() * steps).round().bfloat16()
    ids = st.integers(0, size - 1)
    banned, more = data.draw(st.sets(ids, max_size=2)), data.draw(st.sets(ids, max_size=min(2, size - 3)))
    if len(banned | more) == size:
        more = set()
    has_more = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    for row, has in zip(masked := logits.float(), has_more, strict=True):
        row[[*banned, *(more if has else ())]] = -INF
    assert ops.largest(logits, sorted(banned), sorted(more), has_more) == masked.argmax(-1).tolist()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("place", [0, 3, 16, 36])
def test_a_row_with_a_number_that_is_not_finite_has_no_largest(value, place):
    logits = bf16(3, 37, seed=1)
    logits[1, place] = value
    found = ops.largest(logits, [3], [16], [True, True, True])
    assert found[1] == -1
    assert min(found[0], found[2]) >= 0


def test_what_the_kernels_do_not_take():
    with pytest.raises(ValueError, match="up to 1024 experts"):
        ops.route(bf16(2, 1025, seed=0), 2)
    with pytest.raises(ValueError, match="up to 1024 experts"):
        ops.route(bf16(2, 4, seed=0), 5)
    with pytest.raises(ValueError, match="a flag for each row"):
        ops.largest(bf16(2, 4, seed=0), [], [], [False])
    assert ops.largest(bf16(1, 4, seed=0), [-1, 4], [2**40], [True]) == [int(bf16(1, 4, seed=0).argmax())]
    with pytest.raises(ValueError, match="three axes"):
        ops.text_rotary(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2), torch.zeros(2, dtype=torch.int64), 1.0)


# ---- the tape ----


ONES = torch.ones(64, dtype=torch.bfloat16)


def layers(x: torch.Tensor, embedding: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x + torch.embedding(embedding, ids)
    x, y = ops.add_rms_norm(x, ops.rms_norm(x, ONES, 1e-6), ONES, 1e-6)
    y = ops.linear(x + y, [weight, weight])
    first, second = y.split([64, 64], dim=-1)
    return ops.swiglu(first, second)


@given(rows=st.integers(1, 9), threads=st.sampled_from([1, 2, 5]), seed=st.integers(0, 99))
def test_a_tape_for_any_number_of_rows_is_what_was_recorded(rows, threads, seed):
    x, embedding, weight = (bf16(*shape, seed=seed) for shape in ((9, 64), (20, 64), (64, 64)))
    ids = torch.arange(9)
    tape = Tape(9)
    with tape.record():
        out = layers(x, embedding, ids, weight)
    assert tape.num_calls == 7
    x.copy_(bf16(9, 64, seed=seed + 1))
    ids.copy_(torch.randint(0, 20, (9,), generator=torch.Generator().manual_seed(seed)))
    out.fill_(7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tape.run(rows)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out[:rows], layers(x[:rows], embedding, ids[:rows], weight))
    assert (out[rows:] == 7).all()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda x: torch.relu(x), "relu"),
        (lambda x: x[1:] + x[1:], "slice"),
        (lambda x: x.T.unsqueeze(0).flatten(0, 1) + 1, "aten"),
        (lambda x: x.unflatten(1, (2, 32)).transpose(0, 1).flatten(0, 1), "aten"),
        (lambda x: x.split([2, 2]), "split"),
        (lambda x: x + 1, "aten.add"),
        (lambda x: x + x[:1], "aten"),
        (lambda x: ops.rms_norm(x[:2], ONES, 1e-6), "aten"),
        (lambda x: ops.gelu_tanh_(x), "gelu_tanh"),
    ],
)
def test_what_no_kernel_does_is_refused_by_name(step, said):
    x, tape = bf16(4, 64, seed=0), Tape(4)
    with pytest.raises(NotRecordable, match=said), tape.record():
        step(x)
    assert tape.num_calls == 0
    with Tape(4).record():  # and recording is over
        pass


def test_a_kernel_for_other_rows_is_refused():
    x = bf16(3, 64, seed=0)
    with pytest.raises(NotRecordable, match="rms_norm"), Tape(4).record():
        ops.rms_norm(x, ONES, 1e-6)


def test_what_other_threads_do_meanwhile_is_none_of_its_business():
    x, its_own = bf16(4, 64, seed=0), bf16(9, 64, seed=1)
    tape = Tape(4)
    with tape.record():
        other = threading.Thread(target=lambda: ops.rms_norm(its_own, ONES, 1e-6))
        other.start()
        other.join(20)
        ops.rms_norm(x, ONES, 1e-6)
        with pytest.raises(RuntimeError, match="another tape"), Tape(4).record():
            pass
    assert tape.num_calls == 1


@pytest.mark.parametrize("rows", [0, 5, -1])
def test_rows_that_were_not_recorded(rows):
    x, tape = bf16(4, 64, seed=0), Tape(4)
    with tape.record():
        ops.rms_norm(x, ONES, 1e-6)
    with pytest.raises(ValueError, match="1 to 4 rows"):
        tape.run(rows)


def test_scratch_is_there_for_all_threads_that_may_come():
    num_cpus = len(os.sched_getaffinity(0))
    weight, scale = quantize_tensor(bf16(8 * num_cpus, 64, seed=1).float())
    x = bf16(9, 64, seed=0)  # rows enough for a kernel that widens weights in scratch
    tape = Tape(9)
    with tape.record():
        assert num_threads() >= num_cpus
        out = torch.ops.q3vl.linear_int8(x, weight, scale)
    expected = out.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(4 * num_cpus)
    try:
        out.zero_()
        tape.run(9)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, expected)


def test_calls_share_their_scratch():
    weight, scale = quantize_tensor(bf16(64, 64, seed=1).float())
    x, tape = bf16(9, 64, seed=0), Tape(9)
    with tape.record():
        y = x
        for _ in range(3):
            y = torch.ops.q3vl.linear_int8(y, weight, scale)
    expected = y.clone()
    tape.run(9)
    assert torch.equal(y, expected)
    words = [tape._words[i : i + 20] for i in range(0, 60, 20)]
    assert len({call[4] for call in words}) == 1
    assert len({call[5] for call in words}) == 3
