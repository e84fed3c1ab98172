"""Items larger than the pool, links that die and come back, ranks that forget: whole encode ranks and a link server."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from qwen3vl_disagg.protocol.encode_sessions import ENCODING
from qwen3vl_disagg.protocol.messages import Ack, Cancel, ItemFailed
from qwen3vl_disagg.protocol.session_events import Returned, SendFrame
from tests.support.cases import spread
from tests.support.link_scenarios import BLOCK, LIMITS, System, describe, make_image, run, running, until

SMALL, LARGE = (64, 64), (128, 128)  # one block and four
KINDS = ["gloo", "in-process"]
ROW, DEEPSTACK_ROW, AUX = 32 * 4 + 4 + 12, 2 * 32 * 4, 64


def encoded(system: System) -> int:
    return system.workers[0].num_encoded


@spread(blocks=[1, 2, 3], size=[LARGE, (160, 96), (192, 160)], kind=KINDS)
def test_an_item_larger_than_the_pool_comes_in_parts(blocks, size, kind):
    async def scenario():
        async with running(blocks=blocks, deepstack_blocks=8, kind=kind) as system:
            await system.start_encode_rank()
            data = make_image(blocks, size)
            rows = describe(data).num_rows
            system.submit("r", data)
            [last] = await system.check("r", data)
            parts = -(-rows // (blocks * BLOCK))
            assert last.resumes == parts - 1
            assert last.transfer_bytes == rows * (ROW + DEEPSTACK_ROW) + AUX
            expected = [min(blocks * BLOCK, rows - start) * ROW for start in range(0, rows, blocks * BLOCK)]
            expected[0] += rows * DEEPSTACK_ROW + AUX  # all of it with the first, none with a resume
            assert system.make_link.sent == expected
            assert encoded(system) == 1
            assert system.engine.shortages == [True, False]

    run(scenario)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("blocks", "deepstack_blocks"), [(1, 1), (3, 2), (2, 3)])
def test_deepstack_larger_than_its_pool_comes_with_its_rows(blocks, deepstack_blocks, kind):
    async def scenario():
        async with running(blocks=blocks, deepstack_blocks=deepstack_blocks, kind=kind) as system:
            await system.start_encode_rank()
            data = make_image(5, (160, 96))  # 15 rows
            system.submit("r", data)
            [last] = await system.check("r", data)
            step = min(blocks, deepstack_blocks) * BLOCK
            expected = [min(step, 15 - start) * (ROW + DEEPSTACK_ROW) for start in range(0, 15, step)]
            assert last.resumes == len(expected) - 1
            assert last.transfer_bytes == sum(expected) + AUX
            assert system.make_link.sent == [expected[0] + AUX, *expected[1:]]
            assert encoded(system) == 1

    run(scenario)


@spread(num_parts=[1, 2, 4], end=["encode", "language"], kind=KINDS)
def test_a_link_that_dies_while_rows_are_held_is_resumed(num_parts, end, kind):
    async def scenario():
        async with running(blocks=1, deepstack_blocks=4, kind=kind) as system:
            await system.start_encode_rank()
            data, engine = make_image(7, LARGE), system.engine
            engine.is_holding = True
            system.submit("r", data)
            for part in range(1, num_parts + 1):
                await until(lambda: engine.held)
                if part == num_parts:
                    epoch = await system.cut(end)
                    await until(lambda link=epoch + 1: system.link_of() and system.link_of()[0] == link)
                [held] = engine.held
                assert held.rows.start == BLOCK * (part - 1)
                engine.consume(held)
            engine.is_holding = False
            [last] = await system.check("r", data)
            assert (last.resumes, last.attempts) == (3, 1)
            assert encoded(system) == 1
            assert not engine.lost
            assert not engine.recalls

    run(scenario)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["encode", "language"])
def test_rows_consumed_while_there_is_no_link_are_resumed_when_it_is_back(end, kind):
    async def scenario():
        async with running(blocks=2, deepstack_blocks=4, kind=kind) as system:
            await system.start_encode_rank()
            data, engine = make_image(7, LARGE), system.engine
            engine.is_holding = True
            system.submit("r", data)
            await until(lambda: engine.held)
            epoch = await system.cut(end)
            engine.is_holding = False
            engine.consume(engine.held[0])
            [last] = await system.check("r", data)
            assert (last.resumes, last.attempts, encoded(system)) == (1, 1, 1)
            assert system.link_of()[0] == epoch + 1

    run(scenario)


@spread(payload=[0, 1, 3], side=["encode", "language"], is_halfway=[False, True], kind=KINDS)
def test_a_payload_that_breaks_comes_again_over_the_next_link(payload, side, is_halfway, kind):
    limits = msgspec.structs.replace(LIMITS, payload_s=0.5)
    flaws = {"breaks": {side: payload}, "is_halfway": is_halfway}

    async def scenario():
        async with running(blocks=1, deepstack_blocks=4, kind=kind, limits=limits, **flaws) as system:
            await system.start_encode_rank()
            epoch = system.link_of()[0]
            data = make_image(7, LARGE)
            system.submit("r", data)
            [last] = await system.check("r", data)
            assert system.link_of()[0] == epoch + 1
            assert (last.resumes, last.attempts, encoded(system)) == (3, 1, 1)
            assert last.transfer_bytes == 16 * (ROW + DEEPSTACK_ROW) + AUX
            assert len(system.make_link.sent) == 5
            assert system.make_link.sent[payload] == system.make_link.sent[payload + 1]
            assert not system.engine.lost
            assert not any(isinstance(message, ItemFailed) for message in system.hub.said)

    run(scenario)


@pytest.mark.parametrize("end", ["encode", "language"])
def test_a_link_that_dies_while_the_tower_runs_costs_no_encoding(end):
    async def scenario():
        async with running() as system:
            await system.start_encode_rank()
            system.workers[0].gate.clear()
            images = [make_image(i, SMALL) for i in range(3)]
            system.submit("r", *images)
            await until(lambda: encoded(system) == 1)
            epoch = await system.cut(end)
            system.workers[0].gate.set()
            await system.check("r", *images)
            assert system.link_of()[0] == epoch + 1
            assert encoded(system) == 3
            assert not system.engine.lost

    run(scenario)


@pytest.mark.parametrize("blocks", [1, 4])
def test_an_acknowledgement_that_was_lost_with_its_link_costs_nothing(blocks):
    async def scenario():
        async with running(blocks=blocks, deepstack_blocks=4) as system:
            await system.start_encode_rank()
            data, post, lost = make_image(0, LARGE), system.links._post, []

            def lose_the_first(action: SendFrame) -> None:
                if not isinstance(action.frame.body, Ack) or lost:
                    return post(action)
                lost.append(action)
                return system.link_of()[2].abort()

            system.links._post = lose_the_first
            epoch = system.link_of()[0]
            system.submit("r", data)
            await system.engine.item("r", 0)
            await until(lambda: not system.ranks[0].server._encoded)  # long before the end of the lease
            await system.check("r", data)
            assert lost
            assert system.link_of()[0] == epoch + 1
            assert encoded(system) == 1

    run(scenario)


def test_a_rank_that_died_and_came_back_answers_gone():
    async def scenario():
        async with running(blocks=2, deepstack_blocks=4) as system:
            await system.start_encode_rank()
            data, engine = make_image(3, LARGE), system.engine
            engine.is_holding = True
            system.submit("r", data)
            await until(lambda: engine.held)
            await system.kill()
            engine.consume(engine.held[0])
            await system.start_encode_rank()
            await until(lambda: engine.lost)
            [lost] = engine.lost
            assert (lost.request_id, lost.item, lost.attempt, lost.reason, lost.dead_epoch) == ("r", 0, 1, "gone", 0)
            assert [(r.item, r.attempt) for r in engine.recalls] == [(0, 1)]
            assert not system.receiver._items
            engine.is_holding = False
            system.assign("r", attempt=2)
            [last] = await system.check("r", data)
            assert (last.attempts, last.resumes) == (2, 1)

    run(scenario)


def test_a_rank_that_stays_away_is_given_up_with_its_epoch():
    limits = msgspec.structs.replace(LIMITS, suspend_s=0.2)

    async def scenario():
        async with running(blocks=2, deepstack_blocks=4, limits=limits) as system:
            await system.start_encode_rank()
            engine = system.engine
            epoch = system.link_of()[0]
            engine.is_holding = True
            system.submit("r", make_image(3, LARGE))
            system.submit("s", make_image(4, SMALL))
            await until(lambda: engine.held)
            await system.kill()
            await until(lambda: engine.lost)
            assert [(lost.request_id, lost.dead_epoch) for lost in engine.lost] == [("s", epoch)]
            engine.consume(engine.held[0])  # only now the other one misses its rank
            await until(lambda: len(engine.lost) == 2)
            assert (engine.lost[1].request_id, engine.lost[1].dead_epoch) == ("r", epoch)
            for name in "rs":
                system.links.handle(Cancel(request_id=name))

    run(scenario)


def test_rows_whose_lease_has_ended_are_gone():
    limits = msgspec.structs.replace(LIMITS, lease_s=0.3)

    async def scenario():
        async with running(blocks=2, deepstack_blocks=4, limits=limits) as system:
            await system.start_encode_rank()
            data, engine = make_image(3, LARGE), system.engine
            server = system.ranks[0].server
            engine.is_holding, engine.on_loss = True, system.retry
            system.submit("r", data)
            await until(lambda: engine.held)
            await until(lambda: server.sessions.num_parked == 1)
            await until(lambda: not server._encoded)
            assert server.sessions.is_idle
            engine.is_holding = False
            engine.consume(engine.held[0])
            [last] = await system.check("r", data)
            assert [(lost.attempt, lost.reason) for lost in engine.lost] == [(1, "gone")]
            assert (last.attempts, last.resumes, encoded(system)) == (2, 1, 2)

    run(scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_several_images_share_two_blocks(kind):
    async def scenario():
        async with running(blocks=2, deepstack_blocks=4, kind=kind) as system:
            await system.start_encode_rank()
            sizes = [SMALL, LARGE, (96, 96), (160, 96)]
            requests = {name: [make_image(10 * n + i, s) for i, s in enumerate(sizes)] for n, name in enumerate("ab")}
            for name, images in requests.items():
                system.submit(name, *images)
            for name, images in requests.items():
                await system.check(name, *images)
            assert not system.engine.lost
            assert encoded(system) == 8
            starts = [(d.request_id, d.item) for d in system.engine.deliveries if d.rows.start == 0]
            assert starts == [(name, item) for name in requests for item in range(4)]

    run(scenario)


def watch(system: System) -> list[int]:
    """From now on the encode side's bounds are checked with every event; [most encoded items at a time]."""
    server, limits, most = system.ranks[0].server, system.limits, [0]
    handle = server.handle

    def checked(event) -> None:
        handle(event)
        sessions = server.sessions
        num_encoding = sum(1 for item in sessions.items.values() if item.state == ENCODING)
        assert num_encoding <= limits.max_items, "too many towers"
        assert sessions.num_parked <= limits.max_parked, "too many wait for a resume"
        assert sessions.num_in_memory + sessions.num_parked <= limits.max_items + limits.max_parked
        most[0] = max(most[0], len(server._encoded))
        assert len(server._encoded) <= sessions.num_in_memory + sessions.num_parked
        assert len(server._tasks) == len(server._encoded) + num_encoding

    server.handle = checked
    return most


