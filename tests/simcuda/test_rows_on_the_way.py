"""Rows between a GPU's tower and a GPU's blocks: each crosses the bus once on either side, on streams of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwen3vl_disagg.core.copies import Arrival, Downloads, Uploads
from qwen3vl_disagg.core.errors import HandshakeError, ServerError, TransferError
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode import worker as encode_worker
from qwen3vl_disagg.encode.link_canary import CheckedRows
from qwen3vl_disagg.encode.pipeline import EncodePipeline
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker, Pixels
from qwen3vl_disagg.language.link_canary import receive_canary
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.transport.buffers import VisualRows
from qwen3vl_disagg.transport.links import Link
from tests.encode.test_encode_pipeline import ask, item_of, pull, until
from tests.support.link_peers import VISUAL
from tests.support.link_scenarios import CONFIG as LINK_CONFIG
from tests.support.random_model import cuda_config, random_vision_model, small_config
from tests.support.simcuda import ASYNC, D2H, DEVICE, EVENT, LATE, WAITS, Watch, simulated, to_device
from tests.support.transfer import Transfer, make_encoded, make_receiver
from tests.transport.test_links import open_pair

CONFIG = small_config()
GRID = (1, 8, 8)


@pytest.fixture
def watch() -> Iterator[Watch]:
    with simulated() as watch:
        yield watch


def send(transfer: Transfer, link: tuple[Link, Link], payload: list[Tensor] | None = None) -> VisualRows:
    """One grant's payload."""
    job = transfer.job()
    with ThreadPoolExecutor(1) as thread:
        given = transfer.encoded.payload(job.grant) if payload is None else payload
        sending = thread.submit(link[0].send, given, 10)
        try:
            rows = transfer.receiver.receive(link[1], job, 10)
        finally:
            sending.result(20)
    transfer.session.received = rows.stop
    return rows


def read(rows: VisualRows, receiver: Receiver) -> tuple[Tensor, Tensor]:
    """As the engine does it: on its stream, without a wait."""
    main = torch.zeros(rows.stop - rows.start, receiver.buffers.hidden_size, device=DEVICE)
    deepstack = torch.zeros(len(main), receiver.buffers.num_levels * main.shape[1], device=DEVICE)
    rows.write(rows.start, rows.stop, main, deepstack)
    return main, deepstack


def whole(transfer: Transfer, link: tuple[Link, Link]) -> tuple[Tensor, Tensor]:
    parts = []
    while not transfer.is_complete:
        parts.append(read(send(transfer, link), transfer.receiver))
        transfer.consume()
    transfer.end()
    return torch.cat([main for main, _ in parts]), torch.cat([deepstack for _, deepstack in parts])


@pytest.mark.parametrize("kind", ["process_group", "in_process"])
@pytest.mark.parametrize(("rows", "deepstack_rows"), [(16, 16), (4, 16), (8, 4)])
def test_each_row_goes_up_once_and_nobody_waits(watch, kind, rows, deepstack_rows):
    """Whole, resumed and ranged: blocks are filled again while nothing but events says that they have been read."""
    receiver = make_receiver(CONFIG, rows=rows, deepstack_rows=deepstack_rows, device=DEVICE)
    encoded, link = make_encoded(CONFIG, GRID), open_pair(kind)
    encoded = replace(encoded, main=encoded.main.pin_memory(), deepstack=encoded.deepstack.pin_memory())
    watch.reset()
    main, deepstack = whole(Transfer(receiver, encoded), link)
    assert watch.of(*WAITS) == 0, str(watch)
    assert watch.of(D2H, LATE) == 0, str(watch)
    assert watch.bytes_of(ASYNC) == encoded.main.nbytes + encoded.deepstack.nbytes
    assert torch.equal(main.cpu(), encoded.main)
    assert torch.equal(deepstack.cpu(), encoded.deepstack)
    assert not watch.problems


