"""An encode rank and a language rank's link server, whole, over real sockets and 2-rank Gloo groups on one loop."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from qwen3vl_disagg.cluster.slots import EXIT_REFUSED
from qwen3vl_disagg.protocol.messages import Cancel, Decoded, ItemFailed, Stop
from tests.support.link_scenarios import (
    FINGERPRINT,
    LANGUAGE_RANK,
    describe,
    is_linked,
    make_image,
    run,
    running,
    until,
)

SMALL = (64, 64)  # one block of rows


@pytest.mark.parametrize("kind", ["own", "gloo", "in-process"])
def test_rows_arrive_bit_equal_and_leave_the_buffers(kind):
    async def scenario():
        async with running(kind=kind) as system:
            await system.start_encode_rank()
            images = [make_image(i, size) for i, size in enumerate([SMALL, (128, 96), (32, 160)])]
            system.submit("r", *images)
            for timings, data in zip(await system.check("r", *images), images, strict=True):
                # h = 32 float32, fill id, position; 2 levels; 8 aux words.
                assert timings.transfer_bytes == describe(data).num_rows * (32 * 4 + 4 + 12 + 2 * 32 * 4) + 64
                assert (timings.resumes, timings.encode_rank, timings.attempts) == (0, 0, 1)
                assert timings.transfer > 0
                assert timings.encode > 0
            assert sum(isinstance(message, Decoded) for message in system.hub.said) == 3
            assert any(map(is_linked, system.hub.said))
            assert system.workers[0].num_encoded == 3
            assert not system.engine.lost

    run(scenario)


def test_items_wait_for_room_in_order():
    async def scenario():
        async with running(blocks=2) as system:  # room for two images
            await system.start_encode_rank()
            images = {f"r{i}": make_image(i, SMALL) for i in range(7)}
            for name, data in images.items():
                system.submit(name, data)
            for name, data in images.items():
                await system.check(name, data)
            assert [d.request_id for d in system.engine.deliveries] == list(images)
            assert system.engine.shortages == [True, False]

    run(scenario)


def test_a_damaged_image_is_the_clients_fault():
    async def scenario():
        async with running() as system:
            await system.start_encode_rank()
            good = make_image(0, SMALL)
            system.submit("r", good[: len(good) // 2])
            failed = await system.hub.until(lambda m: isinstance(m, ItemFailed))
            assert (failed.failure.kind, failed.item, failed.attempt) == ("input", 0, 1)
            assert system.visuals["r"][0].digest not in failed.failure.message
            system.links.handle(Cancel(request_id="r"))
            assert system.links.is_idle
            system.submit("next", good)
            await system.check("next", good)

    run(scenario)


@pytest.mark.parametrize("is_missing", [False, True])
def test_bytes_that_the_store_lost_fail_the_item_alone(is_missing):
    async def scenario():
        async with running() as system:
            await system.start_encode_rank()
            data, other = make_image(0, SMALL), make_image(1, SMALL)
            digest = describe(data).digest
            system.hub.media[digest] = b"" if is_missing else data[:-1] + b"\0"
            system.submit("r", data)
            system.submit("other", other)
            failed = await system.hub.until(lambda m: isinstance(m, ItemFailed))
            assert (failed.failure.kind, failed.request_id) == ("transfer", "r")
            assert "does not have" in failed.failure.message or "digest" in failed.failure.message
            await system.check("other", other)
            system.hub.media[digest] = data
            system.assign("r", attempt=2)
            await system.check("r", data)

    run(scenario)


def test_cancel_at_any_time_leaves_nothing_behind():
    async def scenario():
        async with running(blocks=4) as system:
            await system.start_encode_rank()
            for i in range(24):
                system.submit(f"r{i}", *[make_image(i, (96, 96))] * (1 + i % 2))
                await asyncio.sleep(0.0015 * i)
                system.cancel(f"r{i}")
            data = make_image(99, SMALL)
            system.submit("last", data)
            await system.check("last", data)

    run(scenario)


def test_a_dead_encode_rank_loses_what_it_did_not_send_and_comes_back_under_a_new_epoch():
    async def scenario():
        async with running() as system:
            await system.start_encode_rank()
            epoch = system.link_of()[0]
            system.workers[0].gate.clear()
            data = make_image(0, SMALL)
            system.submit("r", data)
            await system.hub.until(lambda m: isinstance(m, Decoded))
            system.workers[0].gate.set()
            await system.kill()
            await system.start_encode_rank()  # knows nothing of the item, nor does the router tell it
            assert system.link_of()[0] == epoch + 1
            assert not system.engine.lost
            system.assign("r", attempt=2)
            [timings] = await system.check("r", data)
            assert timings.attempts == 2

    run(scenario)


def test_a_rank_that_does_not_fit_is_refused_by_name_and_others_go_on(caplog):
    async def scenario():
        async with running(kind="in-process") as system:
            await system.start_encode_rank()
            data = make_image(0, SMALL)
            system.submit("r", data)
            for field in FINGERPRINT:
                caplog.clear()
                task = await system.start_encode_rank(2, fingerprint={**FINGERPRINT, field: "other"})
                assert await asyncio.wait_for(task, 15) == EXIT_REFUSED
                assert f"handshake refused: {field}: expected" in caplog.text
                assert FINGERPRINT[field] in caplog.text
                assert "'other'" in caplog.text
            await system.check("r", data)
            assert system.link_of()[0] == 1

    run(scenario)


def test_garbage_on_the_port_is_dropped_and_others_go_on():
    async def scenario():
        async with running() as system:
            rank, host, port = system.hub.peers.language_ranks[0]
            assert rank == LANGUAGE_RANK
            for garbage in (b"", b"\0\0\0\4junk", b"\xff" * 8, b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2\x81\xa1"):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(garbage)
                writer.write_eof()
                with contextlib.suppress(ConnectionResetError):  # what was not read is not read any more
                    assert await asyncio.wait_for(reader.read(), 10) == b""
                writer.close()
            await system.start_encode_rank()
            data = make_image(0, SMALL)
            system.submit("r", data)
            await system.check("r", data)

    run(scenario)


def test_stop_ends_the_rank_with_status_zero_and_says_goodbye():
    async def scenario():
        async with running() as system:
            task = await system.start_encode_rank()
            system.hub.ranks[0].post(Stop())
            assert await asyncio.wait_for(task, 10) == 0
            await until(lambda: not system.links.sessions.links)
            assert not system.links._links

    run(scenario)


def test_a_frontend_that_died_takes_its_requests_with_it_and_links_stay():
    async def scenario():
        async with running() as system:
            await system.start_encode_rank()
            system.workers[0].gate.clear()
            system.submit("r", make_image(0, SMALL), make_image(1, SMALL))
            await system.hub.until(lambda m: isinstance(m, Decoded))
            system.hub.ranks.pop(0).abort()
            await until(lambda: 0 in system.hub.ranks)
            system.links.handle(Cancel(request_id="r"))  # the language rank lost its frontend too
            await until(lambda: not system.ranks[0].server.sessions.items)
            system.workers[0].gate.set()
            data = make_image(2, SMALL)
            system.submit("next", data)
            await system.check("next", data)
            assert system.link_of()[0] == 1

    run(scenario)
