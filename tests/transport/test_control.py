"""Framing and liveness of control connections: garbage, sizes, cuts, silence, deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import DeadlineError
from qwen3vl_disagg.protocol.messages import (
    Abort,
    Ack,
    Blob,
    Frame,
    Goodbye,
    Heartbeat,
    HubMessage,
    LinkMessage,
    Pull,
    Stop,
)
from qwen3vl_disagg.transport.control import (
    MAX_HUB_FRAME,
    MAX_LINK_FRAME,
    Connection,
    ConnectionLost,
    FrameError,
    connect_hub,
    connect_link,
    encode_frame,
)

LINK = partial(Connection, messages=LinkMessage, max_frame=MAX_LINK_FRAME)
HUB = partial(Connection, messages=HubMessage, max_frame=MAX_HUB_FRAME)
Raw = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def with_peer(scenario: Callable[..., Awaitable[None]], make=LINK, **options) -> None:
    """Run `scenario(connection, reader, writer)`: one end a Connection, the other end bare streams."""

    async def run() -> None:
        accepted: asyncio.Future[Raw] = asyncio.get_running_loop().create_future()

        async def accept(reader, writer):
            accepted.set_result((reader, writer))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        streams = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        connection = make(*streams, **options)
        reader, writer = await accepted
        try:
            async with asyncio.timeout(60):
                await scenario(connection, reader, writer)
        finally:
            await connection.close()
            writer.close()
            server.close()

    asyncio.run(run())


def ack(received: int) -> Frame:
    return Frame(epoch=1, seq=1, body=Ack(request_id="r", item=0, attempt=1, received=received))


@given(cuts=st.lists(st.integers(1, 60), max_size=6), count=st.integers(1, 4))
def test_messages_survive_any_cut_of_the_stream(cuts, count):
    async def scenario(connection, _reader, writer):
        data = b"".join(encode_frame(ack(i), MAX_LINK_FRAME) for i in range(count))
        for cut in cuts:
            writer.write(data[:cut])
            await writer.drain()
            data = data[cut:]
        writer.write(data)
        assert [(await connection.receive(10)).body.received for _ in range(count)] == list(range(count))

    with_peer(scenario)


@given(body=st.binary(min_size=1, max_size=200))
def test_garbage_ends_the_connection_with_a_typed_error(body):
    try:
        msgspec.msgpack.decode(body, type=LinkMessage)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    else:
        return

    async def scenario(connection, reader, writer):
        writer.write(len(body).to_bytes(4, "big") + body)
        with pytest.raises(FrameError):
            await connection.receive(10)
        assert connection.is_closed
        with pytest.raises(FrameError):
            connection.post(Goodbye())
        with contextlib.suppress(ConnectionResetError):  # dropped, not kept half open
            assert await reader.read() == b""

    with_peer(scenario)


def test_a_frame_nested_to_the_limit_is_garbage_too():
    body = b"\x82\xa4type\xa9Heartbeat\xa1x" + b"\x91" * 60_000 + b"\x01"

    async def scenario(connection, _reader, writer):
        writer.write(len(body).to_bytes(4, "big") + body)
        with pytest.raises(FrameError):
            await connection.receive(10)
        assert connection.is_closed

    with_peer(scenario)


def test_a_message_of_the_other_kind_of_connection_is_refused():
    async def scenario(connection, _reader, writer):
        writer.write(encode_frame(Stop(), MAX_HUB_FRAME))
        with pytest.raises(FrameError):
            await connection.receive(10)

    with_peer(scenario)


@pytest.mark.parametrize(("make", "limit"), [(LINK, MAX_LINK_FRAME), (HUB, MAX_HUB_FRAME)])
@pytest.mark.parametrize("length", ["zero", "over", "huge"])
def test_an_impossible_length_ends_the_connection_before_the_body(make, limit, length):
    announced = {"zero": 0, "over": limit + 1, "huge": 2**32 - 1}[length]

    async def scenario(connection, _reader, writer):
        writer.write(announced.to_bytes(4, "big"))
        with pytest.raises(FrameError, match=str(limit)):
            await connection.receive(10)
        assert connection.is_closed

    with_peer(scenario, make)


def test_the_largest_frame_passes_and_one_byte_more_is_not_sent():
    def abort(length: int) -> Frame:
        return Frame(epoch=1, seq=1, body=Abort(request_id="r", item=0, attempt=1, reason="x" * length))

    overhead = len(encode_frame(abort(40_000), MAX_LINK_FRAME)) - 4 - 40_000
    fits = MAX_LINK_FRAME - overhead

    async def scenario(connection, reader, writer):
        writer.write(encode_frame(abort(fits), MAX_LINK_FRAME))
        assert len((await connection.receive(2)).body.reason) == fits
        with pytest.raises(FrameError, match=str(MAX_LINK_FRAME + 1)):
            connection.post(abort(fits + 1))
        assert not connection.is_closed
        connection.post(ack(3))  # nothing of the refused frame is on the wire
        frame = encode_frame(ack(3), MAX_LINK_FRAME)
        assert await reader.readexactly(len(frame)) == frame

    with_peer(scenario)


@pytest.mark.parametrize("sent", [0, 2, 4, 9])
def test_the_end_of_the_stream_is_seen_at_once(sent):
    async def scenario(connection, _reader, writer):
        writer.write(encode_frame(ack(1), MAX_LINK_FRAME)[:sent])
        writer.close()
        started = time.monotonic()
        with pytest.raises(ConnectionLost, match="middle of a frame" if sent not in (0, 4) else "closed"):
            await connection.receive()
        assert time.monotonic() - started < 10
        with pytest.raises(ConnectionLost):
            await connection.send(Goodbye())

    with_peer(scenario)


@pytest.mark.parametrize("sent", [1, 4, 10])
def test_a_receive_that_ran_out_of_time_can_be_taken_up_again(sent):
    frame = encode_frame(ack(7), MAX_LINK_FRAME)

    async def scenario(connection, _reader, writer):
        writer.write(frame[:sent])
        with pytest.raises(DeadlineError):
            await connection.receive(timeout=0.1)
        assert not connection.is_closed
        writer.write(frame[sent:] + encode_frame(ack(8), MAX_LINK_FRAME))
        assert [(await connection.receive(10)).body.received for _ in range(2)] == [7, 8]

    with_peer(scenario)


def test_heartbeats_are_sent_and_not_shown():
    async def scenario(connection, reader, writer):
        connection.keep_alive(0.05)
        frame = encode_frame(Heartbeat(), MAX_LINK_FRAME)
        assert await asyncio.wait_for(reader.readexactly(2 * len(frame)), 10) == 2 * frame
        writer.write(frame * 3 + encode_frame(ack(1), MAX_LINK_FRAME))
        assert (await connection.receive(10)).body.received == 1

    with_peer(scenario)


def test_a_silent_peer_is_dead_after_the_limit_and_a_beating_one_is_not():
    async def scenario(connection, _reader, writer):
        connection.keep_alive(0.05)
        receiving = asyncio.create_task(connection.receive())
        for _ in range(12):  # longer than the limit in all
            writer.write(encode_frame(Heartbeat(), MAX_LINK_FRAME))
            await asyncio.sleep(0.05)
        assert not receiving.done()
        with pytest.raises(ConnectionLost, match="silent"):
            await asyncio.wait_for(receiving, 20)

    with_peer(scenario, silence_s=0.4)


def test_a_stall_of_this_process_does_not_make_the_peer_look_dead():
    async def scenario(connection, _reader, writer):
        connection.keep_alive(0.05)
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0.1)
        writer.write(encode_frame(ack(1), MAX_LINK_FRAME))
        time.sleep(1.0)  # the whole loop stands still for longer than the limit
        assert (await asyncio.wait_for(receiving, 20)).body.received == 1

    with_peer(scenario, silence_s=0.4)


def test_a_peer_that_does_not_read_ends_the_connection():
    async def scenario(connection, _reader, _writer):
        with pytest.raises(ConnectionLost, match="did not read"):
            await connection.send_bytes(bytes(64 * 2**20), 0.3)
        assert connection.is_closed

    with_peer(scenario, HUB)


def test_raw_bytes_follow_their_announcement():
    data = bytes(range(256)) * 5000

    async def scenario(connection, reader, writer):
        connection.post(Pull(token="t", digest="d"))
        await reader.readexactly(len(encode_frame(Pull(token="t", digest="d"), MAX_HUB_FRAME)))
        writer.write(encode_frame(Blob(num_bytes=len(data)), MAX_HUB_FRAME) + data[:1000])
        assert await connection.receive(10) == Blob(num_bytes=len(data))
        writer.write(data[1000:])
        assert await connection.receive_bytes(len(data), 2) == data
        writer.write(data[:3])
        with pytest.raises(ConnectionLost, match=r"3 of 4 bytes, and no more within 0\.1 s"):
            await connection.receive_bytes(4, 0.1)

    with_peer(scenario, HUB)


def test_raw_bytes_may_take_as_long_as_they_move():
    async def scenario(connection, _reader, writer):
        receiving = asyncio.create_task(connection.receive_bytes(8, 1.0))
        for number in range(8):
            writer.write(bytes([number]))
            await asyncio.sleep(0.25)
        assert await receiving == bytes(range(8))

    with_peer(scenario, HUB)


def test_a_peer_that_closes_among_raw_bytes_is_lost_at_once():
    async def scenario(connection, _reader, writer):
        receiving = asyncio.create_task(connection.receive_bytes(8, 60.0))
        writer.write(b"abc")
        await writer.drain()
        writer.close()
        with pytest.raises(ConnectionLost, match="closed the connection after 3 of 8 bytes"):
            await asyncio.wait_for(receiving, 20)

    with_peer(scenario, HUB)


def test_heartbeats_count_where_an_answer_may_take_long():
    async def scenario(connection, _reader, writer):
        receiving = asyncio.create_task(connection.receive(1.0, heartbeats_count=True))
        for _ in range(8):
            writer.write(encode_frame(Heartbeat(), MAX_HUB_FRAME))
            await asyncio.sleep(0.25)
        writer.write(encode_frame(Blob(num_bytes=1), MAX_HUB_FRAME))
        assert await receiving == Blob(num_bytes=1)
        with pytest.raises(DeadlineError):
            await connection.receive(0.1, heartbeats_count=True)

    with_peer(scenario, HUB)


def test_connect_waits_for_a_listener_and_gives_up_at_its_deadline():
    async def scenario():
        with socket.socket() as reserved:  # bound, not listening: refuses
            reserved.bind(("127.0.0.1", 0))
            address = reserved.getsockname()
            started = time.monotonic()
            with pytest.raises(ConnectionLost, match=str(address[1])):
                await connect_link(address, deadline_s=0.3)
            assert time.monotonic() - started < 10
            connecting = asyncio.create_task(connect_hub(address, deadline_s=5))
            await asyncio.sleep(0.2)
            reserved.listen()
            connection = await connecting
            assert connection.peer == address
            await connection.close()
            await connection.close()

    asyncio.run(scenario())
