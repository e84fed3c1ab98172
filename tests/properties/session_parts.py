"""Limits, items and headers for sessions that a test drives by hand."""

from __future__ import annotations

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.messages import Header, ItemFailed, ItemLost, ItemReceived, Room
from qwen3vl_disagg.protocol.session_events import SessionLimits, Tell

LIMITS = SessionLimits(
    beat_s=1.0,
    suspend_s=2.0,
    grant_s=20.0,
    payload_s=3.0,
    answer_s=5.0,
    lease_s=40.0,
    max_items=2,
    max_parked=1,
)


def make_visual(rows: int) -> VisualItem:
    return VisualItem(
        modality="image", digest="", num_bytes=1, grid=(1, 2, 2 * rows), num_rows=rows, offset=0, param="messages[0]"
    )


def header_of(grant: Room, total: int) -> Header:
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


def ids(key):
    return dict(zip(("request_id", "item", "attempt"), key, strict=True))


def arrived(key):
    return Tell(ItemReceived(**ids(key)))


def lost(key, reason, dead_epoch=0):
    return Tell(ItemLost(**ids(key), reason=reason, dead_epoch=dead_epoch))


def failed(key, failure):
    return Tell(ItemFailed(**ids(key), failure=failure))
