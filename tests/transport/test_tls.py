"""TLS between ranks: who is let in, who is told what, what a stranger costs, and files that are of no use."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_disagg.cluster.hub_client import ask_to_end, enter_hub
from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.encode import links
from qwen3vl_disagg.encode.links import EncodeLinks
from qwen3vl_disagg.parallel.lockstep import Lockstep, PaceLimits, PeerHello
from qwen3vl_disagg.parallel.lockstep_link import Gathering, LockstepClient, LockstepServer, PeerLost, say_hello
from qwen3vl_disagg.protocol.messages import EndJob, FindStore, HubMessage, LinkHello, LinksUp, Message, RankHello
from qwen3vl_disagg.transport import control, doorkeeper
from qwen3vl_disagg.transport.control import MAX_HUB_FRAME, Connection, ConnectionLost, connect_hub, encode_frame
from qwen3vl_disagg.transport.doorkeeper import MAX_STRANGERS, Doorkeeper
from qwen3vl_disagg.transport.opening import MAX_HANDSHAKE_BYTES
from qwen3vl_disagg.transport.refusals import MAX_HOSTS, SAY_AGAIN_S, Refusals
from qwen3vl_disagg.transport.sockets import Address, listen
from qwen3vl_disagg.transport.tls import FIELD, Tls
from qwen3vl_disagg.transport.tls_streams import TlsEnd
from tests.support.certificates import Authority, Signed
from tests.support.fake_ranks import FINGERPRINT, TOKEN, WAIT_S, in_loop

MIB = 2**20
HELLO = RankHello(token=TOKEN, role="encode", rank=0, pid=1, fingerprint=FINGERPRINT)


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def ours(authority) -> Signed:
    return authority.sign("rank")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Signed:
    return Authority(tmp_path_factory.mktemp("theirs")).sign("rank")


@asynccontextmanager
async def door(
    tls: Tls | None, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[Doorkeeper, Address, asyncio.Queue[tuple[Message, Connection]]]]:
    """Those whom it let in stay until the end of the block."""
    let_in, over = asyncio.Queue[tuple[Message, Connection]](), asyncio.Event()

    async def serve(first: Message, connection: Connection) -> None:
        let_in.put_nowait((first, connection))
        await over.wait()

    sock = listen(host)
    keeper = Doorkeeper(sock, serve, token=TOKEN, messages=HubMessage, max_frame=MAX_HUB_FRAME, name="hub", tls=tls)
    try:
        yield keeper, sock.getsockname()[:2], let_in
    finally:
        over.set()
        keeper.close()
        await keeper.wait_closed()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def strangers(address: Address, count: int, data: bytes) -> list[socket.socket]:
    """Each sends as much of it as goes."""
    made = []
    for _ in range(count):
        sock = socket.create_connection(address, timeout=WAIT_S)
        sock.setblocking(False)
        sock.send(data)
        made.append(sock)
    return made


async def relay_to(address: Address, change: Callable[[bytes], bytes]) -> asyncio.Server:
    """What goes through it, either way, goes through `change`."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                writer.write(change(data))
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*address)
        await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer))

    return await asyncio.start_server(relay, "127.0.0.1", 0)


def client_hello(signed: Signed) -> bytes:
    session = TlsEnd(signed.tls().context(is_server=False), is_server=False)
    assert not session.advance()
    return session.to_send()


async def alone(keeper: Doorkeeper) -> None:
    async with asyncio.timeout(WAIT_S):
        while keeper.num_strangers:
            await asyncio.sleep(0.005)


