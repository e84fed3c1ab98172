"""What a worker of torchrun becomes where encode ranks join a server: a slot with one of them."""

from __future__ import annotations

import functools
import logging
import os
import time
from dataclasses import replace

from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.checkpoint.load import check_folder
from qwen3vl_disagg.cluster.model_folder import shared_model_folder
from qwen3vl_disagg.cluster.rank_setup import run_threaded
from qwen3vl_disagg.cluster.rendezvous import Layout, RankContext, World
from qwen3vl_disagg.cluster.slots import Child, Slot
from qwen3vl_disagg.core.devices import parse_gpus
from qwen3vl_disagg.core.environment import TOKEN, check_environment
from qwen3vl_disagg.core.errors import HubGone, InputError
from qwen3vl_disagg.core.faults import plan_faults
from qwen3vl_disagg.core.logs import start_logging, use_log_format
from qwen3vl_disagg.core.settings import (
    BufferOptions,
    ModelOptions,
)
from qwen3vl_disagg.encode.rank import JOIN_S, run_encode_rank
from qwen3vl_disagg.options import JoinOptions, ServeOptions
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.transport.addresses import Unreachable, given_token, own_address, parse_address
from qwen3vl_disagg.transport.tls import Tls

logger = logging.getLogger(__name__)
PAUSE_S = 1.0


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
    tls = Tls.of(options.tls)
    host = own_address(options.address, hub_address)
    return RankContext(-1, Layout.of(1), hub_address, token, told, world, host=host, is_joining=True, tls=tls)


def reachable_context(options: JoinOptions, world: World) -> RankContext:
    """As `rank_context`, for which the network may still be on its way. HubGone when it does not come within JOIN_S."""
    end, has_said = time.monotonic() + JOIN_S, world.local_rank != 0
    while True:
        try:
            return rank_context(options, world)
        except Unreachable as error:
            if time.monotonic() >= end:
                raise HubGone(f"{error}, for {JOIN_S:g} s") from None
            if not has_said:
                logger.warning("%s; trying again for %g s", error, JOIN_S)
                has_said = True
        time.sleep(PAUSE_S)


def run_slot(options: JoinOptions, world: World) -> int:
    """Check the arguments, then supervise until the rank has left; returns the exit status.

    InputError, CheckpointError or DisaggError for what is wrong before.
    """
    use_log_format(options.log_format)
    start_logging()
    options.encode.check()
    parse_gpus(options.gpus, options.checkpoint.device, world.num_local_ranks)
    reachable_context(options, world)  # what cannot be is said before anything is fetched
    checkpoint = replace(options.checkpoint, model=shared_model_folder(options.checkpoint.model, world))
    context = reachable_context(replace(options, checkpoint=checkpoint), world)
    if context.tls is not None and world.local_rank == 0:
        context.tls.warn_of_end()
    folder = resolve_model_folder(checkpoint.model)
    # Said once, and not by every rank.
    check_folder(folder, lambda config: Processor.from_folder(folder, config, task="generate"), dtype=checkpoint.dtype)
    check_environment()
    plan_faults()
    body = functools.partial(run_threaded, run_encode_rank, context)
    use = context.use
    child = Child("encode rank", body, is_vital=False, takes_signals=True, on_fork=use.begin, was_of_use=use.__bool__)
    return Slot([child]).run()
