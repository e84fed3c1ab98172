"""What is due first goes first on an encode rank: to its share of memory, and into the tower."""

from __future__ import annotations

import asyncio
import threading
from random import Random

import msgspec
import pytest

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.gate import Budget
from qwen3vl_disagg.encode.pipeline import EncodePipeline
from tests.support.link_peers import VISUAL, FakeWorker
from tests.support.link_scenarios import run, until


def item_of(content: str) -> VisualItem:
    """24 patches."""
    return msgspec.structs.replace(VISUAL, digest=content)


async def pull(digest: str, num_bytes: int) -> bytes:
    return digest.encode()


class StoppedWorker(FakeWorker):
    """A batch for each `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = threading.Semaphore(0)

    def encode(self, batch, visual_token_ids):
        results = super().encode(batch, visual_token_ids)
        assert self.turns.acquire(timeout=20)
        return results


class Tower:
    """A pipeline whose tower stands still until `go`. What is asked for has got as far as it can when `ask` returns."""

    def __init__(self, budget: int) -> None:
        self.worker = StoppedWorker()
        self.pipeline = EncodePipeline(self.worker, pull, EncodeOptions(vision_batch_tokens=budget))
        self.tasks: list[asyncio.Task] = []

    async def ask(self, name: str, due: float) -> None:
        self.tasks.append(asyncio.create_task(self.pipeline.rows(item_of(name), lambda: None, due=due)))
        await self._settle(1)

    async def _settle(self, num_batches: int) -> None:
        """That many are in the tower or were, and what has room is decoded."""
        await until(lambda: len(self.worker.batches) == num_batches)
        for _ in range(20):
            await asyncio.sleep(0)
        await until(lambda: not self.pipeline._num_decoding)
        for _ in range(20):
            await asyncio.sleep(0)

    async def go(self) -> list[str]:
        """Everything to its end; the batches."""
        num_batches = 1
        while self.pipeline._encodings:
            await self._settle(num_batches)
            num_batches += 1
            self.worker.turns.release()
            await until(lambda most=num_batches: len(self.worker.batches) == most or not self.pipeline._encodings)
        await asyncio.gather(*self.tasks)
        self.pipeline.close()
        return [" ".join(data.decode() for data in batch) for batch in self.worker.batches]


@pytest.mark.parametrize(
    ("due", "batches"),
    [
        (lambda at: at, ["many0", "many1", "only", "many2", "many3", "later"]),
        (lambda _: FIRST_COME, ["many0", "many1", "many2", "many3", "later", "only"]),
    ],
)
def test_the_tower_takes_first_what_is_due_first(due, batches):
    """One is in the tower, two are decoded; when one of these goes in there is room for another."""

    async def scenario():
        tower = Tower(budget=6)
        for number in range(4):
            await tower.ask(f"many{number}", due(40.0))
        await tower.ask("later", due(41.0))
        await tower.ask("only", due(3.0))
        assert await tower.go() == batches

    run(scenario)


def test_what_two_requests_want_is_due_when_the_more_urgent_of_them_is():
    async def scenario():
        tower = Tower(budget=6)
        for name in ("first", "other", "shared"):
            await tower.ask(name, 40.0)
        await tower.ask("shared", 3.0)
        assert (await tower.go())[:2] == ["first", "shared"]

    run(scenario)


def test_what_waits_for_room_goes_as_the_more_urgent_who_joins_is_due():
    """The tower is busy and one more is decoded."""

    async def scenario():
        tower = Tower(budget=0)
        for name in ("first", "ahead", "many", "many, too", "shared"):
            await tower.ask(name, 40.0)
        await tower.ask("shared", 3.0)
        await tower.ask("many", 41.0)
        await until(lambda: len(tower.worker.decoded) == 2)
        assert (await tower.go())[1:] == ["ahead", "shared", "many", "many, too"]

    run(scenario)


def test_who_is_more_urgent_now_may_fit_at_once():
    async def scenario():
        budget, got = Budget(10), []

        async def take(name: str, amount: int) -> None:
            await budget.take(amount, 2.0, name)
            got.append(name)

        for name, amount in (("most", 9), ("large", 9), ("small", 1)):
            asyncio.create_task(take(name, amount))  # noqa: RUF006 - it ends in this scenario, by `got`
            await asyncio.sleep(0)
        budget.hasten("small", 1.0)
        budget.hasten("most", 1.0)
        await asyncio.sleep(0)
        assert got == ["most", "small"]
        assert budget.used == 10

    asyncio.run(scenario())


def test_room_for_patches_goes_to_what_is_due_first():
    """The tower is busy and one more is decoded; all others wait for room to be decoded."""

    async def scenario():
        tower = Tower(budget=0)
        for name in ("first", "ahead"):
            await tower.ask(name, 40.0)
        for name, due in (("later", 41.0), ("many", 40.0), ("only", 3.0), ("many, too", 40.0)):
            await tower.ask(name, due)
        await until(lambda: len(tower.worker.decoded) == 2)
        assert (await tower.go())[1:] == ["ahead", "only", "many", "many, too", "later"]

    run(scenario)


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_never_overdrawn_and_all_of_it_comes_back(seed):
    """Amounts up to more than there is, dues, and cancels at any time; among those that wait it is the turn of the most
    urgent."""

    async def scenario():
        random, budget = Random(seed), Budget(10)
        held: dict[int, int] = {}
        waiting: dict[int, float] = {}

        async def go(number: int, amount: int, due: float) -> None:
            waiting[number] = due
            try:
                await budget.take(amount, due)
            finally:
                del waiting[number]
            try:
                held[number] = amount
                assert sum(held.values()) <= 10 or len(held) == 1
                for _ in range(random.randint(0, 3)):
                    await asyncio.sleep(0)
            finally:
                del held[number]
                budget.give(amount)

        tasks = []
        for number in range(40):
            amount, due = random.randint(1, 12), random.choice([FIRST_COME, 1.0, 2.0])
            tasks.append(asyncio.create_task(go(number, amount, due)))
            if random.random() < 0.5:
                await asyncio.sleep(0)
            if random.random() < 0.3:
                random.choice(tasks).cancel()
        await asyncio.wait_for(asyncio.wait(tasks), 10)
        assert all(task.cancelled() or task.exception() is None for task in tasks)
        assert (budget.used, budget._line, held) == (0, [], {})

    asyncio.run(scenario())


def test_nobody_passes_who_waits_for_more_before_it():
    async def scenario():
        budget, got = Budget(10), []

        async def take(name: str, amount: int, due: float) -> None:
            await budget.take(amount, due)
            got.append(name)

        await take("all", 10, 1.0)
        for name, amount, due in (("large", 9, 2.0), ("small", 1, 3.0), ("small, urgent", 1, 1.0)):
            asyncio.create_task(take(name, amount, due))  # noqa: RUF006 - it ends in this scenario, by `got`
            await asyncio.sleep(0)
        budget.give(2)
        await asyncio.sleep(0)
        assert got == ["all", "small, urgent"], "one more would fit, but the large one is due before it"
        budget.give(8)
        await asyncio.sleep(0)
        assert got == ["all", "small, urgent", "large"]

    asyncio.run(scenario())
