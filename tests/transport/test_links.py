"""One contract for every payload transport, and what is special about the process-group one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from qwen3vl_disagg.transport import links
from qwen3vl_disagg.transport.gloo import _form
from qwen3vl_disagg.transport.links import InProcessLink, LinkBroken, in_process_links, process_group_links

HOSTS = {"process_group": "127.0.0.1", "process_group over IPv6": "::1"}
KINDS = [*HOSTS, "in_process"]


def swaps():
    """Of both ends."""
    said = Future[bytes](), Future[bytes]()

    def swap_of(end: int):
        def swap(ours: bytes) -> bytes:
            said[end].set_result(ours)
            return said[1 - end].result(10)

        return swap

    return swap_of(0), swap_of(1)


def open_pair(kind: str, *, encode_rank: int = 0, epoch: int = 1):
    """(encode end, language end)"""
    make = in_process_links() if kind == "in_process" else process_group_links(HOSTS[kind], timeout_s=10)
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(make, side, encode_rank, 1, epoch, swap)
            for side, swap in zip(("encode", "language"), swaps(), strict=True)
        ]
        return tuple(end.result(20) for end in ends)


@pytest.fixture(params=KINDS)
def pair(request):
    return open_pair(request.param)


def payload(seed: int, rows: int = 5) -> list[torch.Tensor]:
    """Every dtype that travels, any bits."""
    generator = torch.Generator().manual_seed(seed)

    def bits(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        *outer, last = shape
        raw = torch.randint(0, 256, (*outer, last * dtype.itemsize), generator=generator, dtype=torch.uint8)
        return raw.view(dtype)

    return [
        bits(rows, 16, dtype=torch.float32),
        bits(rows, 8, dtype=torch.bfloat16),
        bits(rows, dtype=torch.int32),
        bits(8, dtype=torch.int64),
        bits(1, 3, dtype=torch.int32),
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def transfer(pair, sent, *, timeout: float = 10) -> list[torch.Tensor]:
    got = [torch.zeros_like(tensor) for tensor in sent]
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(pair[0].send, sent, timeout)
        here = list(pair[1].receive(got, timeout))
        sending.result(timeout)
    assert len(here) == len(sent)
    return here


def test_transfers_arrive_bit_for_bit_and_in_order(pair):
    for seed in range(4):
        sent = payload(seed, rows=1 + seed)
        assert all(same_bits(a, b) for a, b in zip(transfer(pair, sent), sent, strict=True))


def test_several_transfers_may_be_sent_before_the_first_is_received(pair):
    batches = [payload(seed) for seed in range(3)]
    got = [[torch.zeros_like(tensor) for tensor in batch] for batch in batches]
    with ThreadPoolExecutor(1) as thread:
        sending = [thread.submit(pair[0].send, batch, 10) for batch in batches]
        time.sleep(0.1)
        here = [list(pair[1].receive(batch, 10)) for batch in got]
        for future in sending:
            future.result(10)
    for mine, theirs in zip(here, batches, strict=True):
        assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))


def test_each_tensor_is_handed_out_in_its_turn_before_the_next_is_there(pair):
    """What is here can be checked while the rest is on its way."""
    seen = []
    with ThreadPoolExecutor(1) as thread:
        sent = payload(1)
        sending = thread.submit(pair[0].send, sent, 10)
        receiving = pair[1].receive([torch.zeros_like(tensor) for tensor in sent], 10)
        for tensor in receiving:
            assert same_bits(tensor, sent[len(seen)])
            seen.append(tensor)
        sending.result(10)
    assert len(seen) == len(sent)
    with pytest.raises(StopIteration):
        next(receiving)


def test_a_receive_that_is_closed_early_still_takes_the_whole_payload(pair):
    """Whoever finds the first tensor wrong goes away; the next payload must not meet the rest of this one."""
    first, second = payload(1), payload(2)
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(lambda: [pair[0].send(batch, 10) for batch in (first, second)])
        receiving = pair[1].receive([torch.zeros_like(tensor) for tensor in first], 10)
        assert same_bits(next(receiving), first[0])
        receiving.close()
        here = list(pair[1].receive([torch.zeros_like(tensor) for tensor in second], 10))
        sending.result(10)
    assert all(same_bits(a, b) for a, b in zip(here, second, strict=True))


def test_a_closed_receive_returns_only_when_nothing_will_be_written_any_more():
    """Blocks go back to the pool after that."""
    ends = open_pair("process_group")
    sent = [torch.full((4,), 1.0), torch.full((2**20,), 2.0)]
    got = [torch.zeros_like(tensor) for tensor in sent]

    def send_slowly():
        ends[0].send(sent[:1], 10)
        time.sleep(0.3)
        ends[0].send(sent[1:], 10)

    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(send_slowly)
        receiving = ends[1].receive(got, 10)
        next(receiving)
        receiving.close()
        assert (got[1] == 2).all()
        sending.result(10)


def test_a_closed_receive_that_is_never_filled_ends_at_its_timeout():
    ends = open_pair("process_group")
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(ends[0].send, [torch.ones(4)], 10)
        started = time.monotonic()
        receiving = ends[1].receive([torch.zeros(4), torch.zeros(4)], 0.5)
        next(receiving)
        with pytest.raises(LinkBroken):
            receiving.close()
        assert 0.3 < time.monotonic() - started < 20
        sending.result(10)


def test_in_process_the_very_same_tensors_are_handed_out():
    pair, sent = open_pair("in_process"), payload(3)
    pool = [torch.zeros_like(tensor) for tensor in sent]
    pair[0].send(sent, 1)
    here = list(pair[1].receive(pool, 1))
    assert [tensor.data_ptr() for tensor in here] == [tensor.data_ptr() for tensor in sent]
    assert not any(tensor.view(torch.uint8).any() for tensor in pool), "something was copied"


def test_over_a_process_group_the_given_tensors_are_handed_out():
    pair, sent = open_pair("process_group"), payload(3)
    pool = [torch.zeros_like(tensor) for tensor in sent]
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(pair[0].send, sent, 10)
        here = list(pair[1].receive(pool, 10))
        sending.result(10)
    assert [tensor.data_ptr() for tensor in here] == [tensor.data_ptr() for tensor in pool]


def test_a_payload_of_nothing_passes(pair):
    assert transfer(pair, []) == []


def test_large_pieces_land_in_slices_and_nowhere_else():
    ends = open_pair("process_group")
    sent = torch.randn(3, 2**20, generator=torch.Generator().manual_seed(0))  # 4 MiB a row
    pool = torch.zeros(5, 2**20)
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(ends[0].send, [sent[:1], sent[1:]], 10)
        list(ends[1].receive([pool[3:4], pool[0:2]], 10))
        sending.result(10)
    assert torch.equal(pool[[3, 0, 1]], sent)
    assert not pool[[2, 4]].any()


def test_a_receive_ends_at_its_timeout_when_nothing_is_sent(pair):
    started = time.monotonic()
    with pytest.raises(LinkBroken):
        list(pair[1].receive(payload(0), 0.3))
    assert 0.2 < time.monotonic() - started < 20


def test_a_send_ends_at_its_timeout_when_nobody_receives():
    ends = open_pair("process_group")
    started = time.monotonic()
    with pytest.raises(LinkBroken):
        ends[0].send([torch.zeros(2**22)], 0.3)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("kind", ["process_group", "in_process"])
def test_closing_twice_is_harmless(kind):
    ends = open_pair(kind)
    for end in (*ends, *ends):
        end.close()


def test_a_closed_link_is_broken():
    ends = open_pair("process_group")
    ends[1].close()
    with pytest.raises(LinkBroken, match="closed"):
        list(ends[1].receive(payload(0), 1))
    ends[0].close()
    with pytest.raises(LinkBroken, match="closed"):
        ends[0].send(payload(0), 1)


def test_what_was_not_agreed_on_is_refused_in_process():
    """A process group cannot notice; that is why sizes are agreed before."""
    for wrong in ([torch.zeros(3)], [torch.zeros(4, dtype=torch.int32)]):
        link = InProcessLink()
        link.send([torch.ones(4)], 1)
        with pytest.raises(LinkBroken):
            list(link.receive(wrong, 1))


def test_a_wrong_number_of_tensors_breaks_the_link_in_process():
    link = InProcessLink()
    link.send([torch.ones(4)], 1)
    with pytest.raises(LinkBroken):
        list(link.receive([torch.zeros(4), torch.zeros(4)], 1))


def test_a_link_that_is_closed_wakes_whoever_waits_in_process():
    link = InProcessLink()
    link.send([torch.ones(4)], 1)
    closing = threading.Timer(0.2, link.close)
    closing.start()
    assert len(list(link.receive([torch.zeros(4)], 1))) == 1
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(LinkBroken, match="closed"):
            list(link.receive([torch.zeros(4)], 20))
    assert time.monotonic() - started < 10
    closing.join()


def test_one_broken_link_leaves_the_others_alone():
    first, second = (open_pair("process_group", encode_rank=rank) for rank in (0, 1))
    with pytest.raises(LinkBroken):
        list(first[1].receive(payload(0), 0.1))
    sent = payload(1)
    assert all(same_bits(a, b) for a, b in zip(transfer(second, sent), sent, strict=True))
    again = open_pair("process_group", encode_rank=0, epoch=2)
    assert all(same_bits(a, b) for a, b in zip(transfer(again, sent), sent, strict=True))


@pytest.mark.parametrize("host", HOSTS.values())
@pytest.mark.parametrize("port", [1, 65535])
def test_no_group_without_the_other_end(host, port):
    """It has said where it is, and is not there: whichever of the two would have to connect."""

    def swap(ours: bytes) -> bytes:
        at = ours.index(b"\x88" + bytes(7)) + 10
        return ours[:at] + port.to_bytes(2, "big") + ours[at + 2 :]

    started = time.monotonic()
    with pytest.raises(LinkBroken, match="link 0-1, epoch 1: RuntimeError"):
        process_group_links(host, timeout_s=1)("encode", 0, 1, 1, swap)
    assert (0.0 if port == 1 else 0.8) < time.monotonic() - started < 4  # refused at once, or waited for


WRONG = {
    "nothing": lambda ours: b"",
    "zeros": lambda ours: bytes(len(ours)),
    "ones": lambda ours: b"\xff" * len(ours),
    "no address": lambda ours: b"somewhere",
    "cut": lambda ours: ours[:-1],
    "longer": lambda ours: ours + bytes(8),
    "a name beyond the end": lambda ours: (2**63).to_bytes(8, "little") + ours[8:],
    "another family": lambda ours: ours.replace(b"\x88" + bytes(7) + b"\2", b"\x88" + bytes(7) + b"\1", 1),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_no_address_does_not_reach_gloo(wrong):
    """Which trusts its lengths."""
    with pytest.raises(LinkBroken, match="are no address like this end"):
        process_group_links("127.0.0.1", timeout_s=1)("encode", 0, 1, 1, wrong)


def test_another_host_s_name_is_none_of_the_form():
    def swap(ours: bytes) -> bytes:
        size = int.from_bytes(ours[:8], "little")
        raise KeyError(_form((size + 3).to_bytes(8, "little") + b"abc" + ours[8:]) == _form(ours))

    with pytest.raises(KeyError, match="True"):
        process_group_links("127.0.0.1", timeout_s=1)("encode", 0, 1, 1, swap)


_DIES_IN_MID_PAYLOAD = """
import os, torch
from qwen3vl_disagg.transport.links import process_group_links

