"""What a test puts between the sessions and the bytes: a tower that counts, links that break on purpose."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker, Pixels
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.transport.links import Link, LinkBroken, LinkFactory


class CountingWorker(EncodeWorker):
    """Counts what goes through the tower; `gate` holds it up."""

    def __init__(self, model: Any, processor: ImageProcessor, config: ModelConfig) -> None:
        super().__init__(model, processor, config)
        self.num_encoded = 0
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, batch: Sequence[Pixels], visual_token_ids: Sequence[int]) -> list[EncodedItem | Exception]:
        self.num_encoded += len(batch)
        if not self.gate.wait(20):
            raise RuntimeError("the tower was held up for too long")
        return super().encode(batch, visual_token_ids)


@dataclass
class FlakyLinks:
    """Links that break on purpose. `breaks[side]` counts down with each payload; at 0 that payload breaks, half-way
    through if `is_halfway`."""

    make: LinkFactory
    breaks: dict[str, int] = field(default_factory=dict)
    is_halfway: bool = False
    sent: list[int] = field(default_factory=list)
    """Bytes of each payload that was begun."""

    def __call__(self, side: Any, *ends: Any) -> Link:
        return _FlakyLink(self, self.make(side, *ends), side)

    def is_due(self, side: str) -> bool:
        left = self.breaks.pop(side, None)
        if left:
            self.breaks[side] = left - 1
        return left == 0


@dataclass
class _FlakyLink:
    plan: FlakyLinks
    link: Link
    side: str

    def send(self, tensors: Sequence[Tensor], timeout: float) -> None:
        is_broken = self.plan.is_due("encode")
        self.plan.sent.append(sum(tensor.nbytes for tensor in tensors))
        if is_broken and self.plan.is_halfway:
            self.link.send(tensors[: len(tensors) // 2], timeout)
        if is_broken:
            raise LinkBroken("broken on purpose while sending")
        self.link.send(tensors, timeout)

    def receive(self, tensors: Sequence[Tensor], timeout: float) -> Generator[Tensor, None, None]:
        is_broken = self.plan.is_due("language")
        if is_broken and not self.plan.is_halfway:
            raise LinkBroken("broken on purpose while receiving")
        arriving = self.link.receive(tensors, timeout)
        try:
            for number, tensor in enumerate(arriving):
                if is_broken and number == len(tensors) // 2:
                    raise LinkBroken("broken on purpose half-way")
                yield tensor
        finally:
            arriving.close()

    def close(self) -> None:
        self.link.close()