def test_a_full_receiver_holds_the_encode_side_back():
    limits = msgspec.structs.replace(LIMITS, max_items=2, max_parked=2)

    async def scenario():
        async with running(blocks=3, deepstack_blocks=8, limits=limits) as system:
            await system.start_encode_rank()
            watch(system)
            engine = system.engine
            engine.is_holding = True
            images = {f"r{n}": make_image(n, SMALL if n % 2 else LARGE) for n in range(8)}
            for name, data in images.items():
                system.submit(name, data)
            requests = system.links.sessions.requests
            while len(engine.arrived) < 8 or engine.held:
                await until(lambda: engine.held)
                await asyncio.sleep(0.03)
                granted = {name for name, request in requests.items() if request.sessions[0].grant}
                done = {delivery.request_id for delivery in engine.deliveries}
                assert encoded(system) <= len(granted | done), "encoded without room for it"
                engine.consume(engine.held[0])
            for name, data in images.items():
                await system.check(name, data)
            assert encoded(system) == 8
            assert not engine.lost

    run(scenario)


def test_links_that_die_again_and_again_keep_the_encode_side_in_its_bounds():
    # An acknowledgement that is lost with its link leaves rows parked that nobody asks for: the lease ends them.
    limits = msgspec.structs.replace(LIMITS, max_items=3, max_parked=2, lease_s=5.0)

    async def scenario():
        async with running(limits=limits) as system:
            await system.start_encode_rank()
            most = watch(system)
            engine = system.engine
            engine.on_loss = system.retry
            images = {f"r{n}": make_image(n, SMALL) for n in range(12)}
            for name, data in images.items():
                system.submit(name, data)
            for end in ["encode", "language"] * 3:
                await asyncio.sleep(0.03)
                await system.cut(end)
            for name, data in images.items():
                await system.check(name, data)
            assert all(lost.reason == "gone" for lost in engine.lost), engine.lost
            # What had no place any more is encoded again: with a new attempt, if rows of it had arrived.
            assert 12 + len(engine.lost) <= encoded(system) <= 12 + 6 * 5
            assert most[0] <= 5

    run(scenario)


