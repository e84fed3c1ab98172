"""What surrounds the sessions of both sides, as small models: links, buffers of named cells, an engine, a router."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.allocator import Lease
from qwen3vl_disagg.protocol.encode_sessions import EncodeSessions
from qwen3vl_disagg.protocol.messages import Frame, Grant, Header, Resume
from qwen3vl_disagg.protocol.session_events import Attempt, Receive, SessionLimits

READY = "ready"
"""The first thing on a new link towards the encode rank: the language side has it too."""
LIMITS = SessionLimits(
    beat_s=1.0,
    suspend_s=2.0,
    grant_s=20.0,
    payload_s=3.0,
    answer_s=5.0,
    early_s=5.0,
    lease_s=40.0,
    max_items=2,
    max_parked=1,
    max_ended=64,
)
MAX_ATTEMPTS = 3


def attempt_of(value: Any) -> Attempt:
    return value.request_id, value.item, value.attempt


def make_visual(rows: int) -> VisualItem:
    return VisualItem(
        modality="image", digest="", num_bytes=1, grid=(1, 2, 2 * rows), num_rows=rows, offset=0, param="messages[0]"
    )


def header_of(grant: Grant, total: int) -> Header:
    """What an encode rank says before the rows that `grant` asks for."""
    return Header(
        request_id=grant.request_id,
        item=grant.item,
        attempt=grant.attempt,
        total_rows=total,
        row_start=grant.row_start,
        row_stop=grant.row_stop,
        deepstack_start=grant.deepstack_start,
        deepstack_stop=grant.deepstack_stop,
        grid=(1, 2, 2 * total),
        row_digests=[0] * len(grant.row_runs),
        deepstack_digests=[0] * len(grant.deepstack_runs),
    )


@dataclass(eq=False)
class ModelLink:
    """One epoch of a link: frames under way in both directions, payloads sent and awaited."""

    rank: int
    epoch: int
    ups: set[str] = field(default_factory=lambda: {"language", "encode"})
    """The ends that have not noticed its end."""
    is_joined: bool = False
    """The encode side has taken it up."""
    is_broken: bool = False
    to: dict[str, deque[Frame | str]] = field(default_factory=lambda: {"language": deque(), "encode": deque()})
    last: dict[str, Frame] = field(default_factory=dict)
    """The frame that each end has taken last."""
    sends: deque[Attempt] = field(default_factory=deque)
    """Payloads whose sender has not been told that they are on their way."""
    arriving: deque[Grant] = field(default_factory=deque)
    receives: deque[Receive] = field(default_factory=deque)

    @property
    def is_over(self) -> bool:
        return not self.ups and not self.sends and not self.receives


@dataclass
class ModelEncode:
    """One incarnation of an encode rank, and what is in its memory."""

    sessions: EncodeSessions
    incarnation: int = 0
    encoding: list[Attempt] = field(default_factory=list)
    encoded: set[Attempt] = field(default_factory=set)
    parked_at: dict[Attempt, float] = field(default_factory=dict)
    given_up: set[Attempt] = field(default_factory=set)
    """By somebody else: rows of these may go at any time."""

    def drop(self, attempt: Attempt) -> None:
        if attempt in self.encoding:
            self.encoding.remove(attempt)
        self.encoded.discard(attempt)


class Cells:
    """The buffers, a cell for each row: (what, attempt, row) of whatever was written there last."""

    def __init__(self, block_size: int, blocks: int, deepstack_blocks: int, slots: int) -> None:
        self.block_size = block_size
        self.rows: list[Any] = [None] * (blocks * block_size)
        self.deepstack: list[Any] = [None] * (deepstack_blocks * block_size)
        self.slots: list[Any] = [None] * slots

    def places(self, blocks: tuple[int, ...], lengths: list[int]) -> list[int]:
        """Where the rows of a grant go; its runs have to be where the blocks are."""
        size = self.block_size
        every = [block * size + i for block in blocks for i in range(size)][: sum(lengths)]
        assert len(every) == sum(lengths), f"runs {lengths} do not fit blocks {blocks}"
        at = 0
        for length in lengths:
            run = every[at : at + length]
            assert length > 0, "an empty run"
            assert run == list(range(run[0], run[0] + length)), f"a run is not contiguous: {run}"
            at += length
        return every

    def write(self, job: Receive, attempt: Attempt, part: float = 1.0) -> None:
        """What a payload does to the buffers; `part` < 1: it broke on the way."""
        grant, hold = job.grant, job.hold
        if not isinstance(grant, Resume):
            self.slots[hold.slots[0]] = ("aux", attempt)
        table = job.room.deepstack or hold.deepstack
        places = self.places(table, grant.deepstack_runs)
        for i, place in enumerate(places[: int(len(places) * part)]):
            self.deepstack[place] = ("deepstack", attempt, grant.deepstack_start + i)
        places = self.places(job.room.rows, grant.row_runs)
        for i, place in enumerate(places[: int(len(places) * part)]):
            self.rows[place] = ("main", attempt, grant.row_start + i)

    def check_row(self, room: Lease, hold: Lease, grant: Grant, row: int, first: int, *, has_deepstack: bool) -> None:
        """I5 to I8: a row as the engine reads it is that of this attempt, which began at row `first`, with its
        DeepStack and aux."""
        attempt, size = attempt_of(grant), self.block_size
        assert self.slots[hold.slots[0]] == ("aux", attempt), f"aux {self.slots[hold.slots[0]]}"
        at = row - grant.row_start
        cell = self.rows[room.rows[at // size] * size + at % size]
        assert cell == ("main", attempt, row), f"row {row} of {attempt} reads {cell}"
        if has_deepstack:
            table, at = (room.deepstack, at) if room.deepstack else (hold.deepstack, row - first)
            cell = self.deepstack[table[at // size] * size + at % size]
            assert cell == ("deepstack", attempt, row), f"DeepStack row {row} of {attempt} reads {cell}"


@dataclass
class ModelSequence:
    """A prompt of nothing but visual rows, and one token of text; `num_found` were in the cache at admission."""

    rows: list[int]
    num_found: int = 0
    num_cached: int = 0
    is_admitted: bool = True
    is_told: bool = True
    """The loop has heard, or will hear, that it was preempted."""
    here: dict[int, tuple[int, int, Receive]] = field(default_factory=dict)
    """Item -> (first row, row after the last, where they are)"""
    read: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Item -> (attempt, rows of it in the cache)"""

    def admit(self, found: int) -> tuple[list[int], list[int]]:
        """The items that it lacks, and from which row on."""
        self.is_admitted = True
        self.num_found = self.num_cached = min(found, sum(self.rows))
        lacking = [item for item, rows in enumerate(self.rows) if self.first_row(item) < rows]
        return lacking, [self.first_row(item) for item in lacking]

    def give_up(self) -> None:
        self.is_admitted, self.num_found, self.num_cached = False, 0, 0
        self.here.clear()
        self.read.clear()

    def restart(self, item: int) -> None:
        """Back to the item's first needed row, unless all of it is in the cache."""
        self.here.pop(item, None)
        if self.next_row(item) < self.rows[item]:
            self.num_cached = min(self.num_cached, self.offset(item) + self.first_row(item))
            self.read.pop(item, None)

    def offset(self, item: int) -> int:
        return sum(self.rows[:item])

    def first_row(self, item: int) -> int:
        return min(max(0, self.num_found - self.offset(item)), self.rows[item])

    def next_row(self, item: int) -> int:
        return max(0, self.num_cached - self.offset(item))

    @property
    def num_prompt(self) -> int:
        return sum(self.rows) + 1

    @property
    def is_prefilled(self) -> bool:
        return self.is_admitted and self.num_cached == self.num_prompt

    @property
    def limit(self) -> int:
        for item, rows in enumerate(self.rows):
            if self.num_cached >= self.offset(item) + rows:
                continue
            if item not in self.here:
                return self.offset(item)
            if self.here[item][1] < rows:
                return self.offset(item) + self.here[item][1]
        return self.num_prompt


