"""Items as an encode rank would make them, without a tower; receivers, and what sessions would ask of them."""

from __future__ import annotations

import math

import msgspec
import torch
from torch import Tensor

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.encode.worker import EncodedItem
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import Grid, item_positions
from qwen3vl_disagg.protocol.allocator import BlockAllocator, Lease
from qwen3vl_disagg.protocol.messages import Header, Resume, Room
from qwen3vl_disagg.protocol.session import Session, take_room
from qwen3vl_disagg.protocol.session_events import Receive
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers, VisualRows
from qwen3vl_disagg.transport.links import InProcessLink


def make_visual(config: ModelConfig, grid: Grid = (1, 4, 6)) -> VisualItem:
    rows = grid[0] * grid[1] * grid[2] // config.vision.merge_unit
    return VisualItem(
        modality="image", digest="0" * 64, num_bytes=1, grid=grid, num_rows=rows, offset=0, param="messages[0]"
    )


def make_encoded(config: ModelConfig, grid: Grid = (1, 4, 6), *, seed: int = 0) -> EncodedItem:
    """Random rows of the right shapes; fill_ids and positions as they have to be."""
    generator = torch.Generator().manual_seed(seed)
    rows, hidden = make_visual(config, grid).num_rows, config.text.hidden_size
    return EncodedItem(
        main=torch.randn(rows, hidden, generator=generator),
        deepstack=torch.randn(rows, config.num_deepstack_levels * hidden, generator=generator),
        fill_ids=torch.full((rows,), config.image_token_id, dtype=torch.int32),
        positions=item_positions(grid, config.vision.spatial_merge_size).T.contiguous(),
        grid=grid,
        preprocess_ms=1.0,
        encode_ms=2.0,
    )


def make_receiver(
    config: ModelConfig,
    *,
    rows: int = 16,
    deepstack_rows: int | None = None,
    slots: int = 8,
    block_size: int = 4,
    device: torch.device | str = "cpu",
) -> Receiver:
    buffers = MultimodalDataBuffers(
        config, num_rows=rows, num_deepstack_rows=deepstack_rows, num_slots=slots, block_size=block_size, device=device
    )
    return Receiver(buffers, config)


class Transfer:
    """One attempt at one item into a receiver: grants as the sessions give them, headers and payloads as the encoder
    makes them; the test says what goes wrong on the way, and what is consumed when."""

    def __init__(
        self, receiver: Receiver, encoded: EncodedItem, *, request_id: str = "r", item: int = 0, attempt: int = 1
    ) -> None:
        self.receiver, self.encoded = receiver, encoded
        self.allocator: BlockAllocator = receiver.buffers.allocator
        visual = make_visual(receiver.config, encoded.grid)
        self.session = Session(request_id, item, visual, math.inf, attempt=attempt)

    @property
    def is_complete(self) -> bool:
        return self.session.received == self.session.total

    def grant(self) -> Room:
        """The next grant; it stands until `receive` has gone well."""
        session, buffers = self.session, self.receiver.buffers
        if session.grant is None:
            session.grant = take_room(session, self.allocator, buffers.block_size, buffers.row_sizes, 0.0)
        assert session.grant is not None, "no room"
        return session.grant

    def job(self, header: Header | None = None) -> Receive:
        grant, session = self.grant(), self.session
        room, hold = session.room, session.hold
        assert room is not None
        assert hold is not None
        return Receive(0, 1, header or self.encoded.header(grant), grant, session.visual, room, hold, 10.0)

    def receive(self, payload: list[Tensor] | None = None, **changed: object) -> VisualRows:
        """One payload over an in-process link; `changed`: fields of its header."""
        job = self.job(msgspec.structs.replace(self.encoded.header(self.grant()), **changed))
        link = InProcessLink()
        link.send(self.encoded.payload(job.grant) if payload is None else payload, 1)
        rows = self.receiver.receive(link, job, 1)
        self.session.received = job.grant.row_stop
        return rows

    def consume(self) -> None:
        """The granted rows have been read: their blocks are free."""
        room: Lease | None = self.session.room
        assert room is not None
        self.allocator.free(room)
        self.session.room = self.session.grant = None

    def end(self) -> None:
        for lease in (self.session.room, self.session.hold):
            if lease is not None:
                self.allocator.free(lease)
        self.session.room = self.session.hold = self.session.grant = None
        self.receiver.forget(self.session.request_id)

    def run(self) -> tuple[Tensor, Tensor]:
        """All of it, grant by grant, copied out as the engine would: `[R, h]`, `[R, n * h]`."""
        main, deepstack = torch.empty_like(self.encoded.main), torch.empty_like(self.encoded.deepstack)
        while not self.is_complete:
            rows = self.receive()
            rows.write(rows.start, rows.stop, main[rows.start : rows.stop], deepstack[rows.start : rows.stop])
            self.consume()
        self.end()
        return main, deepstack


def split_payload(grant: Room, payload: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """(aux, DeepStack pieces, pieces of main / fill_ids / positions) of a payload."""
    num_aux, num_deepstack = int(not isinstance(grant, Resume)), len(grant.deepstack_runs)
    rest = payload[num_aux + num_deepstack :]
    return payload[:num_aux], payload[num_aux : num_aux + num_deepstack], [rest[0::3], rest[1::3], rest[2::3]]
