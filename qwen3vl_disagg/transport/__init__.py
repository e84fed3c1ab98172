"""How bytes get from rank to rank: control connections, links, block buffers, digests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers

__all__ = ["MultimodalDataBuffers"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that what needs no torch does not wait for it.
    if name == "MultimodalDataBuffers":
        from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers

        return MultimodalDataBuffers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