def swap(ours):
    print(ours.hex(), flush=True)
    return bytes.fromhex(input())

link = process_group_links("127.0.0.1")("encode", 0, 1, 1, swap)
link.send([torch.full((2**20,), 7.0)], 10)
print("sent", flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("timeout", "still_s"), [(2.0, 10.0), (60.0, 0.5)])
def test_a_sender_killed_in_mid_payload_costs_the_receiver_its_timeout_and_no_more(monkeypatch, timeout, still_s):
    """Nor all of a long one: what stands still is given up after a tensor's share of it, of sixteen here 3.75 s."""
    monkeypatch.setattr(links, "STILL_S", still_s)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    sender = subprocess.Popen([sys.executable, "-c", _DIES_IN_MID_PAYLOAD], **pipes)

    def swap(ours: bytes) -> bytes:
        print(ours.hex(), file=sender.stdin)
        return bytes.fromhex(sender.stdout.readline())

    try:
        link = process_group_links("127.0.0.1", timeout_s=60)("language", 0, 1, 1, swap)
        first, *others = (torch.zeros(2**20) for _ in range(16))
        started = time.monotonic()
        with pytest.raises(LinkBroken):
            list(link.receive([first, *others], timeout))
        assert time.monotonic() - started < 15
        assert (first == 7).all()
        assert sender.wait(10) == -9
    finally:
        sender.kill()
