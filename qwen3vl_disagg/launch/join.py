"""What a worker of torchrun becomes where encode ranks join a server: a slot with one of them."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.checkpoint.load import check_folder
from qwen3vl_disagg.cluster.model_folder import shared_model_folder
from qwen3vl_disagg.cluster.rank_setup import run_threaded
from qwen3vl_disagg.cluster.rendezvous import Layout, RankContext, World
from qwen3vl_disagg.cluster.slots import Child, Slot
from qwen3vl_disagg.core.devices import parse_gpus
from qwen3vl_disagg.core.environment import TOKEN, check_environment
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.faults import plan_faults
from qwen3vl_disagg.core.logs import start_logging, use_log_format
from qwen3vl_disagg.core.settings import (
    BufferOptions,
    ModelOptions,
)
from qwen3vl_disagg.encode.rank import run_encode_rank
from qwen3vl_disagg.options import JoinOptions, ServeOptions
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.transport.addresses import given_token, own_address, parse_address


def rank_context(options: JoinOptions, world: World) -> RankContext:
    """What a rank's body is told. InputError for what cannot be."""
    token = given_token(options.token, os.environ)
    if token is None:
        raise InputError(f"--token or {TOKEN}: the server's token is needed", param="token")
    hub_address = parse_address(options.join, "join")
    told = ServeOptions(
        model=ModelOptions(**vars(options.checkpoint)),
        buffers=BufferOptions(block_size=options.block_size),
        encode=options.encode,
        gpus=options.gpus,
        canary=options.canary,
    )
    host = own_address(options.address, hub_address)
    return RankContext(-1, Layout.of(1), hub_address, token, told, world, host=host, is_joining=True)


def run_slot(options: JoinOptions, world: World) -> int:
    """Check the arguments, then supervise until the rank has left; returns the exit status.

    InputError, CheckpointError or DisaggError for what is wrong before.
    """
    use_log_format(options.log_format)
    start_logging()
    options.encode.check()
    parse_gpus(options.gpus, options.checkpoint.device, world.num_local_ranks)
    rank_context(options, world)  # what cannot be is said before anything is fetched
    checkpoint = replace(options.checkpoint, model=shared_model_folder(options.checkpoint.model, world))
    context = rank_context(replace(options, checkpoint=checkpoint), world)
    folder = resolve_model_folder(checkpoint.model)
    # Said once, and not by every rank.
    check_folder(folder, lambda config: Processor.from_folder(folder, config, task="generate"), dtype=checkpoint.dtype)
    check_environment()
    plan_faults()
    body = functools.partial(run_threaded, run_encode_rank, context)
    return Slot([Child("encode rank", body, is_vital=False, takes_signals=True)]).run()
