"""Rows in use, and whether they came from the cache."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from torch import Tensor

from qwen3vl_disagg.encode.embedding_cache import ContentKey, EmbeddingCache
from qwen3vl_disagg.encode.worker import EncodedItem
from qwen3vl_disagg.protocol.messages import Header, Room


@dataclass(frozen=True)
class HeldItem:
    """An item's rows in use by one attempt. `key`: they are pinned under it; None when the cache does not have them."""

    item: EncodedItem
    key: ContentKey | None
    is_cached: bool = False
    """They were there before the attempt began."""
    batch: int = 0
    """Number of the tower's run that made them, from 1; 0 when they were there."""

    def header(self, grant: Room) -> Header:
        """The item's, with what this attempt had to wait for."""
        header = msgspec.structs.replace(self.item.header(grant), cached=self.is_cached, batch=self.batch)
        return msgspec.structs.replace(header, preprocess_ms=0.0, encode_ms=0.0) if self.is_cached else header


def keep(cache: EmbeddingCache[EncodedItem], key: ContentKey, item: EncodedItem) -> bool:
    """Put an item with all the tensors it holds into the cache, pinned; False if that does not keep it."""
    num_bytes = sum(value.nbytes for value in vars(item).values() if isinstance(value, Tensor))
    return cache.put(key, item, num_bytes)


def hold(cache: EmbeddingCache[EncodedItem], key: ContentKey, item: EncodedItem, batch: int) -> HeldItem:
    """Rows that were just made; pinned if the cache has them."""
    return HeldItem(item, key if cache.pin(key) else None, batch=batch)
