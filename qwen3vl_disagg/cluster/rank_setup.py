"""What every rank works out from its context before it loads anything: folder, config, device, dtype, fingerprint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from qwen3vl_disagg.checkpoint import fingerprint, read_config
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.cluster.registry import Fingerprint, link_fingerprint
from qwen3vl_disagg.cluster.rendezvous import RankContext, World, host_id
from qwen3vl_disagg.cluster.shared_cores import SharedCores
from qwen3vl_disagg.core.devices import parse_gpus, resolve_compile, resolve_device, resolve_dtype, use_device
from qwen3vl_disagg.core.spans import write_spans
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.parallel.expert_placement import held_bytes
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.protocol.messages import RankHello


@dataclass(frozen=True)
class RankSetup:
    """A rank's model, before its weights are loaded."""

    context: RankContext
    folder: Path
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    processor: ImageProcessor
    fingerprint: Fingerprint

    @classmethod
    def of(cls, context: RankContext) -> RankSetup:
        """Take the rank's device, read the small files. CheckpointError or InputError if they cannot be used."""
        options, world = context.options, context.world
        gpus = parse_gpus(options.gpus, options.model.device, world.num_local_ranks)
        device = resolve_device(
            options.model.device, local_rank=world.local_rank, num_local_ranks=world.num_local_ranks, gpus=gpus
        )
        use_device(device)  # before anything begins CUDA
        folder = resolve_model_folder(context.options.model.model)
        config = read_config(folder)
        dtype = resolve_dtype(context.options.model.dtype, config.dtype)
        processor = ImageProcessor.from_folder(folder, config.vision, resize=context.options.model.image_resize)
        fields = link_fingerprint(
            config,
            fingerprint(folder),
            dtype=dtype,
            block_size=context.options.buffers.block_size,
            processor=processor,
        )
        return cls(context, folder, config, device, dtype, processor, fields)

    def shared_cores(self) -> SharedCores | None:
        """The host's cores, where its ranks share them. Compiled code has its number of threads for good."""
        context = self.context
        is_compiled = resolve_compile(context.options.model.compile, self.device)
        if context.cores_file is None or self.device.type != "cpu" or is_compiled:
            return None
        cores, share = len(os.sched_getaffinity(0)), share_of_cores(context.world)
        return SharedCores(context.cores_file, context.world.local_rank, cores=cores, share=share)

    def hello(
        self,
        role: Literal["encode", "language"],
        model: nn.Module,
        *,
        link_address: tuple[str, int] | None = None,
        kv_tokens: int = 0,
    ) -> RankHello:
        return RankHello(
            token=self.context.token,
            role=role,
            rank=None if self.context.is_joining else self.context.rank,
            pid=os.getpid(),
            host=host_id(),
            fingerprint=self.fingerprint,
            link_address=link_address,
            weight_bytes=held_bytes(model),
            kv_tokens=kv_tokens,
        )


def share_of_cores(world: World) -> int:
    """Threads of a rank where all of its host's compute."""
    return max(1, len(os.sched_getaffinity(0)) // world.num_local_ranks)


def run_threaded(body: Callable[[RankContext], int], context: RankContext) -> int:
    """A rank's body with its share of this host's cores; writes spans where the context says so."""
    torch.set_num_threads(share_of_cores(context.world))
    if context.options.spans is not None:
        write_spans(context.options.spans, context.rank)
    return body(context)
