"""The transfer of one process, with a test in place of the engine."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams, VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.worker import EncodeWorker
from qwen3vl_disagg.engine.engine import Preempted
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.llm.transfer import LocalTransfer
from qwen3vl_disagg.protocol.messages import NeedItems, RequestFailed
from qwen3vl_disagg.protocol.session_events import Consumed
from qwen3vl_disagg.transport.buffers import VisualRows

WAIT_S = 10.0
Key = tuple[str, int]


def settled(llm: LLM, timeout: float = WAIT_S) -> bool:
    """Whether nothing is under way in the transfer any more, soon."""
    return comes(lambda: llm.transfer.is_idle, timeout)


def comes(holds: Callable[[], Any], timeout: float = WAIT_S) -> bool:
    end = time.monotonic() + timeout
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(holds())


class Caller:
    """Runs the commands that a transfer has for its engine, and is that engine: it copies the rows of each item out, in
    the order of the items, and says that they are used, unless it `holds` them."""

    def __init__(self, worker: EncodeWorker, receiver: Receiver, options: EncodeOptions | None = None) -> None:
        self._commands: queue.SimpleQueue[Callable[[Any], Any]] = queue.SimpleQueue()
        self.transfer = LocalTransfer(worker, receiver, self._commands.put, options)
        self.receiver = receiver
        self.items: dict[str, list[VisualItem]] = {}
        self.rows: dict[Key, tuple[Tensor, Tensor]] = {}
        """(request, item) -> its rows, those that have not come are NaN"""
        self.deliveries: list[tuple[Key, VisualRows]] = []
        self.timings: dict[Key, ItemTimings] = {}
        self.recalls: list[Key] = []
        self.errors: dict[str, DisaggError] = {}
        self.holds = False
        self.first_rows: dict[Key, int] = {}
        self._here: dict[Key, VisualRows] = {}
        self._lacking: dict[str, list[int]] = {}

    # -- what is asked of the transfer

    def need(
        self,
        name: str,
        items: list[VisualItem],
        media: list[bytes],
        lacking: Sequence[int] | None = None,
        first_rows: Sequence[int] = (),
    ) -> None:
        self.items[name] = items
        self.transfer.admit(name, items, media, SamplingParams())
        self.need_again(name, range(len(items)) if lacking is None else lacking, first_rows)

    def need_again(self, name: str, lacking: Sequence[int], first_rows: Sequence[int] = ()) -> None:
        """Those items, from those rows on: with an empty list, all of them."""
        self._lacking[name] = list(lacking)
        self.first_rows |= {(name, item): first for item, first in zip(lacking, first_rows, strict=False)}
        for item in lacking:
            self.rows.pop((name, item), None)
        self.transfer.events([NeedItems(request_id=name, items=list(lacking), first_rows=list(first_rows))])

    def preempt(self, name: str) -> None:
        self._lacking[name] = []
        self.transfer.events([Preempted(name)])

    def forget(self, *names: str) -> None:
        for name in names:
            self.items.pop(name, None)
            self.transfer.forget(name)

    # -- the engine

    def provide_rows(self, name: str, item: int, rows: VisualRows, timings: ItemTimings) -> None:
        if name not in self.items:
            return
        assert (name, item) not in self._here, "rows came before the last ones were used"
        self.deliveries.append(((name, item), rows))
        self.timings[name, item] = timings
        self._here[name, item] = rows
        self.read()

    def restart_item(self, name: str, item: int) -> None:
        self.recalls.append((name, item))
        self._here.pop((name, item), None)

    def cancel(self, name: str, sample: int | None = None) -> None:
        """Nothing of it is left here."""

    def set_short_of_room(self, is_short: bool) -> None:
        """Rows are used at once."""

    def read(self) -> None:
        """Use up what is here of the items whose turn it is."""
        while not self.holds:
            ready = [
                (name, items[0]) for name, items in self._lacking.items() if items and (name, items[0]) in self._here
            ]
            if not ready:
                return
            for key in ready:
                self._use(key, self._here.pop(key))

    def _use(self, key: Key, part: VisualRows) -> None:
        name, item = key
        num_rows, config = self.items[name][item].num_rows, self.receiver.config
        hidden = config.text.hidden_size
        if key not in self.rows:
            self.rows[key] = (
                torch.full((num_rows, hidden), torch.nan),
                torch.full((num_rows, config.num_deepstack_levels * hidden), torch.nan),
            )
        main, deepstack = self.rows[key]
        first = self.first_rows.get(key, 0)
        assert part.start >= first
        assert not main[first : part.start].isnan().any(), "a gap"
        assert main[part.start :].isnan().all(), "twice"
        part.write(part.start, part.stop, main[part.start : part.stop], deepstack[part.start : part.stop])
        if part.stop == num_rows:
            self._lacking[name].pop(0)
        self.transfer.events([Consumed(name, item, part.attempt, part.stop)])

    # -- the test

    def is_done(self, name: str) -> bool:
        return name in self.errors or not self._lacking[name]

    def run(self, holds: Callable[[], Any] | None = None, timeout: float = WAIT_S) -> None:
        """Run commands until that holds; without it, until all requests have what they need, or have failed."""
        end = time.monotonic() + timeout
        while not (all(map(self.is_done, self.items)) if holds is None else holds()):
            try:
                command = self._commands.get(timeout=0.02)
            except queue.Empty:
                assert time.monotonic() < end, "nothing moves any more"
                continue
            for event in command(self) or []:
                assert isinstance(event, RequestFailed)
                self.errors[event.request_id] = event.failure.error()

    def end(self) -> None:
        """All requests are over: nothing is held by anybody."""
        self.forget(*list(self.items))
        self.run(lambda: self.transfer.is_idle)
        assert self.transfer.pipeline.cache.num_pinned_bytes == 0
        assert self.receiver.buffers.allocator.is_idle
        for table in (self.transfer._held, self.receiver._items, self.transfer.encode._encoded):
            assert not table
        assert len(self.transfer._media) == 0


@contextmanager
def calling(worker: EncodeWorker, receiver: Receiver, options: EncodeOptions | None = None) -> Iterator[Caller]:
    caller = Caller(worker, receiver, options)
    try:
        yield caller
    finally:
        caller.transfer.close()
        caller.transfer._thread.join(WAIT_S)
        assert not caller.transfer._thread.is_alive()
