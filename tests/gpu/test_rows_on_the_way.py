"""Rows down from a GPU and up into its blocks, each time behind work that is still queued: only events say when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen3vl_disagg.core.copies import Downloads
from tests.simcuda.test_rows_on_the_way import CONFIG, GRID, read, send
from tests.support.simcuda import DEVICE
from tests.support.transfer import Transfer, make_encoded, make_receiver
from tests.transport.test_links import open_pair

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BEHIND = 20_000_000
"""Clock ticks of the device: some 10 ms that a stream is behind the host."""


@pytest.mark.parametrize("kind", ["process_group", "in_process"])
@pytest.mark.parametrize(("rows", "deepstack_rows"), [(16, 16), (4, 16), (8, 4)])
def test_blocks_are_filled_again_only_when_they_have_been_read(kind, rows, deepstack_rows):
    receiver = make_receiver(CONFIG, rows=rows, deepstack_rows=deepstack_rows, device=DEVICE)
    encoded, link = make_encoded(CONFIG, GRID), open_pair(kind)
    encoded = replace(encoded, main=encoded.main.pin_memory(), deepstack=encoded.deepstack.pin_memory())
    transfer, parts = Transfer(receiver, encoded), []
    while not transfer.is_complete:
        here = send(transfer, link)
        torch.cuda._sleep(BEHIND)
        parts.append(read(here, receiver))
        transfer.consume()
    assert torch.equal(torch.cat([main for main, _ in parts]).cpu(), encoded.main)
    assert torch.equal(torch.cat([deepstack for _, deepstack in parts]).cpu(), encoded.deepstack)


def test_what_comes_down_is_what_the_stream_makes_and_nobody_waits_for_it():
    """The memory of what was dropped is not taken by what comes behind, before it has been copied."""
    downloads, found = Downloads(DEVICE), []
    for number in range(8):
        x = torch.zeros(1 << 20, device=DEVICE)
        torch.cuda._sleep(BEHIND)
        x.fill_(number)
        (copy,), event = downloads.start([x])
        found.append((copy, event))
        del x
    assert not found[-1][1].query(), "the host is ahead"
    for number, (copy, event) in enumerate(found):
        event.synchronize()
        assert copy.is_pinned()
        assert (copy == number).all()
