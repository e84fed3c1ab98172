"""Both roles in one thread: what `LLM` uses."""

from __future__ import annotations

import time

import torch

from qwen3vl_disagg.core.errors import OverloadedError
from qwen3vl_disagg.core.requests import ItemTimings, VisualItem
from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers
from qwen3vl_disagg.disagg.encode_worker import EncodeWorker
from qwen3vl_disagg.disagg.links import InProcessLink
from qwen3vl_disagg.disagg.receiver import LanguageReceiver, ReceivedItem
from qwen3vl_disagg.model import ModelConfig

_TIMEOUT_S = 10.0


class LocalTransfer:
    """An encode worker and a receiver joined by an in-process link."""

    def __init__(self, worker: EncodeWorker, receiver: LanguageReceiver) -> None:
        self.worker, self.receiver = worker, receiver
        self._link = InProcessLink()

    @classmethod
    def for_model(cls, worker: EncodeWorker, config: ModelConfig, *, dtype: torch.dtype) -> LocalTransfer:
        """With buffers for the largest item."""
        buffers = MultimodalDataBuffers.for_largest_item(config, dtype=dtype, device=worker.device)
        return cls(worker, LanguageReceiver(buffers, config))

    def run(
        self, request_id: str, item: int, attempt: int, visual: VisualItem, data: bytes
    ) -> tuple[ReceivedItem, ItemTimings]:
        """Encode one item and move its rows over. InputError for a damaged or too large image."""
        token_id = self.worker.config.image_token_id
        grant = self.receiver.grant(request_id, item, attempt, visual)
        if grant is None:
            raise OverloadedError("the buffers are full")
        try:
            pixels = self.worker.preprocess(data, visual)
            [encoded] = self.worker.encode([pixels], token_id)
            started = time.monotonic()
            header = encoded.header(grant)
            self._link.send(encoded.payload(grant), _TIMEOUT_S)
            received = self.receiver.receive(self._link, self.receiver.begin(header), _TIMEOUT_S)
        finally:
            self.receiver.drop(request_id, item, attempt)
        if received is None:
            raise OverloadedError("the request was cancelled")
        timings = ItemTimings(
            preprocess=encoded.preprocess_ms,
            encode=encoded.encode_ms,
            transfer=(time.monotonic() - started) * 1e3,
            transfer_bytes=self.receiver.buffers.row_sizes.transfer_bytes(visual.num_rows, visual.num_rows),
            encode_rank=0,
            rows=visual.num_rows,
        )
        return received, timings
