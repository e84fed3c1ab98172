"""The simulated device itself: it says what a real one says, and leaves nothing behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional as F

from tests.support.simcuda import ASYNC, D2H, DEVICE, H2D, ITEM, SHAPE, STAGED, SimTensor, simulated


def grouped(a: torch.Tensor, b: torch.Tensor, stops: list[int]) -> torch.Tensor:
    return F.grouped_mm(a, b, offs=torch.tensor(stops, dtype=torch.int32, device=DEVICE))


def bf16(*size: int) -> torch.Tensor:
    return torch.ones(*size, device=DEVICE, dtype=torch.bfloat16)


def test_tensors_are_on_it_and_hold_numbers():
    with simulated() as watch:
        for device in ("cuda", "cuda:0", DEVICE):
            x = torch.arange(6.0, device=device).view(2, 3)
            assert isinstance(x, SimTensor)
            assert x.device == DEVICE
        assert (x @ x.T).tolist() == [[5.0, 14.0], [14.0, 50.0]]
        assert x[1, 1:].tolist() == [4.0, 5.0]
        x[0] = 7.0
        y = torch.zeros(2, 3, device=DEVICE).copy_(x)
        assert torch.cat([y, x]).sum().item() == 2 * (21 + 12)
        assert not watch.problems
    assert not torch.cuda.is_available()
    assert type(torch.zeros(2)) is torch.Tensor


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        (H2D, lambda host, x: host.to(DEVICE)),
        (H2D, lambda host, x: host.pin_memory().to(DEVICE)),
        (H2D, lambda host, x: torch.tensor([1, 2], device=DEVICE)),
        (H2D, lambda host, x: x.copy_(host)),
        (H2D, lambda host, x: x[[0, 2]]),
        (H2D, lambda host, x: x.__setitem__(slice(0, 4), host)),
        (STAGED, lambda host, x: host.to(DEVICE, non_blocking=True)),
        (ASYNC, lambda host, x: host.pin_memory().to(DEVICE, non_blocking=True)),
        (ASYNC, lambda host, x: torch.tensor([1.0, 2.0], pin_memory=True)[1:].to(DEVICE, non_blocking=True)),
        (D2H, lambda host, x: x.cpu()),
        (D2H, lambda host, x: x.tolist()),
        (D2H, lambda host, x: host.copy_(x)),
        (ITEM, lambda host, x: bool(x.sum() > 0)),
        (ITEM, lambda host, x: x[0].item()),
        (ITEM, lambda host, x: torch.equal(x, x)),
        (SHAPE, lambda host, x: x.nonzero()),
        (SHAPE, lambda host, x: x[x > 1]),
        (SHAPE, lambda host, x: x.repeat_interleave(x.long())),
    ],
)
def test_each_wait_is_seen(kind, act):
    host = torch.arange(4.0)
    with simulated() as watch:
        x = torch.ones(4, device=DEVICE)
        watch.reset()
        act(host, x)
        assert {name for name, _ in watch.counts} - {kind} <= {D2H}, str(watch)
        assert watch.of(kind) == 1, str(watch)


@pytest.mark.parametrize(
    ("problem", "act"),
    [
        ("on cuda:0 and on the cpu", lambda host, x: x + host),
        ("on cuda:0 and on the cpu", lambda host, x: torch.cat([x, host])),
        ("on cuda:0 and on the cpu", lambda host, x: F.linear(x, host.expand(2, 4))),
        ("on the indexed tensor's device", lambda host, x: host[x.long()]),
        ("pointer", lambda host, x: x.data_ptr()),
        ("pointer", lambda host, x: x.numpy()),
        ("no kernel for CUDA", lambda host, x: torch.ops.q3vl.grouped_experts(x, x, x, x, x)),
        ("BF16", lambda host, x: grouped(torch.ones(2, 8, device=DEVICE), torch.ones(1, 8, 8, device=DEVICE), [2])),
        ("16 bytes", lambda host, x: grouped(bf16(2, 6), bf16(1, 6, 8), [2])),
    ],
)
def test_what_a_device_refuses_is_refused(problem, act):
    with simulated() as watch:
        x = torch.ones(4, device=DEVICE)
        with pytest.raises(RuntimeError, match=problem):
            act(torch.arange(4.0), x)
        assert len(watch.problems) == 1


def test_rows_past_the_last_group_are_what_was_in_memory():
    with simulated():
        out = grouped(bf16(3, 8), bf16(2, 8, 8), [1, 2])
        assert out.isnan().any(1).tolist() == [False, False, True]


def test_threads_that_begin_on_it_are_watched_too():
    with simulated() as watch:
        thread = threading.Thread(target=lambda: torch.ones(3, device=DEVICE).tolist())
        thread.start()
        thread.join(10)
        assert watch.of(D2H) == 1