@pytest.mark.parametrize("way", ["down", "up"])
def test_without_either_event_it_would_be_chance(watch, way, monkeypatch):
    """Rows are read before they are there; or others are written into their blocks before they are read."""

    def reading(arrival: Arrival) -> AbstractContextManager[None]:
        if way == "up":
            torch.cuda.current_stream(DEVICE).wait_event(arrival.event)
        return nullcontext() if way == "up" else arrival.uploads.reading(torch.cuda.Event())

    monkeypatch.setattr(Arrival, "reading", reading)
    receiver = make_receiver(CONFIG, rows=4, deepstack_rows=16, device=DEVICE)
    with pytest.raises(RuntimeError, match="without an order between them"):
        whole(Transfer(receiver, make_encoded(CONFIG, GRID)), open_pair("process_group"))


def test_nothing_is_uploaded_into_blocks_that_are_not_made_yet(watch, monkeypatch):
    """The current stream zeroes them."""
    receiver = make_receiver(CONFIG, device=DEVICE)
    uploads = Uploads((receiver.buffers.input_embeddings, receiver.buffers.deepstack_embeddings))
    uploads._stream = torch.cuda.Stream(DEVICE)  # one that has not waited
    receiver.buffers.uploads = uploads
    with pytest.raises(RuntimeError, match="writes what stream 0 wrote"):
        whole(Transfer(receiver, make_encoded(CONFIG)), open_pair("process_group"))


def test_a_digest_is_of_the_bytes_that_came_and_wrong_ones_stay_outside(watch):
    """The digest of the blocks themselves would be that of what was there before, or cost a copy."""
    receiver, link = make_receiver(CONFIG, device=DEVICE), open_pair("process_group")
    transfer = Transfer(receiver, make_encoded(CONFIG))
    good = transfer.encoded.payload(transfer.grant())
    watch.reset()
    for number in range(1, len(good)):
        changed = [x.clone() for x in good]
        changed[number].view(torch.uint8).view(-1)[-1] ^= 1
        with pytest.raises(TransferError, match=r"digest of (rows|DeepStack rows)"):
            send(transfer, link, changed)
        torch.cuda.synchronize(DEVICE)
        assert not receiver.buffers.input_embeddings.cpu().any()
    rows = send(transfer, link)
    assert torch.equal(read(rows, receiver)[0].cpu(), transfer.encoded.main)
    assert not watch.problems


def test_a_payload_that_broke_in_the_middle_comes_again(watch):
    """What was uploaded of it is overwritten in its turn."""
    receiver, link = make_receiver(CONFIG, rows=4, deepstack_rows=16, device=DEVICE), open_pair("process_group")
    transfer = Transfer(receiver, make_encoded(CONFIG, GRID))
    read(send(transfer, link), receiver)
    transfer.consume()
    payload = transfer.encoded.payload(transfer.grant())
    with pytest.raises(TransferError):
        send(transfer, link, [*payload[:-1], payload[-1] + 1])
    rest = whole(transfer, link)
    assert torch.equal(rest[0].cpu(), transfer.encoded.main[4:])
    assert not watch.problems


# ---- the encode side ----


def make_worker(watch: Watch) -> EncodeWorker:
    return EncodeWorker(to_device(random_vision_model(cuda_config(), seed=0), watch), None, cuda_config())


def pixels(worker: EncodeWorker, grid: tuple[int, int, int] = (1, 4, 6), value: float = 0.5) -> Pixels:
    return Pixels(torch.full((grid[1] * grid[2], worker.config.vision.patch_dim), value), grid, 0.0)


def test_rows_come_down_once_and_are_what_is_digested_and_sent(watch):
    worker = make_worker(watch)
    expected = [item.arrived() for item in worker.encode([pixels(worker)], [60])]
    watch.reset()
    [leaving] = worker.encode([pixels(worker)], [60])
    item = leaving.arrived()
    assert isinstance(item, EncodedItem)
    assert item.digest == expected[0].digest
    receiver = make_receiver(cuda_config(), device=DEVICE)
    link = open_pair("process_group")
    main, _ = whole(Transfer(receiver, item), link)
    assert watch.of(EVENT) == watch.of(*WAITS) == 2, "for the tower, and for the rows"
    assert watch.bytes_of(LATE) == 1 + item.main.nbytes + item.deepstack.nbytes
    assert torch.equal(main.cpu(), item.main)
    assert not watch.problems


