"""Each end of a link against a peer that a test plays by hand: late answers, stale attempts, second incarnations."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager

import msgspec
import pytest
import torch

from qwen3vl_disagg.core.errors import TransferError
from qwen3vl_disagg.disagg import encode_links
from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers
from qwen3vl_disagg.disagg.control import Connection, ConnectionLost, connect_link
from qwen3vl_disagg.disagg.encode_links import EncodeLinks
from qwen3vl_disagg.disagg.link_server import LinkServer
from qwen3vl_disagg.disagg.links import InProcessLink, in_process_links
from qwen3vl_disagg.disagg.messages import (
    Abort,
    Ack,
    Grant,
    Header,
    HeaderOk,
    LinkAccept,
    LinkHello,
    LinkReady,
    Nack,
    Refused,
)
from qwen3vl_disagg.disagg.receiver import LanguageReceiver
from qwen3vl_disagg.disagg.store import host_store
from tests.support.random_model import small_config
from tests.support.transfer import make_encoded, make_visual

CONFIG = small_config()
VISUAL = make_visual(CONFIG)  # 6 rows
FINGERPRINT = {"protocol": "1"}
TOKEN = "secret"


def run(scenario) -> None:
    async def limited():
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(limited())


async def until(holds, timeout: float = 10) -> None:
    async with asyncio.timeout(timeout):
        while not holds():
            await asyncio.sleep(0.01)


class Language:
    """A link server whose encode ranks are played by the test."""

    def __init__(self, *, rows: int = 8) -> None:
        self.receiver = LanguageReceiver(MultimodalDataBuffers(CONFIG, num_rows=rows, block_size=4), CONFIG)
        self.make_link = in_process_links()
        self.server = LinkServer(
            self.receiver, fingerprint=FINGERPRINT, token=TOKEN, language_rank=1, make_link=self.make_link
        )
        self.items: list[tuple] = []
        self.lost: list[tuple] = []
        self.server.on_item = lambda *event: self.items.append(event)
        self.server.on_lost = lambda *event: self.lost.append(event)
        self.address = ("", 0)

    async def connect(self, encode_rank: int, *, token: str = TOKEN) -> tuple[Connection, InProcessLink]:
        control = await connect_link(self.address, deadline_s=5)
        hello = LinkHello(token=token, encode_rank=encode_rank, pid=os.getpid(), fingerprint=FINGERPRINT)
        await control.send(hello)
        accept = await control.receive(15)
        if isinstance(accept, Refused):
            raise ConnectionLost(accept.field)
        link = self.make_link("encode", encode_rank, 1, accept.epoch)
        assert isinstance(await control.receive(15), LinkReady)
        control.keep_alive()
        return control, link


@asynccontextmanager
async def language(*, rows: int = 8):
    store, _ = host_store("127.0.0.1")
    it = Language(rows=rows)
    it.server.use_store(store)
    it.address = await it.server.serve()
    try:
        yield it
    finally:
        await it.server.close()


async def deliver(control: Connection, link: InProcessLink, grant: Grant, seed: int = 0):
    encoded = make_encoded(CONFIG, seed=seed)
    await control.send(encoded.header(grant))
    answer = await control.receive(15)
    assert isinstance(answer, HeaderOk), answer
    link.send(encoded.payload(grant), 1)
    return encoded


def test_grants_follow_the_order_of_requests_and_room():
    async def scenario():
        async with language(rows=8) as it:  # room for one item
            control, link = await it.connect(0)
            for name in "abc":
                it.server.request(name, 0, 1, VISUAL, 0)
            for seed, name in enumerate("abc"):
                grant = await control.receive(15)
                assert (grant.request_id, grant.attempt) == (name, 1)
                encoded = await deliver(control, link, grant, seed)
                ack = await control.receive(15)
                assert isinstance(ack, Ack)
                assert ack.received == 6
                await until(lambda seed=seed: len(it.items) == seed + 1)
                assert torch.equal(it.items[-1][3].main, encoded.main)
            assert it.receiver.is_idle
            assert not it.lost

    run(scenario)


def test_a_bad_header_is_refused_and_the_link_goes_on():
    async def scenario():
        async with language() as it:
            control, link = await it.connect(0)
            it.server.request("a", 0, 1, VISUAL, 0)
            grant = await control.receive(15)
            header = make_encoded(CONFIG).header(grant)
            await control.send(msgspec.structs.replace(header, total_rows=5))
            nack = await control.receive(15)
            assert isinstance(nack, Nack)
            assert "expected 6, got 5" in nack.reason
            await until(lambda: it.lost)
            assert it.lost[0][:3] == ("a", 0, 1)
            assert it.receiver.is_idle
            it.server.request("a", 0, 2, VISUAL, 0)
            await deliver(control, link, await control.receive(15))
            await until(lambda: it.items)
            assert it.items[0][2].attempt == 2

    run(scenario)


def test_frames_of_an_attempt_that_ended_change_nothing():
    async def scenario():
        async with language() as it:
            control, link = await it.connect(0)
            it.server.request("a", 0, 1, VISUAL, 0)
            old = await control.receive(15)
            it.server.cancel("a")
            assert isinstance(await control.receive(15), Abort)
            it.server.request("a", 0, 2, VISUAL, 0)
            new = await control.receive(15)
            await control.send(make_encoded(CONFIG).header(old))
            assert isinstance(await control.receive(15), Nack)
            await control.send(Abort(request_id="a", item=0, attempt=1, reason="late"))
            await control.send(Nack(request_id="z", item=0, attempt=1, reason="never known"))
            await deliver(control, link, new)
            await until(lambda: it.items)
            assert it.items[0][2].attempt == 2
            assert not it.lost

    run(scenario)


def test_a_request_cancelled_in_mid_payload_gives_nothing_and_leaves_nothing():
    async def scenario():
        async with language() as it:
            control, link = await it.connect(0)
            it.server.request("a", 0, 1, VISUAL, 0)
            it.server.request("b", 0, 1, VISUAL, 0)
            grant = await control.receive(15)
            encoded = make_encoded(CONFIG)
            await control.send(encoded.header(grant))
            assert isinstance(await control.receive(15), HeaderOk)
            it.server.cancel("a")
            assert isinstance(await control.receive(15), Abort)
            assert it.receiver.buffers.allocator.counts("rows") == (0, 0, 2), "not in quarantine"
            link.send(encoded.payload(grant), 1)
            assert isinstance(await control.receive(15), Ack)
            follower = await control.receive(15)
            assert follower.request_id == "b"
            await deliver(control, link, follower, seed=1)
            await until(lambda: it.items)
            assert [event[0] for event in it.items] == ["b"]
            assert it.receiver.is_idle

    run(scenario)


def test_a_lost_link_loses_its_items_and_no_others():
    async def scenario():
        async with language(rows=32) as it:
            first, _ = await it.connect(0)
            second, link = await it.connect(2)
            it.server.request("a", 0, 1, VISUAL, 0)
            it.server.request("b", 0, 1, VISUAL, 2)
            await first.receive(15)
            grant = await second.receive(15)
            started = time.monotonic()
            first.abort()
            await until(lambda: it.lost)
            assert time.monotonic() - started < 8
            assert [event[:3] for event in it.lost] == [("a", 0, 1)]
            await deliver(second, link, grant)
            await until(lambda: it.items)
            assert it.receiver.is_idle

    run(scenario)


@pytest.mark.parametrize("token", ["", "secre", "secret ", "sécret"])
def test_a_wrong_token_is_named_but_not_told(token):
    async def scenario():
        async with language() as it:
            with pytest.raises(ConnectionLost, match=r"^token$"):
                await it.connect(0, token=token)

    run(scenario)


def test_a_second_incarnation_ends_the_first_ones_connection():
    async def scenario():
        async with language() as it:
            first, _ = await it.connect(0)
            await it.connect(0)
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(first.receive(), 3)

    run(scenario)


def test_an_attempt_that_was_replaced_is_not_lost_later():
    async def scenario():
        async with language() as it:
            first, _ = await it.connect(0)
            second, link = await it.connect(2)
            it.server.request("a", 0, 1, VISUAL, 0)
            await first.receive(15)
            it.server.request("a", 0, 2, VISUAL, 2)  # the router gave it to another rank
            await deliver(second, link, await second.receive(15))
            await until(lambda: it.items)
            first.abort()
            await asyncio.sleep(0.3)
            assert it.lost == []

    run(scenario)


@asynccontextmanager
async def encode_side():
    """`EncodeLinks` linked to a language rank that the test plays: (links, its end's connection, payload link)."""
    accepted: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()

    async def accept(reader, writer):
        control = Connection.link(reader, writer)
        assert isinstance(await control.receive(15), LinkHello)
        await control.send(LinkAccept(epoch=1, language_rank=1))
        await control.send(LinkReady())
        if not accepted.done():
            accepted.set_result(control.keep_alive())

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    make_link, changes = in_process_links(), []
    hello = LinkHello(token=TOKEN, encode_rank=0, pid=os.getpid(), fingerprint=FINGERPRINT)
    links = EncodeLinks(hello, on_change=changes.append, on_refused=changes.append)
    links.connect([(1, host, port)], make_link)
    try:
        control = await accepted
        await until(lambda: links.get(1) is not None)
        yield links, control, make_link("language", 0, 1, 1)
    finally:
        await links.close()
        server.close()


def make_grant(request_id: str) -> Grant:
    return Grant(
        request_id=request_id,
        item=0,
        attempt=1,
        row_start=0,
        row_stop=6,
        deepstack_start=0,
        deepstack_stop=6,
        row_runs=[4, 2],
        deepstack_runs=[6],
    )


def test_a_grant_may_come_before_its_item_is_known():
    async def scenario():
        async with encode_side() as (links, control, payload):
            link, grant, encoded = links.get(1), make_grant("a"), make_encoded(CONFIG)
            await control.send(grant)
            await until(lambda: link.answers)
            assert await link.wait_grant(("a", 0, 1), 10) == grant
            delivering = asyncio.create_task(link.deliver(encoded, grant))
            header = await control.receive(15)
            ids = {"request_id": "a", "item": 0, "attempt": 1}
            await control.send(HeaderOk(**ids))
            got = [torch.zeros_like(piece) for piece in encoded.payload(grant)]
            await asyncio.to_thread(payload.receive, got, 5)
            assert torch.equal(torch.cat(got[:2]), encoded.main)
            assert header.digest == encoded.digest
            await control.send(Ack(**ids, received=6))
            await delivering
            assert not link.answers

    run(scenario)


def test_a_dead_language_rank_fails_what_waits_for_it():
    async def scenario():
        async with encode_side() as (links, control, _):
            link = links.get(1)
            waiting = asyncio.create_task(link.wait_grant(("a", 0, 1), 30))
            delivering = asyncio.create_task(link.deliver(make_encoded(CONFIG), make_grant("b")))
            await control.receive(15)
            control.abort()
            for task in (waiting, delivering):
                with pytest.raises(TransferError):
                    await asyncio.wait_for(task, 15)
            assert links.get(1) is not link

    run(scenario)


def test_a_header_that_is_not_answered_in_time_ends_the_link(monkeypatch):
    """The answer may only be late: then the peer waits for this payload and would take the next one for it."""
    monkeypatch.setattr(encode_links, "ANSWER_S", 0.2)

    async def scenario():
        async with encode_side() as (links, control, _):
            link = links.get(1)
            with pytest.raises(TransferError, match="not answered"):
                await link.deliver(make_encoded(CONFIG), make_grant("a"))
            assert isinstance(await control.receive(15), Header)
            control.post(HeaderOk(request_id="a", item=0, attempt=1))  # late
            following = asyncio.create_task(link.deliver(make_encoded(CONFIG, seed=1), make_grant("b")))
            answers = await asyncio.gather(control.receive(2), following, return_exceptions=True)
            assert isinstance(answers[0], ConnectionLost), f"the link goes on with {answers[0]}"

    run(scenario)


def test_a_grant_for_an_attempt_that_was_given_up_is_not_kept():
    async def scenario():
        async with encode_side() as (links, control, _):
            link = links.get(1)
            with pytest.raises(TransferError, match="no room"):
                await link.wait_grant(("a", 0, 1), 0.1)
            link.forget(("a", 0, 1))
            await control.send(make_grant("a"))
            abort = await control.receive(2)  # so that the language rank takes its blocks back
            assert isinstance(abort, Abort)
            assert not link.answers

    run(scenario)
