"""What a language rank does with rows that arrive: grants, checks, placement, gathering.

An item passes through the buffers and leaves them as soon as it is whole, so a session never holds blocks while it
waits for more: GRANTED -> RECEIVING -> out. A session that is given up while RECEIVING keeps its blocks in quarantine
until the pending receive has returned.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3vl_disagg.core.errors import InputError, TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.disagg.allocator import Lease
from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers
from qwen3vl_disagg.disagg.digest import payload_digest
from qwen3vl_disagg.disagg.layout import AUX_FIELDS, row_runs
from qwen3vl_disagg.disagg.links import Link
from qwen3vl_disagg.disagg.messages import Grant, Header
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import item_positions


@dataclass(frozen=True)
class ReceivedItem:
    """An item's rows, out of the buffers: main `[R, h]`, deepstack `[R, n * h]`."""

    main: Tensor
    deepstack: Tensor


@dataclass
class _Session:
    """One attempt at one item."""

    grant: Grant
    visual: VisualItem
    lease: Lease
    is_receiving: bool = False
    is_dropped: bool = False


@dataclass(frozen=True)
class Receiving:
    """A session whose payload is on its way."""

    session: _Session
    header: Header


class LanguageReceiver:
    """Sessions over one set of buffers. Thread-safe: links receive on threads of their own."""

    def __init__(self, buffers: MultimodalDataBuffers, config: ModelConfig) -> None:
        self.buffers, self.config = buffers, config
        self._sessions: dict[tuple[str, int], _Session] = {}
        self._lock = threading.Lock()

    @property
    def is_idle(self) -> bool:
        """No sessions and all pools full."""
        with self._lock:
            return not self._sessions and self.buffers.allocator.is_idle

    def grant(self, request_id: str, item: int, attempt: int, visual: VisualItem) -> Grant | None:
        """Room for the whole item, or None when there is none now. An older attempt at it is dropped.

        InputError if the item is larger than the buffers; TransferError, and nothing changes, if the attempt is stale.
        """
        if not self.buffers.could_ever_fit(visual.num_rows):
            raise InputError(
                f"an image of {visual.num_rows} rows does not fit buffers of {len(self.buffers.fill_ids)} rows",
                param=visual.param,
            )
        with self._lock:
            current = self._sessions.get((request_id, item))
            if current is not None and current.grant.attempt > attempt:
                raise TransferError(f"attempt {attempt} is older than {current.grant.attempt}, which is under way")
            self._drop((request_id, item))
            lease = self.buffers.grant(f"{request_id}/{item}/{attempt}", visual.num_rows)
            if lease is None:
                return None
            size = self.buffers.block_size
            runs, deepstack_runs = (
                [stop - start for start, stop in row_runs(blocks, size, visual.num_rows)] if blocks else []
                for blocks in (lease.rows, lease.deepstack)
            )
            grant = Grant(
                request_id=request_id,
                item=item,
                attempt=attempt,
                row_start=0,
                row_stop=visual.num_rows,
                deepstack_start=0,
                deepstack_stop=visual.num_rows,
                row_runs=runs,
                deepstack_runs=deepstack_runs,
            )
            self._sessions[request_id, item] = _Session(grant, visual, lease)
            return grant

    def begin(self, header: Header) -> Receiving:
        """Accept a header: from here on its payload is going to come, and `receive` has to be called.

        TransferError, and nothing changes, if it does not fit the session's grant.
        """
        with self._lock:
            problem = self._check_header(header)
            if problem:
                raise TransferError(problem)
            session = self._sessions[header.request_id, header.item]
            session.is_receiving = True
            return Receiving(session, header)

    def _check_header(self, header: Header) -> str | None:
        session = self._sessions.get((header.request_id, header.item))
        if session is None or session.grant.attempt != header.attempt or session.is_receiving:
            return "no such session"
        visual, grant = session.visual, session.grant
        pairs = {
            "grid": (tuple(visual.grid), tuple(header.grid)),
            "total_rows": (visual.num_rows, header.total_rows),
            "rows": ((grant.row_start, grant.row_stop), (header.row_start, header.row_stop)),
            "deepstack_rows": (
                (grant.deepstack_start, grant.deepstack_stop),
                (header.deepstack_start, header.deepstack_stop),
            ),
        }
        wrong = [f"{name}: expected {mine}, got {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
        return "; ".join(wrong) or None

    def receive(self, link: Link, receiving: Receiving, timeout: float) -> ReceivedItem | None:
        """Receive and check what was announced; blocks. None if the session was dropped meanwhile.

        LinkBroken if the payload does not come, TransferError if it is not what was announced; the session is over.
        """
        session, header = receiving.session, receiving.header
        try:
            link.receive(self.buffers.receive_views(session.lease, header.total_rows), timeout)
            return None if session.is_dropped else self._checked(session, header)
        finally:
            with self._lock:
                allocator = self.buffers.allocator
                if session.is_dropped:
                    allocator.release(session.lease)
                else:
                    allocator.free(session.lease)
                    del self._sessions[header.request_id, header.item]

    def _checked(self, session: _Session, header: Header) -> ReceivedItem:
        """The rows, copied out of the buffers, if they are what the prompt and the header say."""
        visual = session.visual
        main, fill_ids, positions, aux, deepstack = self.buffers.gather(session.lease, header.total_rows)
        sizes = [len(main), *visual.grid, self.buffers.num_levels, main.shape[1], header.digest, header.attempt]
        for name, expected, got in zip(AUX_FIELDS, sizes, aux.tolist(), strict=True):
            if expected != got:
                raise TransferError(f"aux {name}: expected {expected}, got {got}")
        digest = payload_digest(main, fill_ids, positions, deepstack)
        if digest != header.digest:
            raise TransferError(f"digest of {len(main)} rows: expected {header.digest}, got {digest}")
        token_id = self.config.image_token_id if visual.modality == "image" else self.config.video_token_id
        if not bool((fill_ids == token_id).all()):
            raise TransferError(f"fill_ids are not all {token_id}")
        if not torch.equal(positions.T, item_positions(visual.grid, self.config.vision.spatial_merge_size)):
            raise TransferError(f"positions do not follow the grid {tuple(visual.grid)}")
        if not (torch.isfinite(main).all() and torch.isfinite(deepstack).all()):
            raise TransferError("rows hold NaN or infinity")
        return ReceivedItem(main, deepstack)

    def drop(self, request_id: str, item: int, attempt: int) -> None:
        """Give one attempt up. A stale attempt changes nothing."""
        with self._lock:
            session = self._sessions.get((request_id, item))
            if session is not None and session.grant.attempt == attempt:
                self._drop((request_id, item))

    def cancel(self, request_id: str) -> None:
        """Give all items of a request up."""
        with self._lock:
            for key in [key for key in self._sessions if key[0] == request_id]:
                self._drop(key)

    def _drop(self, key: tuple[str, int]) -> None:
        session = self._sessions.pop(key, None)
        if session is None:
            return
        if session.is_receiving:
            session.is_dropped = True
            self.buffers.allocator.quarantine(session.lease)
        else:
            self.buffers.allocator.free(session.lease)
