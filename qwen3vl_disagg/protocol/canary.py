"""The picture whose rows an encode rank sends over a new link before any item: in two grants, so that one is a resume,
through room of its own, so that it is in nobody's way. Pure: both ends find the same grants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.layout import RowSizes, blocks_for
from qwen3vl_disagg.protocol.messages import Header, LinkCanary, Room
from qwen3vl_disagg.protocol.session import Session, header_problem, receive_job, take_room
from qwen3vl_disagg.protocol.session_events import Receive

MAX_ROWS = 4096
NUM_GRANTS = 2
SIZE = (200, 120)
"""Width and height of the picture."""


def canary_names(num_levels: int) -> list[str]:
    """The parts of rows that have a digest each."""
    return ["main rows", *(f"DeepStack level {level}" for level in range(num_levels))]


def canary_block(visual: VisualItem) -> int:
    """Rows of a block, of which there is one for rows, and as many as the item needs for DeepStack."""
    return blocks_for(visual.num_rows, NUM_GRANTS)


def canary_jobs(visual: VisualItem, sizes: RowSizes, header_of: Callable[[Room], Header]) -> Iterator[Receive]:
    """What is granted and received, one after another; each has to be done before the next is asked for. ValueError for
    a header that is not the grant's."""
    block = canary_block(visual)
    num_deepstack = blocks_for(visual.num_rows, block) if sizes.deepstack_embeddings else 0
    allocator = BlockAllocator(num_blocks=1, num_deepstack_blocks=num_deepstack, num_slots=1)
    session = Session("canary", 0, visual, math.inf, attempt=1)
    while session.received < session.total:
        grant = session.grant = take_room(session, allocator, block, sizes, 0.0)
        if grant is None or session.room is None:
            raise RuntimeError("the canary's room is not free")
        header = header_of(grant)
        if (problem := header_problem(session, header)) is not None:
            raise ValueError(problem)
        yield receive_job(session, header, 0, math.inf)
        allocator.free(session.room)
        session.received, session.room, session.grant = grant.row_stop, None, None


def announced(message: LinkCanary, grant: Room) -> Header:
    """What an encode rank said of a grant. ValueError if it said nothing."""
    for header in message.headers:
        if header.row_start == grant.row_start:
            return header
    raise ValueError(f"nothing is announced for rows {grant.row_start} to {grant.row_stop}")
