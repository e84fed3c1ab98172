"""The bytes of a language rank's sessions: payloads into leased blocks, checked run by run, then lent to the engine.
Those for blocks on a GPU are checked in memory of the host, and uploaded from there.

Who gets which blocks, and when they come back, is decided by `language_sessions`; this only moves and checks.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen3vl_disagg.core.errors import TransferError
from qwen3vl_disagg.core.faults import fault_point
from qwen3vl_disagg.core.requests import ItemTimings
from qwen3vl_disagg.core.tensors import all_finite
from qwen3vl_disagg.engine.engine import Engine, EngineEvent
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import item_positions
from qwen3vl_disagg.protocol.layout import AUX_FIELDS, item_ranges
from qwen3vl_disagg.protocol.messages import Resume
from qwen3vl_disagg.protocol.session_events import Attempt, Receive
from qwen3vl_disagg.transport.buffers import Delivery, MultimodalDataBuffers, Pieces, VisualRows
from qwen3vl_disagg.transport.digest import add_digests, deepstack_sums, run_sums, sums_digest
from qwen3vl_disagg.transport.links import Link


@dataclass
class _Item:
    """What has arrived of one attempt."""

    job: Receive
    """The initial transfer."""
    positions: Tensor
    """`[R, 3]`, as the grid says."""
    item_digest: int = 0
    digest: int = 0
    deepstack: list[tuple[int, Tensor]] = field(default_factory=list)
    rows: VisualRows | None = None
    """Of the last transfer, until they are delivered."""
    seconds: float = 0.0
    num_bytes: int = 0
    num_transfers: int = 0


class Receiver:
    """Thread-safe: each link receives on a thread of its own."""

    def __init__(self, buffers: MultimodalDataBuffers, config: ModelConfig) -> None:
        self.buffers, self.config = buffers, config
        self._items: dict[Attempt, _Item] = {}
        self._lock = threading.Lock()

    def receive(self, link: Link, job: Receive, timeout: float) -> VisualRows:
        """Receive and check what was announced; blocks. The rows that are here now.

        LinkBroken if the payload does not come, TransferError if it is not what was announced.
        """
        started = time.monotonic()
        attempt, grant = job.grant.key, job.grant
        item = self._begin(attempt, job)
        views, deepstack_views, row_views = self._views(job)
        arriving = link.receive(views, timeout)
        here = _Counted(arriving, len(views))
        try:
            if not isinstance(grant, Resume):
                self._check_aux(item, job, next(here))
            deepstack: list[tuple[int, Tensor]] = []
            digests = [item.digest]
            ranges = item_ranges(grant.deepstack_runs, grant.deepstack_start)
            for (start, stop), expected, view in zip(
                ranges, job.header.deepstack_digests, deepstack_views, strict=True
            ):
                piece = next(here)
                digests.append(_check(expected, deepstack_sums(piece), "DeepStack rows", start, stop))
                _check_finite(piece, "DeepStack rows", start, stop)
                deepstack.append((start, self._place(piece, view)))
            main: list[tuple[int, Tensor]] = []
            ranges = item_ranges(grant.row_runs, grant.row_start)
            for (start, stop), expected, (view, *_) in zip(ranges, job.header.row_digests, row_views, strict=True):
                part, fill_ids, positions = next(here), next(here), next(here)
                digests.append(_check(expected, run_sums(part, fill_ids, positions), "rows", start, stop))
                self._check_run(item, job, start, fill_ids, positions)
                _check_finite(part, "rows", start, stop)
                main.append((start, self._place(part, view)))
            for _ in here:  # nothing is left, but only the end says that the receives have returned
                continue
        finally:
            arriving.close()
        # Only now: a payload that breaks in the middle comes again.
        item.digest = add_digests(*digests)
        rows = item.rows = self._end(item, job, tuple(main), deepstack)
        item.seconds += time.monotonic() - started
        return rows

    def _begin(self, attempt: Attempt, job: Receive) -> _Item:
        with self._lock:
            item = self._items.get(attempt)
            if item is None or not isinstance(job.grant, Resume):
                for old in [key for key in self._items if key[:2] == attempt[:2] and key[2] < attempt[2]]:
                    del self._items[old]
                merge = self.config.vision.spatial_merge_size
                positions = item_positions(job.visual.grid, merge).T.contiguous()
                item = self._items[attempt] = _Item(job, positions)
            return item

    def _views(self, job: Receive) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
        """What to receive into, in payload order; and the DeepStack and row runs among it."""
        grant = job.grant
        deepstack = self.buffers.deepstack_views(job.room.deepstack or job.hold.deepstack, grant.deepstack_runs)
        rows = self.buffers.row_views(job.room.rows, grant.row_runs)
        aux = [] if isinstance(grant, Resume) else [self.buffers.aux_view(job.hold.slots[0])]
        return [*aux, *deepstack, *itertools.chain.from_iterable(rows)], deepstack, rows

    def _place(self, rows: Tensor, view: Tensor) -> Tensor:
        """Rows that are right, where the engine reads them; on a GPU on their way there (`VisualRows.arrival`)."""
        if self.buffers.uploads is None:
            return rows
        self.buffers.uploads.start(view, rows)
        return view

    def _check_aux(self, item: _Item, job: Receive, aux: Tensor) -> None:
        visual, got = job.visual, aux.tolist()
        sizes = [visual.num_rows, *visual.grid, self.buffers.num_levels, self.buffers.hidden_size]
        for name, expected, value in zip(AUX_FIELDS, [*sizes, None, job.grant.attempt], got, strict=True):
            if expected is not None and expected != value:
                raise TransferError(f"aux {name}: expected {expected}, got {value}")
        item.item_digest = got[AUX_FIELDS.index("digest")]

    def _check_run(self, item: _Item, job: Receive, start: int, fill_ids: Tensor, positions: Tensor) -> None:
        token_id = self.config.image_token_id if job.visual.modality == "image" else self.config.video_token_id
        if not bool((fill_ids == token_id).all()):
            raise TransferError(f"fill_ids are not all {token_id}")
        if not torch.equal(positions, item.positions[start : start + len(positions)].to(positions)):
            raise TransferError(f"positions do not follow the grid {tuple(job.visual.grid)}")

    def _end(self, item: _Item, job: Receive, main: Pieces, deepstack: list[tuple[int, Tensor]]) -> VisualRows:
        grant = job.grant
        if deepstack:
            item.deepstack = deepstack
        item.num_bytes += self.buffers.row_sizes.transfer_bytes(
            grant.row_stop - grant.row_start,
            grant.deepstack_stop - grant.deepstack_start,
            aux=not isinstance(grant, Resume),
        )
        item.num_transfers += 1
        # Only the digests of all rows add up to the item's.
        is_whole = item.job.grant.row_start == 0 and grant.row_stop == job.visual.num_rows
        if is_whole and item.digest != item.item_digest:
            raise TransferError(f"digest of the item: expected {item.item_digest}, got {item.digest}")
        arrival = None if self.buffers.uploads is None else self.buffers.uploads.arrival()
        rows = VisualRows(grant.attempt, grant.row_start, grant.row_stop, main, tuple(item.deepstack), arrival=arrival)
        if grant.row_stop == job.visual.num_rows:
            item.deepstack = []  # no resume will need it
        return rows

    def hand_over(self, attempt: Attempt, engine: Engine) -> list[EngineEvent]:
        """`delivery`, if there is one, on the engine's thread."""
        delivery = self.delivery(attempt)
        if delivery is None:
            return []
        return engine.provide_rows(delivery.request_id, delivery.item, delivery.rows, delivery.timings)

    def delivery(self, attempt: Attempt) -> Delivery | None:
        """The rows that were received last, and what it took so far. They are kept by whoever reads them, and no longer
        here. None for what was forgotten meanwhile."""
        with self._lock:
            item = self._items.get(attempt)
            if item is None or item.rows is None:
                return None
            rows, item.rows = item.rows, None
        header = item.job.header
        timings = ItemTimings(
            queue=header.queue_ms,
            preprocess=header.preprocess_ms,
            encode=header.encode_ms,
            transfer=item.seconds * 1e3,
            transfer_bytes=item.num_bytes,
            encode_rank=item.job.encode_rank,
            rows=rows.stop,
            resumes=item.num_transfers - 1,
            attempts=rows.attempt,
            cached=header.cached,
            batch=header.batch,
            note=header.note,
        )
        return Delivery(*attempt[:2], rows, timings)

    def totals(self, attempt: Attempt) -> tuple[int, int]:
        """(payload bytes, transfers) of an attempt so far."""
        with self._lock:
            item = self._items.get(attempt)
            return (0, 0) if item is None else (item.num_bytes, item.num_transfers)

    def forget(self, request_id: str, item: int | None = None) -> None:
        """Let go of what is remembered of a request, or of one item of it."""
        with self._lock:
            for key in [key for key in self._items if key[0] == request_id and item in (None, key[1])]:
                del self._items[key]

    def forget_attempt(self, attempt: Attempt) -> None:
        with self._lock:
            self._items.pop(attempt, None)


def _check_finite(rows: Tensor, what: str, start: int, stop: int) -> None:
    if not all_finite(rows):
        raise TransferError(f"{what} {start}..{stop} hold NaN or infinity")


def _check(expected: int, sums_R: Tensor, what: str, start: int, stop: int) -> int:
    """The digest of rows start .. stop of an item, if it is the announced one."""
    digest = sums_digest(sums_R, start)
    if digest != expected:
        raise TransferError(f"digest of {what} {start}..{stop}: expected {expected}, got {digest}")
    return digest


class _Counted:
    """Passes a payload's tensors on; half-way through is a place to fail on purpose."""

    def __init__(self, tensors: Iterator[Tensor], total: int) -> None:
        self._tensors, self._half, self._seen = tensors, total // 2, 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Tensor:
        if self._seen == self._half:
            fault_point("mid-payload-received")
        self._seen += 1
        return next(self._tensors)
