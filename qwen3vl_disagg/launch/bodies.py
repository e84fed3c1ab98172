"""Process bodies of the ranks that generate."""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial

from qwen3vl_disagg.checkpoint import load_language_model
from qwen3vl_disagg.cluster.rank_setup import RankSetup
from qwen3vl_disagg.cluster.rendezvous import RankContext
from qwen3vl_disagg.cluster.slots import run_loop
from qwen3vl_disagg.core.devices import resolve_compile, use_device
from qwen3vl_disagg.core.settings import default_chunk_tokens
from qwen3vl_disagg.encode.rank import EncodeRank, checked_rows, load_worker
from qwen3vl_disagg.encode.shared_gpu import SharedGpu
from qwen3vl_disagg.engine.canary import Canary
from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.engine.grammars import Grammars
from qwen3vl_disagg.language.engine_thread import BetweenSteps
from qwen3vl_disagg.language.expert_group import ExpertGroup, meet, shares_experts
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.language.rank import LanguageRank
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.parallel.kv_room import KvRoom, measured_room, planned_room
from qwen3vl_disagg.parallel.lockstep_link import LockstepClient, PeerLost
from qwen3vl_disagg.parallel.sizes import SizedModel
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers
from qwen3vl_disagg.transport.links import LinkFactory, in_process_links

logger = logging.getLogger(__name__)


def run_language_rank(context: RankContext) -> int:
    """The body of a language rank's process; returns its exit status."""
    setup = RankSetup.of(context)
    group = asyncio.run(meet(setup, engine_options(setup).pace_limits)) if shares_experts(setup) else None
    engine = load_engine(setup, group)
    check_decoder(setup, engine, group)

    async def serve() -> int:
        if group is None:
            return await (await start_language_rank(setup, engine)).run()
        lockstep, server = await group.start_lockstep(setup, engine.options.pace_limits)
        try:
            return await (await start_language_rank(setup, engine, lockstep=lockstep)).run()
        finally:
            await lockstep.close()
            if server is not None:
                await server.close()

    try:
        return run_loop(serve())
    except PeerLost as error:  # its own slot says which one it was
        logger.error("%s", error)
        return 1


def run_combined_rank(context: RankContext) -> int:
    """Both roles in one process, joined by an in-process link: what a world of one runs.

    On a CPU they have the same cores, so the tower runs between two steps of the engine; on a GPU beside them.
    """
    setup = RankSetup.of(context)
    engine, worker = load_engine(setup), load_worker(setup)
    check_decoder(setup, engine)
    canary = checked_rows(setup, worker)

    async def serve() -> int:
        links = in_process_links()
        language = await start_language_rank(setup, engine, links)
        is_cuda, options = setup.device.type == "cuda", context.options.encode
        if is_cuda:
            language.engine.gpu = SharedGpu(setup.device, options.tower_slowdown)
            worker.share(language.engine.gpu)
        encode = EncodeRank(
            worker,
            setup.hello("encode", worker.model),
            context.hub_address,
            make_link=links,
            tower=None if is_cuda else BetweenSteps(language.engine.post),
            host=context.host,
            options=options,
            canary=canary,
            tls=context.tls,
        )
        return max(await asyncio.gather(language.run(), encode.run()))

    return run_loop(serve())


def engine_options(setup: RankSetup) -> EngineOptions:
    context, settings = setup.context, setup.context.options.model
    chunk_tokens = context.options.chunk_tokens or default_chunk_tokens(is_cuda=setup.device.type == "cuda")
    return EngineOptions.of(
        settings,
        overlap=context.options.overlap == "on",
        prefix_cache=context.options.prefix_cache == "on",
        chunk_tokens=min(chunk_tokens, settings.max_prefill_tokens),
        gap_target_ms=None if context.options.chunk_tokens else context.options.gap_target_ms,
        compile=resolve_compile(context.options.model.compile, setup.device),
    )