def test_rows_that_nobody_waited_for_are_refused(watch):
    [leaving] = (worker := make_worker(watch)).encode([pixels(worker)], [60])
    with pytest.raises(RuntimeError, match="the host reads what stream 1 wrote"):
        _ = leaving.item.digest
    assert isinstance(leaving.arrived(), EncodedItem)


def test_rows_are_copied_when_the_tower_has_made_them(watch, monkeypatch):
    worker = make_worker(watch)
    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda *_: None)
    with pytest.raises(RuntimeError, match="stream 1 reads what stream 0 wrote"):
        worker._encode_together([pixels(worker)], [60])


def test_the_towers_memory_waits_for_the_copy(watch, monkeypatch):
    """It is free for the next batch when that is done, and not when the tensor is dropped."""
    worker = make_worker(watch)
    worker.encode([pixels(worker)], [60])
    assert not watch.problems
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    worker.encode([pixels(worker)], [60])
    assert watch.problems
    assert all("is freed while stream 1 may use it" in problem for problem in watch.problems)


@pytest.mark.parametrize("number", [0, 1])
def test_rows_that_are_not_finite_fail_alone(watch, number):
    worker = make_worker(watch)
    batch = [pixels(worker), pixels(worker)]
    batch[number].patches[3, 5] = torch.nan
    found = [item.arrived() for item in worker.encode(batch, [60, 60])]
    assert [isinstance(item, ServerError) for item in found] == [number == 0, number == 1]


class Decoded(EncodeWorker):
    """Patches without a picture."""

    def preprocess(self, data, visual, stop=None):
        return pixels(self, visual.grid, float(data) / 10)


@pytest.mark.parametrize("fails", [False, True])
def test_the_tower_takes_its_next_batch_while_rows_leave(watch, monkeypatch, fails):
    """A failure of the copy is told to those who wait for it, and to nobody else."""
    gate, leaving = threading.Event(), []

    def arrived(item: encode_worker.LeavingItem) -> EncodedItem | Exception:
        leaving.append(item)
        if len(leaving) == 1:
            assert gate.wait(20)
            if fails:
                raise RuntimeError("no copy")
        return run_arrived(item)

    run_arrived: Callable = encode_worker.LeavingItem.arrived
    monkeypatch.setattr(encode_worker.LeavingItem, "arrived", arrived)

    async def scenario() -> None:
        worker = Decoded(to_device(random_vision_model(cuda_config(), seed=0), watch), None, cuda_config())
        pipeline = EncodePipeline(worker, pull, EncodeOptions(vision_batch_tokens=0))
        tasks = [ask(pipeline, item_of(f"{number}")) for number in range(3)]
        await until(lambda: pipeline.num_batches == 3 and not pipeline._is_running)
        assert len(leaving) == 1
        assert not any(task.done() for task in tasks)
        gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, RuntimeError) for one in found] == [fails, False, False]
        assert len({one.item.digest for one in found[fails:]}) == len(found[fails:])
        pipeline.close()

    asyncio.run(scenario())
    assert not watch.problems


def test_downloads_do_not_hold_up_what_comes_behind(watch):
    """The tower's stream does not wait for the copies of the batch before."""
    downloads = Downloads(DEVICE)
    first = torch.ones(4, device=DEVICE)
    (host,), event = downloads.start([first])
    torch.ones(4, device=DEVICE).add_(1).tolist()
    assert not event.query()
    event.synchronize()
    assert host.tolist() == [1.0] * 4


@pytest.mark.parametrize("kind", ["process_group", "in_process"])
def test_the_first_rows_of_a_link(watch, kind):
    """Into blocks that live no longer than the check; right ones, and others."""
    like, link = make_receiver(LINK_CONFIG, device=DEVICE), open_pair(kind)
    rows = CheckedRows(VISUAL, make_encoded(LINK_CONFIG))
    wrong = replace(rows, item=make_encoded(LINK_CONFIG, seed=1))
    for sent in (rows, wrong):
        with ThreadPoolExecutor(1) as thread:
            sending = thread.submit(sent.send, link[0], 10 if sent is rows else 1)
            refused = pytest.raises(HandshakeError, match="canary: transfer") if sent is wrong else nullcontext()
            with refused:
                receive_canary(link[1], rows.announcement(), like, 10)
            if sent is rows:
                sending.result(20)
    assert not watch.problems