# ---- who is let in ----


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@in_loop
async def test_both_ends_of_one_ca_exchange_messages_and_bytes(ours, authority, host):
    """Also 48 MiB to a peer that reads late, of which no more than a slice waits here."""
    data = bytes(range(256)) * (24 * MIB // 256)
    async with door(ours.tls(), host) as (_, address, let_in):
        peer = await connect_hub(address, deadline_s=WAIT_S, tls=authority.sign("other").tls())
        assert peer.peer == address
        await peer.send(FindStore(token=TOKEN))
        first, connection = await let_in.get()
        assert first == FindStore(token=TOKEN)
        large = LinksUp(language_ranks=list(range(100_000)))
        await asyncio.gather(peer.send(large), connection.receive(WAIT_S))
        sending = asyncio.create_task(connection.send_bytes(data, WAIT_S))
        await asyncio.sleep(0.1)
        assert not sending.done()
        assert connection._writer.transport.get_write_buffer_size() <= 640 * 1024
        assert await peer.receive_bytes(len(data), WAIT_S) == data
        await sending
        await peer.close()
        with pytest.raises(ConnectionLost):
            await connection.receive(WAIT_S)


@in_loop
async def test_nothing_of_ours_is_readable_on_the_wire(ours):
    """A relay between the two sees neither the token nor that there is one."""
    async with door(ours.tls()) as (_, address, let_in):
        seen = bytearray()

        def look(data: bytes) -> bytes:
            seen.extend(data)
            return data

        server = await relay_to(address, look)
        peer = await connect_hub(server.sockets[0].getsockname()[:2], deadline_s=WAIT_S, tls=ours.tls())
        await peer.send(FindStore(token=TOKEN))
        await let_in.get()
        assert len(seen) > 500
        assert TOKEN.encode() not in seen
        assert b"token" not in seen
        await peer.close()
        server.close()


@in_loop
async def test_bytes_that_the_wire_changed_end_the_connection_and_accuse_no_certificate(ours):
    """The other end says so with an alert (bad record); who gets it tries again, as after any lost connection."""
    async with door(ours.tls()) as (_, address, let_in):
        num_bad: list[int] = []

        def once(data: bytes) -> bytes:
            return data[:-1] + bytes([data[-1] ^ num_bad.pop()]) if num_bad else data

        server = await relay_to(address, once)
        peer = await connect_hub(server.sockets[0].getsockname()[:2], deadline_s=WAIT_S, tls=ours.tls())
        await peer.send(FindStore(token=TOKEN))
        _, connection = await let_in.get()
        num_bad.append(1)
        await connection.send(LinksUp(language_ranks=[0]))
        for end in (peer, connection):
            with pytest.raises(ConnectionLost):
                await end.receive(WAIT_S)
        server.close()


@in_loop
async def test_a_certificate_of_another_ca_is_refused_on_both_sides_and_said_once(ours, theirs, caplog):
    async with door(ours.tls()) as (keeper, address, let_in):
        for _ in range(3):
            with pytest.raises(HandshakeError, match="does not confirm"):
                await connect_hub(address, deadline_s=WAIT_S, tls=theirs.tls())
        # One that believes everything: it is told by the hub, after its own handshake has ended.
        lax = theirs.tls()
        lax._client.verify_mode = 0  # type: ignore[assignment]
        with pytest.raises(HandshakeError, match="does not know the CA"):
            await enter_hub(address, HELLO, deadline_s=WAIT_S, tls=lax)
        await alone(keeper)
        assert let_in.qsize() == 0
    said = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("hub: refused a peer at 127.0.0.1: it ")


@in_loop
async def test_without_a_certificate_nobody_comes_in(ours, caplog):
    bare = ours.tls()
    bare._client = _trusting_only(ours)
    async with door(ours.tls()) as (_, address, let_in):
        with pytest.raises(HandshakeError, match="wants a certificate"):
            await enter_hub(address, HELLO, deadline_s=WAIT_S, tls=bare)
        assert let_in.qsize() == 0
    assert "refused a peer at 127.0.0.1: it shows no certificate" in caplog.text


def _trusting_only(signed: Signed) -> Any:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(signed.ca)
    return context


@in_loop
async def test_another_token_inside_is_refused_as_it_is_without_tls(ours):
    async with door(ours.tls()) as (_, address, let_in):
        hello = RankHello(token="x", role="encode", rank=0, pid=1, fingerprint=FINGERPRINT)
        with pytest.raises(HandshakeError, match="token"):
            await enter_hub(address, hello, deadline_s=WAIT_S, tls=ours.tls())
        assert let_in.qsize() == 0


@pytest.mark.parametrize(("at_door", "at_peer", "words"), [(True, False, "speaks no TLS"), (False, True, "speaks TLS")])
@in_loop
async def test_one_side_without_tls_is_told_at_once_on_both(ours, caplog, at_door, at_peer, words):
    async with door(ours.tls() if at_door else None) as (keeper, address, let_in):
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(HandshakeError, match="TLS"):
                await enter_hub(address, HELLO, deadline_s=WAIT_S, tls=ours.tls() if at_peer else None)
        assert time.monotonic() - started < doorkeeper.HELLO_S
        await alone(keeper)
        assert let_in.qsize() == 0
    assert caplog.text.count(f"hub: refused a peer at 127.0.0.1: it {words}") == 1


@in_loop
async def test_a_host_that_ends_tells_the_hub_through_tls(ours, theirs, caplog):
    async with door(ours.tls()) as (_, address, let_in):
        await asyncio.to_thread(ask_to_end, address, TOKEN, ours.tls())
        async with asyncio.timeout(WAIT_S):
            assert (await let_in.get())[0] == EndJob(token=TOKEN)
        await asyncio.to_thread(ask_to_end, address, TOKEN, theirs.tls())
    assert "the hub was not told that this node ends: handshake refused: TLS" in caplog.text


@in_loop
async def test_ranks_that_share_experts_gather_and_agree_through_tls(ours, theirs):
    sock = listen("127.0.0.1")
    address = sock.getsockname()[:2]
    gathering = Gathering(sock, token="t", tls=ours.tls())
    with pytest.raises(HandshakeError, match="TLS"):
        await asyncio.to_thread(say_hello, address, PeerHello(token="t", rank=1), theirs.tls())
    lines = [
        await asyncio.to_thread(say_hello, address, PeerHello(token="t", rank=rank), ours.tls()) for rank in range(2)
    ]
    server = LockstepServer(Lockstep(2, PaceLimits(64, 4096), lambda rows, num_rows: "gather"))
    server.serve(await gathering.all(2, WAIT_S))
    clients = [await LockstepClient.join(line, deadline_s=WAIT_S) for line in lines]
    running = [asyncio.create_task(client.run()) for client in clients]
    assert await asyncio.gather(*(client.leave(WAIT_S) for client in clients)) == [True, True]
    await asyncio.gather(*running)
    for client in clients:
        await client.close()
    await server.close()


@in_loop
async def test_a_rank_that_does_not_come_to_the_gathering_is_not_waited_for_longer():
    gathering = Gathering(sock := listen("127.0.0.1"), token="t")
    line = say_hello(sock.getsockname()[:2], PeerHello(token="t", rank=0))
    with pytest.raises(PeerLost, match="1 of 2 language ranks came in"):
        await gathering.all(2, 0.3)
    line.close()


@in_loop
async def test_an_attempt_to_connect_that_hangs_is_given_up_for_another(ours, monkeypatch):
    """As when the network is away: the kernel asks again after 1, 3, 7, 15 and 31 s only."""
    real, num_tried = control.open_streams, 0

    async def hangs_at_first(address: Address, tls: Tls | None) -> Any:
        nonlocal num_tried
        num_tried += 1
        await asyncio.sleep(0.0 if num_tried > 1 else 100 * WAIT_S)
        return await real(address, tls)

    monkeypatch.setattr(control, "open_streams", hangs_at_first)
    monkeypatch.setattr(control, "ATTEMPT_S", 0.1)
    async with door(ours.tls()) as (_, address, _), asyncio.timeout(WAIT_S):
        peer = await connect_hub(address, deadline_s=2 * WAIT_S, tls=ours.tls())
        await peer.close()
    assert num_tried == 2


@pytest.mark.parametrize(("field", "num_tried"), [(FIELD, 3), ("dtype", 1)])
@in_loop
async def test_a_link_that_certificates_stand_in_the_way_of_is_tried_again_and_others_are_not(
    monkeypatch, caplog, field, num_tried
):
    monkeypatch.setattr(links, "TLS_PAUSE_S", 0.01)
    tries, is_over = [], asyncio.Event()

    async def dial(address: Address, *, deadline_s: float) -> Connection:
        tries.append(address)
        if len(tries) == 3:
            is_over.set()
            await asyncio.sleep(WAIT_S)
        raise HandshakeError(field, "one", "another")

    refused: list[HandshakeError] = []

    def on_refused(error: HandshakeError) -> None:
        refused.append(error)
        is_over.set()

    hello = LinkHello(token=TOKEN, encode_rank=0, pid=1, fingerprint=FINGERPRINT)
    made = EncodeLinks(
        hello,
        on_up=pytest.fail,
        on_down=pytest.fail,
        on_frame=pytest.fail,
        on_refused=on_refused,  # type: ignore[arg-type]
    )
    made.connect([(1, "192.0.2.1", 9)], lambda _: pytest.fail("met"), dial)
    async with asyncio.timeout(WAIT_S):
        await is_over.wait()
    await made.close()
    assert (len(tries), len(refused)) == (num_tried, int(field != FIELD))
    assert caplog.text.count("no link to language rank 1: handshake refused: TLS") == int(field == FIELD)


# ---- what a stranger costs ----


@pytest.mark.parametrize("ending", ["silence", "much"])
@in_loop
async def test_strangers_in_the_middle_of_a_handshake_cost_next_to_nothing(ours, ending):
    """Each makes the hub answer its hello, and goes no further; who belongs here is let in beside them."""
    hello = client_hello(ours)
    if ending == "much":  # the start of a message of handshakes that never ends
        hello = hello[:5] + hello[5:6] + b"\x00\xff\xff" + hello[9:] + bytes(128 * 1024)
    async with door(ours.tls()) as (keeper, address, let_in):
        before, most = resident(), 0
        peers: list[socket.socket] = []
        while len(peers) < 600:
            peers += strangers(address, 20, hello)
            await asyncio.sleep(0.02)
            assert keeper.num_strangers <= MAX_STRANGERS
            most = max(most, resident())
        print(f"{len(peers)} strangers: {(most - before) / MIB:.1f} MiB")
        friend = await connect_hub(address, deadline_s=WAIT_S, tls=ours.tls())
        await friend.send(FindStore(token=TOKEN))
        async with asyncio.timeout(2.0):
            await let_in.get()
        assert most - before < 16 * MIB
        await friend.close()
        for peer in peers:
            peer.close()


@in_loop
async def test_of_a_handshake_no_more_than_a_few_kib_are_read(ours, monkeypatch):
    """Records of four bytes each, of a message that is never whole: OpenSSL alone would wait for 64 KiB of it."""
    monkeypatch.setattr(doorkeeper, "HELLO_S", 10 * WAIT_S)
    hello = client_hello(ours)
    message = hello[5:6] + b"\x00\xff\xff" + hello[9:]
    records = b"".join(b"\x16\x03\x01\x00\x04" + (message[i : i + 4].ljust(4, b"\0")) for i in range(0, 60_000, 4))
    async with door(ours.tls()) as (_, address, _):
        peer = socket.create_connection(address, timeout=WAIT_S)
        peer.setblocking(False)
        num_sent = 0
        while num_sent < len(records) and is_open(peer):
            push(peer, records[num_sent : num_sent + 1024])
            num_sent += 1024
            await asyncio.sleep(0.005)
        assert num_sent <= MAX_HANDSHAKE_BYTES + 8192
        peer.close()


def push(peer: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        peer.send(data)


def is_open(peer: socket.socket) -> bool:
    try:
        return peer.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@in_loop
async def test_a_handshake_has_the_deadline_of_a_hello(ours, monkeypatch):
    monkeypatch.setattr(doorkeeper, "HELLO_S", 0.3)
    hello = client_hello(ours)
    async with door(ours.tls()) as (keeper, address, let_in):
        waiting = [sock for data in (b"", hello[:50], hello) for sock in strangers(address, 1, data)]
        await asyncio.sleep(1.0)
        assert (keeper.num_strangers, let_in.qsize()) == (0, 0)
        for sock in waiting:
            sock.setblocking(True)
            sock.settimeout(WAIT_S)
            while sock.recv(65536):  # the hub's own part of the handshake, and then the end
                continue
            sock.close()


def test_refusals_are_said_once_a_minute_for_each_host(caplog):
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    for host in (f"10.0.0.{i}" for i in range(2 * MAX_HOSTS)):
        refusals.say(host, host)
        refusals.say(host, host)
    assert len(caplog.records) == MAX_HOSTS
    now[0] = SAY_AGAIN_S
    refusals.say("10.0.0.1", "10.0.0.1")
    assert len(caplog.records) == MAX_HOSTS + 1


@in_loop
async def test_new_files_are_for_new_connections_and_bad_ones_change_nothing(tmp_path, ours, theirs, caplog):
    caplog.set_level(logging.INFO)

    def use(signed: Signed) -> None:
        for name in ("cert", "key", "ca"):
            shutil.copy(getattr(signed, name), tmp_path / f"new-{name}")
            os.replace(tmp_path / f"new-{name}", tmp_path / name)

    use(ours)
    mine = Signed(*(tmp_path / name for name in ("cert", "key", "ca")))
    async with door(mine.tls()) as (_, address, let_in):
        old = await connect_hub(address, deadline_s=WAIT_S, tls=ours.tls())
        await old.send(FindStore(token=TOKEN))
        _, kept = await let_in.get()
        use(theirs)
        with pytest.raises(HandshakeError):
            await connect_hub(address, deadline_s=WAIT_S, tls=ours.tls())
        for _ in range(2):
            new = await connect_hub(address, deadline_s=WAIT_S, tls=theirs.tls())
            await new.close()
        await old.send(LinksUp(language_ranks=[1]))
        assert await kept.receive(WAIT_S) == LinksUp(language_ranks=[1])
        (tmp_path / "key").write_text("torn")
        new = await connect_hub(address, deadline_s=WAIT_S, tls=theirs.tls())
        await new.close()
        await old.close()
    assert caplog.text.count("certificate and CA were read again") == 1
    assert caplog.text.count("holds no private key in PEM form; what was read before stays in use") == 1


def test_threads_share_the_contexts(ours):
    """The hub's loop and a thread that says hello."""
    tls = ours.tls()
    made: list[bool] = []

    def make() -> None:
        for _ in range(50):
            made.append(TlsEnd(tls.context(is_server=False), is_server=False).advance())

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert made == [False] * 200


def test_a_frame_begins_with_0_and_tls_does_not(ours):
    assert encode_frame(FindStore(token=TOKEN), MAX_HUB_FRAME)[0] == 0
    assert MAX_HUB_FRAME < 0x16 << 24
    assert client_hello(ours)[0] == 0x16
