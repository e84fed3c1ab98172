"""How visual rows get from encode ranks to language ranks: buffers, links, sessions, and the two ends."""

from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers

__all__ = ["MultimodalDataBuffers"]