class ModelEngine:
    """Commands wait for the end of a step, and what a step has to say waits for the loop, as with the real one."""

    def __init__(self) -> None:
        self.known: dict[str, ModelSequence] = {}
        self.commands: deque[tuple[Any, ...]] = deque()
        self.events: deque[tuple[Any, ...]] = deque()
        self.batch: tuple[str, int, int] | None = None
        """Request, first token, token after the last: what the step under way reads."""

    def take_commands(self) -> None:
        while self.commands:
            kind, attempt, *rest = self.commands.popleft()
            sequence = self.known.get(attempt[0])
            if kind == "cancel":
                self.known.pop(attempt[0], None)
            elif kind == "recall":
                if sequence is not None and sequence.is_admitted:
                    sequence.restart(attempt[1])
                self.events.append(("returned", attempt))
            elif sequence is not None and sequence.is_admitted:
                self._take_rows(sequence, attempt, *rest)

    def _take_rows(self, sequence: ModelSequence, attempt: Attempt, start: int, stop: int, job: Receive) -> None:
        """Rows that are all in the cache are used at once. Those that do not follow on what is there were on their way
        when the request was preempted and admitted again."""
        next_row = sequence.next_row(attempt[1])
        if stop <= next_row:
            self.events.append(("consumed", attempt, stop))
        elif start <= next_row:
            assert attempt[1] not in sequence.here, "rows came before the last ones were used"
            sequence.here[attempt[1]] = (start, stop, job)

    def can_step(self, request_id: str) -> bool:
        sequence = self.known[request_id]
        return sequence.is_admitted and sequence.limit > sequence.num_cached