def test_a_request_that_ends_while_its_rows_are_read_keeps_its_blocks_until_they_are_returned():
    async def scenario():
        async with running(blocks=2, deepstack_blocks=4) as system:
            await system.start_encode_rank()
            engine, allocator = system.engine, system.links.sessions.allocator
            engine.is_holding, engine.answers_recalls = True, False
            data = make_image(1, SMALL)
            system.submit("r", make_image(0, LARGE))
            system.submit("s", data)
            await until(lambda: engine.held)
            before = [piece.clone() for _, piece in engine.held[0].rows.main]
            system.cancel("r")
            [recall] = engine.recalls
            await until(lambda: not system.ranks[0].server.sessions.is_idle)
            await asyncio.sleep(0.1)
            assert allocator.counts("rows") == (0, 0, 2), "not in quarantine"
            after = [piece for _, piece in engine.held[0].rows.main]
            assert all(bool((a == b).all()) for a, b in zip(before, after, strict=True))
            engine.is_holding = False
            engine.give_back(recall)
            await system.check("s", data)
            system.links.handle(Returned("r", 0, 1))  # twice changes nothing

    run(scenario)


def test_a_cancelled_item_is_released_while_it_is_parked():
    async def scenario():
        async with running(blocks=1, deepstack_blocks=4) as system:
            await system.start_encode_rank()
            server = system.ranks[0].server
            system.engine.is_holding = True
            system.submit("r", make_image(0, LARGE))
            await until(lambda: server.sessions.num_parked == len(server._encoded) == 1)
            system.cancel("r")
            await until(lambda: not server._encoded)
            assert server.sessions.is_idle

    run(scenario)


def test_a_request_that_runs_out_of_time_is_given_up_everywhere():
    async def scenario():
        async with running(blocks=1, deepstack_blocks=4) as system:
            await system.start_encode_rank()
            system.engine.is_holding = True
            system.submit("r", make_image(0, LARGE), timeout_s=0.5)
            await until(lambda: system.engine.held)
            await until(lambda: system.engine.expired, 2)
            assert [expired.request_id for expired in system.engine.expired] == ["r"]
            assert not system.engine.lost
            assert not any(isinstance(message, ItemFailed) for message in system.hub.said)

    run(scenario)
