"""The room for keys and values of ranks that do not run yet: on a machine that is described, or on this one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen3vl_disagg.core.devices import resolve_device
from qwen3vl_disagg.core.host_memory import available_bytes
from qwen3vl_disagg.core.settings import EngineSettings, ModelOptions
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.parallel.kv_room import KvRoom, kv_room, weights_on_host
from qwen3vl_disagg.parallel.sizes import SizedModel
from qwen3vl_disagg.plan.hardware import Hardware


@dataclass(frozen=True)
class Memory:
    """Bytes before any weights: of each rank's card, else of the host that all of them share."""

    name: str
    has_cards: bool
    free: float
    total: float

    @classmethod
    def of(cls, hardware: Hardware, num_ranks: int) -> Memory:
        """All of a machine that nothing else uses."""
        total = hardware.memory_bytes * (hardware.num_units or 1)
        share = "for each rank" if hardware.num_units is None else "for all ranks"
        reserved = hardware.reserved_bytes * (1 if hardware.num_units is None else num_ranks)
        name = f"{hardware.name}, {total / 1e9:g} GB {share}"
        return cls(name, hardware.num_units is None, total - reserved, total)


def room_of(
    rank: int,
    model: SizedModel,
    settings: EngineSettings,
    memory: Memory,
    encode: range,
    language: range,
    image_rows: int = 0,
) -> KvRoom:
    """Of a language rank. Ranks without cards are all on one host. `image_rows`: of the largest image, which counts
    where the rank encodes too."""
    beside = range(rank, rank + 1) if memory.has_cards else range(max(encode.stop, language.stop))
    return kv_room(
        model,
        settings,
        free_bytes=memory.free - weights_on_host(model, language, encode, beside),
        total_bytes=memory.total,
        num_language=len(language),
        num_sharers=len(language),
        image_rows=image_rows if rank in encode else 0,
    )


@dataclass(frozen=True)
class Where:
    """Who does what, and on what: this machine where no hardware is named."""

    encode: range
    language: range
    hardware: Hardware | None

    def memory(self, options: ModelOptions) -> Memory:
        num_ranks = len({*self.encode, *self.language})
        if self.hardware is not None:
            return Memory.of(self.hardware, num_ranks)
        device = resolve_device(options.device, num_local_ranks=num_ranks)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return Memory("this machine's GPUs", True, free, total)
        return Memory("this machine", False, available_bytes(), 0.0)

    def rooms(
        self, config: ModelConfig, options: ModelOptions, dtype: torch.dtype, image_rows: int
    ) -> dict[int, KvRoom]:
        """Of each language rank, by the rule that `serve` goes by."""
        memory = self.memory(options)
        is_cuda = memory.has_cards and (self.hardware is None or self.hardware.is_cuda)
        model = SizedModel(config, dtype.itemsize, options.quantize != "none", is_cuda)
        args = model, options, memory, self.encode, self.language, image_rows
        return {rank: room_of(rank, *args) for rank in self.language}
