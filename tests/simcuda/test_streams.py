"""Streams of the simulated device: what a device would have left to chance is refused."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.support.simcuda import DEVICE, EVENT, LATE, SimTensor, simulated


def other() -> torch.cuda.Stream:
    return torch.cuda.Stream(DEVICE)


def default() -> torch.cuda.Stream:
    return torch.cuda.current_stream(DEVICE)


def ordered_by_event(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    then.wait_event(first.record_event())


def ordered_by_stream(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    then.wait_stream(first)


def ordered_by_host(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    first.synchronize()


def ordered_by_a_third(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    between = other()
    between.wait_stream(first)
    then.wait_event(between.record_event())


def ordered_by_device(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    torch.cuda.synchronize(DEVICE)


def unordered(first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
    then.record_event()  # the other way round
    first.wait_stream(then)


READS = [lambda x: x + 1, lambda x: x[[0, 2]], lambda x: torch.zeros_like(x).copy_(x), lambda x: x.tolist()]
WRITES = [lambda x: x.add_(1), lambda x: x.copy_(torch.ones(4, device=DEVICE)), lambda x: x.__setitem__(1, 2.0)]
USES = [(read, write) for read in READS for write in WRITES] + [(write, read) for read in READS[:3] for write in WRITES]


@pytest.mark.parametrize(
    "order", [ordered_by_event, ordered_by_stream, ordered_by_host, ordered_by_a_third, ordered_by_device, unordered]
)
@pytest.mark.parametrize(("then", "first"), USES)
def test_a_read_and_a_write_on_two_streams_need_an_order(first, then, order):
    with simulated() as watch:
        x = torch.zeros(4, device=DEVICE)
        stream = other()
        stream.wait_stream(default())
        with torch.cuda.stream(stream):
            first(x)
        if first is READS[3]:  # the host has waited for it
            order = ordered_by_host
        order(stream, default())
        if order is unordered:
            with pytest.raises(RuntimeError, match="without an order between them"):
                then(x)
        else:
            then(x)
        x.record_stream(stream)
        assert len(watch.problems) == (order is unordered)


def test_reads_and_what_lies_elsewhere_need_none():
    with simulated() as watch:
        x = torch.zeros(8, 4, device=DEVICE)
        torch.cuda.synchronize(DEVICE)
        stream = other()
        with torch.cuda.stream(stream):
            x[:4].add_(1)
            total = x[6:].sum()
            x.new_empty(2), torch.zeros_like(x)
        x[4:6].add_(1)
        assert x[6:].sum().item() == 0
        with pytest.raises(RuntimeError, match="without an order"):
            x[3:5].add_(1)
        stream.synchronize()
        assert total.item() == 0
        assert len(watch.problems) == 1


def test_an_event_is_of_what_was_queued_when_it_was_recorded():
    with simulated():
        x, stream = torch.zeros(4, device=DEVICE), other()
        stream.wait_stream(default())
        event = stream.record_event()
        with torch.cuda.stream(stream):
            x.add_(1)
        default().wait_event(event)
        with pytest.raises(RuntimeError, match="without an order"):
            x.add_(1)
        assert not stream.query()
        event = stream.record_event()
        assert not event.query()
        event.synchronize()
        assert event.query()
        assert x.add_(1).tolist() == [2.0] * 4


def test_what_is_downloaded_is_garbage_until_the_host_has_waited():
    with simulated() as watch:
        x = torch.arange(4.0, device=DEVICE)
        host = torch.empty(4, pin_memory=True)
        host.copy_(x, non_blocking=True)
        assert watch.of(LATE) == 1
        assert watch.bytes_of(LATE) == 16
        with pytest.raises(RuntimeError, match="the host reads what stream 0 wrote"):
            host.sum()
        with pytest.raises(RuntimeError, match="the host writes what stream 0 wrote"):
            host[1:].zero_()
        assert host.numpy()[0] != 0.0, "also by ways that nobody watches"
        default().record_event().synchronize()
        assert watch.of(EVENT) == 1
        assert host.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_what_is_uploaded_stays_as_it_is_until_the_device_has_read_it():
    with simulated() as watch:
        host = torch.ones(4).pin_memory()
        x = host.to(DEVICE, non_blocking=True)
        with pytest.raises(RuntimeError, match="the host writes what stream 0 reads"):
            host.add_(1)
        host.numpy()[0] = 5.0  # as a receive would
        assert x.tolist() == [1.0] * 4
        assert watch.problems[1].startswith("pinned memory was written before its upload had run")
        host.add_(1)


@pytest.mark.parametrize("is_known", [False, True])
def test_memory_that_another_stream_still_uses_must_not_go_back(is_known):
    with simulated() as watch:
        x, stream = torch.ones(4, device=DEVICE), other()
        stream.wait_stream(default())
        host = torch.empty(4, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
        if is_known:
            x.record_stream(stream)
        assert isinstance(x, SimTensor)
        del x
        gc.collect()
        assert ["may use it" in problem for problem in watch.problems] == [True] * (not is_known)
        stream.synchronize()
        assert host.tolist() == [1.0] * 4


def test_threads_have_their_own_current_stream_and_nothing_is_left_behind():
    from threading import Thread

    kinds = (torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream, torch.cuda.current_stream)
    with simulated():
        seen, stream = [], other()
        with torch.cuda.stream(stream):
            thread = Thread(target=lambda: seen.append(torch.cuda.current_stream(DEVICE).number))
            thread.start()
            thread.join(10)
            assert torch.cuda.current_stream(DEVICE).number == stream.number
        assert seen == [0] == [default().number]
    assert kinds == (torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream, torch.cuda.current_stream)
