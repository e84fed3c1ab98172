"""The way of visual rows from encode ranks to language ranks, and the processes around it."""

from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers

__all__ = ["MultimodalDataBuffers"]