def rank_room(setup: RankSetup) -> KvRoom:
    """Of a language rank, once its weights are loaded. On a GPU from what is free; on a CPU from what was free when the
    job started, because at this moment other ranks may have loaded their weights or not."""
    context, layout = setup.context, setup.context.layout
    rows = setup.processor.max_rows
    if setup.device.type == "cuda" or not context.world.free_bytes:
        return measured_room(
            setup.config,
            context.options.model,
            setup.device,
            setup.dtype,
            num_language=len(layout.language_ranks),
            image_rows=rows if context.rank in layout.encode_ranks else 0,
        )
    first = context.rank - context.world.local_rank
    return planned_room(
        SizedModel(setup.config, setup.dtype.itemsize, context.options.model.quantize != "none", is_cuda=False),
        context.options.model,
        context.rank,
        free_bytes=context.world.free_bytes,
        encode=layout.encode_ranks,
        language=layout.language_ranks,
        beside=range(first, first + context.world.num_local_ranks),
        image_rows=rows,
    )


def tell_room(context: RankContext, room: KvRoom, max_rows: int) -> None:
    """Said by the first language rank; where images of `max_rows` do not fit, by one of each host: the others may have
    more memory."""
    if context.progress.is_heard:
        logger.info("%s", room)
    if context.is_first_language_rank_of_host:
        room.warn_of_images(max_rows)


def load_engine(setup: RankSetup, group: ExpertGroup | None = None) -> Engine:
    """Load the decoder, or with a group this rank's part of it, and nothing else of the weights."""
    context = setup.context
    processor = Processor.from_folder(setup.folder, setup.config, task=context.options.model.task)
    tokenizer, eos_ids = processor.tokenizer, processor.generation.eos_token_ids
    grammars = Grammars.of(lambda: tokenizer, setup.config, eos_ids)
    if grammars is not None:
        grammars.warm_up()  # beside the weights
    model = load_language_model(
        setup.folder,
        dtype=setup.dtype,
        device=setup.device,
        quantize=context.options.model.quantize,
        progress=context.is_first_language_rank and sys.stderr.isatty(),
        on_size=partial(context.progress.weights, "decoder"),
        shards=None if group is None else group.shards,
    )
    room = rank_room(setup)
    tell_room(context, room, setup.processor.max_rows)
    options = engine_options(setup)
    if options.compile:
        context.progress.stage("compile", "compiling the decoder's steps")
    return Engine(
        model,
        eos_ids=eos_ids,
        options=options,
        room=room,
        language_rank=context.rank,
        grammars=grammars,
    )


def check_decoder(setup: RankSetup, engine: Engine, group: ExpertGroup | None = None) -> None:
    """CanaryFailed if the engine's model does not compute what the checkpoint says. With a group on all of its ranks at
    once."""
    options = setup.context.options
    if options.canary == "off":
        return
    setup.context.progress.stage("canary", "prompts with visual rows through the decoder")
    kinds = () if group is None else group.kinds
    canary = Canary(engine.runner, setup.folder, kinds, is_quantized=options.model.quantize != "none")
    canary.check(is_full=options.canary == "full")


async def start_language_rank(
    setup: RankSetup,
    engine: Engine,
    make_link: LinkFactory | None = None,
    *,
    lockstep: LockstepClient | None = None,
) -> LanguageRank:
    """Listen for encode ranks."""
    context = setup.context
    buffers = MultimodalDataBuffers.from_options(
        setup.config, context.options.buffers, dtype=setup.dtype, device=setup.device
    )
    links = LinkServer(
        Receiver(buffers, setup.config),
        fingerprint=setup.fingerprint,
        token=context.token,
        language_rank=context.rank,
        host=context.host,
        make_link=make_link,
        tls=context.tls,
    )
    link_address = await links.serve()
    context.progress.stage("links", "waiting for encode ranks and their links")
    pool = engine.scheduler.pool
    hello = setup.hello(
        "language",
        engine.runner.model,
        link_address=link_address,
        kv_tokens=pool.num_pages * pool.page_size,
    )
    cores = setup.shared_cores()
    rank = LanguageRank(engine, links, hello, context.hub_address, lockstep=lockstep, cores=cores, tls=context.tls)
    rank.engine.post(lambda _: use_device(setup.device))
    return rank