@dataclass
class RouterItem:
    visual: VisualItem
    encode_rank: int
    is_received: bool = False
    attempt: int = 1
    failures: int = 0


class ModelRouter:
    """Assigns attempts, the next one on the other rank; messages to and from it wait in queues."""

    def __init__(self) -> None:
        self.requests: dict[str, list[RouterItem]] = {}
        self.to: dict[Any, deque[tuple[Any, ...]]] = {source: deque() for source in ("language", 0, 1)}
        """Language or encode rank -> what it was sent, in order"""
        self.of: dict[Any, deque[tuple[Any, ...]]] = {source: deque() for source in ("language", 0, 1)}
        self.incarnations = [0, 0]
        self.is_patient = False

    def admit(self, request_id: str, visuals: list[VisualItem], ranks: int, lacking: list[int]) -> None:
        self.requests[request_id] = [RouterItem(v, (ranks >> i) & 1, True, 0) for i, v in enumerate(visuals)]
        self._needed(request_id, lacking)

    def _needed(self, request_id: str, lacking: list[int]) -> None:
        """For the first time, or once more; what is under way comes anyhow."""
        for index in lacking:
            item = self.requests[request_id][index]
            if item.is_received:
                item.attempt, item.is_received = item.attempt + 1, False
                self._assign(request_id, index)

    def _assign(self, request_id: str, index: int) -> None:
        item = self.requests[request_id][index]
        attempt = (request_id, index, item.attempt)
        self.to["language"].append(("assign", attempt, item.encode_rank))
        self.to[item.encode_rank].append(("encode", attempt, item.visual, self.incarnations[item.encode_rank]))

    def _failed(self, request_id: str, index: int) -> None:
        item = self.requests[request_id][index]
        item.failures += 1
        if item.failures >= MAX_ATTEMPTS and not self.is_patient:
            self.end(request_id)
            return
        item.attempt, item.encode_rank = item.attempt + 1, 1 - item.encode_rank
        self._assign(request_id, index)

    def end(self, request_id: str, *, by_language: bool = False) -> None:
        items = self.requests.pop(request_id, None)
        if items is None:
            return
        for rank in {item.encode_rank for item in items if not item.is_received}:
            self.to[rank].append(("cancel", request_id))
        if not by_language:
            self.to["language"].append(("cancel", request_id))

    def take(self, source: Any) -> None:
        """One message of a rank."""
        kind, subject, *rest = self.of[source].popleft()
        if kind == "down":
            self.incarnations[source] = subject
            for request_id, items in list(self.requests.items()):
                for index, item in enumerate(items):
                    if item.encode_rank == source and not item.is_received and request_id in self.requests:
                        self._failed(request_id, index)
            return
        if kind == "finished":
            self.end(subject, by_language=True)
            return
        if kind == "needed":
            if subject in self.requests:
                self._needed(subject, rest[0])
            return
        request_id, index, attempt = subject
        items = self.requests.get(request_id)
        if items is None or items[index].attempt != attempt:
            return
        if kind == "lost" and items[index].is_received:
            items[index].is_received = False  # it has to give its room to an earlier item: needed again
        elif items[index].is_received:
            return
        if kind == "received":
            items[index].is_received = True
        elif kind == "failed" and rest == ["input"]:
            self.end(request_id)
        else:
            self._failed(request_id, index)
