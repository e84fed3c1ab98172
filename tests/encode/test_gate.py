"""Many at a time, or one alone, in the order in which they came; whatever is cancelled when."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from qwen3vl_disagg.encode.gate import Gate


async def turns(seed: int) -> None:
    random, gate = Random(seed), Gate()
    inside: dict[int, bool] = {}
    entered: list[int] = []
    done = 0

    async def go(number: int, alone: bool) -> None:
        nonlocal done
        await gate.enter(alone=alone)
        entered.append(number)
        inside[number] = alone
        assert not alone or len(inside) == 1
        assert len(inside) == 1 or not any(inside.values())
        try:
            for _ in range(random.randint(0, 3)):
                await asyncio.sleep(0)
                assert len(inside) == 1 or not any(inside.values())
        finally:
            del inside[number]
            gate.leave()
            done += 1

    tasks = []
    for number in range(30):
        tasks.append(asyncio.create_task(go(number, random.random() < 0.3)))
        if random.random() < 0.5:
            await asyncio.sleep(0)
        if random.random() < 0.3:
            random.choice(tasks).cancel()
    await asyncio.wait_for(asyncio.wait(tasks), 10)
    assert done == len(entered)
    assert (gate.num_inside, inside) == (0, {})
    assert all(task.cancelled() or task.exception() is None for task in tasks)


@pytest.mark.parametrize("seed", range(30))
def test_turns(seed):
    asyncio.run(turns(seed))


def test_who_waits_to_be_alone_is_not_passed():
    async def scenario():
        gate = Gate()
        await gate.enter(alone=False)
        alone, later = (asyncio.create_task(gate.enter(alone=kind)) for kind in (True, False))
        await asyncio.sleep(0.01)
        assert not alone.done()
        assert not later.done()
        alone.cancel()
        await asyncio.wait_for(later, 1)
        assert gate.num_inside == 2

    asyncio.run(scenario())
