"""What a worker of torchrun becomes: a slot with its rank, slot 0 with the frontend beside it."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.checkpoint.load import check_folder
from qwen3vl_disagg.cluster.hub_client import ask_to_end
from qwen3vl_disagg.cluster.job_memory import JobMemory
from qwen3vl_disagg.cluster.last_words import keep_words, words_door
from qwen3vl_disagg.cluster.model_folder import shared_model_folder
from qwen3vl_disagg.cluster.rank_setup import run_threaded
from qwen3vl_disagg.cluster.rendezvous import Layout, Meeting, RankContext, World, find, meeting_path, publish
from qwen3vl_disagg.cluster.slots import Child, Slot
from qwen3vl_disagg.core.devices import parse_gpus
from qwen3vl_disagg.core.environment import TOKEN, check_environment
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.faults import plan_faults
from qwen3vl_disagg.core.logs import start_logging, use_log_format, write_line
from qwen3vl_disagg.core.settings import (
    MAX_GAP_MS,
    BufferOptions,
    HttpOptions,
    ModelOptions,
    check_supported,
)
from qwen3vl_disagg.encode.rank import run_encode_rank
from qwen3vl_disagg.launch.bodies import run_combined_rank, run_language_rank
from qwen3vl_disagg.launch.frontend import run_frontend
from qwen3vl_disagg.launch.statuses import tell_running
from qwen3vl_disagg.options import ServeOptions
from qwen3vl_disagg.plan.dry_run import DEFAULT_WORLD, check_dry_run, dry_run
from qwen3vl_disagg.plan.hardware import load_hardware
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.doors import ANY, Doors, is_loopback
from qwen3vl_disagg.serving.fetch_rules import FetchRules
from qwen3vl_disagg.transport.addresses import LOOPBACK, given_token, own_address, parse_address
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers
from qwen3vl_disagg.transport.sockets import address_text, listen
from qwen3vl_disagg.transport.tls import Tls

logger = logging.getLogger(__name__)
MEET_S = 60.0
STUCK_S = 20.0
"""A frontend whose loop has not turned for so long is started again: before ranks, which miss it too, give up."""


def bind(host: str, port: int, param: str) -> socket.socket:
    """A listening socket. InputError if the address cannot be had."""
    try:
        sock = listen(host, port, backlog=1024)
    except (OSError, OverflowError, ValueError) as error:
        where, why = address_text((host, port)), getattr(error, "strerror", error)
        raise InputError(f"cannot listen on {where}: {why}", param=param) from None
    sock.setblocking(False)
    return sock


def rank_child(context: RankContext) -> Child:
    """The rank that this slot supervises. Encode ranks may die alone, and language ranks without experts."""
    rank = context.rank
    if context.layout.world_size == 1:
        return Child("rank 0", functools.partial(run_threaded, run_combined_rank, context), is_vital=True)
    if rank in context.layout.encode_ranks:
        body = functools.partial(run_threaded, run_encode_rank, context)
        use = context.use
        return Child(f"encode rank {rank}", body, is_vital=False, on_fork=use.begin, was_of_use=use.__bool__)
    text = read_config(resolve_model_folder(context.options.model.model)).text
    body = functools.partial(run_threaded, run_language_rank, context)
    return Child(f"language rank {rank}", body, is_vital=bool(text.num_experts))


def tell_lost(context: RankContext) -> Callable[[], None]:
    """Says at the hub that this slot's rank is lost: else the frontend would wait for one that has never come."""
    return functools.partial(ask_to_end, context.hub_address, context.token, context.tls, lost=context.rank)


def check_checkpoint(model: ModelOptions, buffers: BufferOptions, max_model_len: int | None = None) -> None:
    """Everything wrong with the checkpoint, said once, before any rank starts; InputError for more than its context."""
    folder = resolve_model_folder(model.model)
    config, _ = check_folder(
        folder, lambda config: Processor.from_folder(folder, config, task=model.task), dtype=model.dtype
    )
    context = config.text.max_position_embeddings
    if max_model_len is not None and max_model_len > context:
        message = f"--max-model-len {max_model_len}: the checkpoint's context is {context}"
        raise InputError(message, param="max-model-len")
    MultimodalDataBuffers.check(config, buffers)


def make_folder(folder: Path | None) -> None:
    """Where spans go. InputError if it cannot be made."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--spans {folder}: {error.strerror}", param="spans") from None


def rank_context(options: ServeOptions, world: World, layout: Layout, meeting: Meeting) -> RankContext:
    """What a rank's body is told. Of the start rank 0 and the frontend speak, and the first language rank."""
    tls = Tls.of(options.tls)
    if tls is not None and world.local_rank == 0:
        tls.warn_of_end()
    return RankContext(
        world.rank,
        layout,
        meeting.hub_address,
        meeting.token,
        options,
        world,
        host=own_address(options.address, meeting.hub_address),
        cores_file=cores_file(world),
        progress=world.progress(is_heard=world.rank in (0, layout.language_ranks[0])),
        tls=tls,
    )


def cores_file(world: World) -> Path | None:
    """Where ranks of this host say who computes."""
    return meeting_path().with_suffix(".cores") if world.num_local_ranks > 1 else None


def stated_meeting(options: ServeOptions, world: World) -> Meeting | None:
    """Hub and token as the command line says; None for a job on one host, whose slots tell each other.

    InputError where somebody could not find the way in.
    """
    token = given_token(options.token, os.environ)
    if options.hub is None:
        if world.num_nodes > 1:
            reason = f"{world.num_nodes} nodes need --hub HOST:PORT, an address of node 0, and a token"
            raise InputError(reason, param="hub")
        return None if token is None else Meeting(hub_address=(LOOPBACK, 0), token=token, pid=0)
    hub_address = parse_address(options.hub, "hub")
    if token is None:
        raise InputError(f"--hub without --token or {TOKEN}: nobody could join", param="token")
    if world.num_nodes > 1 and hub_address[1] == 0:
        raise InputError(f"--hub {options.hub}: other nodes cannot know the port", param="hub")
    return Meeting(hub_address=hub_address, token=token, pid=0)


def first_slot(options: ServeOptions, world: World, layout: Layout, path: Path) -> Slot:
    """Slot 0: binds both sockets, tells the others where the hub is, forks the frontend beside its rank."""
    keys = ApiKeys.given(options.http, os.environ)
    warn_of_open_door(options.http, has_keys=bool(keys))
    stated = stated_meeting(options, world) or Meeting(hub_address=(LOOPBACK, 0), token=secrets.token_hex(16), pid=0)
    http_socket, hub_socket = bind(options.http.host, options.http.port, "port"), bind(*stated.hub_address, "hub")
    meeting = Meeting(hub_address=hub_socket.getsockname()[:2], token=stated.token, pid=os.getpid())
    context = rank_context(options, world, layout, meeting)
    num_encode, num_language = len(layout.encode_ranks), len(layout.language_ranks)
    roles = f"{num_encode} encode, {num_language} language" if world.size > 1 else "both roles in one process"
    context.progress.stage("ranks", f"starting ranks: {roles}", encode=num_encode, language=num_language)
    if options.hub is not None:
        write_line(sys.stdout, f"hub: {address_text(meeting.hub_address)}")
    publish(path, meeting)
    memory, (words, keepers_end) = JobMemory(), words_door()
    frontend = Child(
        "frontend",
        functools.partial(
            run_frontend,
            context,
            http_socket,
            hub_socket,
            memory,
            options.http,
            keys,
            debug=options.debug,
            words=words,
        ),
        is_vital=False,
        sockets=(http_socket, hub_socket, words),
        takes_signals=True,
        on_fork=memory.expect_no_beat,
        is_stuck=lambda: memory.silent_s > STUCK_S,
    )

    keeper = Child(
        "keeper of last words",
        functools.partial(keep_words, keepers_end),
        is_vital=False,
        sockets=(keepers_end,),
        takes_signals=True,
    )

    def on_left(name: str) -> None:
        if name == "frontend":
            path.unlink(missing_ok=True)
            for sock in (http_socket, hub_socket):  # whoever still connects is refused at once
                sock.close()

    def on_told() -> None:
        # Another node was asked to end, and with it the job. This node's agent would wait for that one's for minutes.
        if world.num_nodes > 1:
            os.kill(os.getppid(), signal.SIGTERM)

    return Slot(
        [keeper, frontend, rank_child(context)],
        sockets=(http_socket, hub_socket, words, keepers_end),
        is_hub_gone=lambda: not path.exists(),
        on_left=on_left,
        on_stop=memory.stop,
        on_told=on_told,
        on_lost=tell_lost(context),
    )


def warn_of_open_door(options: HttpOptions, *, has_keys: bool = False) -> None:
    """Whoever reaches the address, or any page that a user of it looks at, may use the server: said once."""
    if has_keys:
        return
    if ANY in options.allow_origin:
        logger.warning("warning: --allow-origin %s without --api-key: any page in a browser can use the server", ANY)
    if is_loopback(options.host):
        return
    doors = Doors.of(options.host, options.allow_host)
    hosts = "any Host" if ANY in doors.names else f"any IP address and {', '.join(sorted(doors.names))} as Host"
    logger.warning(
        "warning: --host %s: whoever reaches this address can use the server, there is no --api-key; it answers to %s",
        options.host,
        hosts,
    )


def other_slot(options: ServeOptions, world: World, layout: Layout, path: Path) -> Slot:
    """Any other slot on slot 0's host: finds it, forks its rank."""
    context = rank_context(options, world, layout, find(path, Meeting, MEET_S))
    return Slot([rank_child(context)], is_hub_gone=lambda: not path.exists(), on_lost=tell_lost(context))


def far_slot(options: ServeOptions, world: World, layout: Layout) -> Slot:
    """A slot on another host than slot 0's. That the job is over there is noticed by its rank, which ends then; when
    this host is asked to end, the job is."""
    meeting = stated_meeting(options, world)
    if meeting is None:
        raise ValueError(f"node {world.node} was not told where the hub is")
    context = rank_context(options, world, layout, meeting)
    return Slot(
        [rank_child(context)],
        on_stop=functools.partial(ask_to_end, meeting.hub_address, meeting.token, context.tls),
        on_lost=tell_lost(context),
    )


def show_dry_run(options: ServeOptions, world: World) -> int:
    """Say which rank would hold what. Needs no torchrun; under it, slot 0 works and speaks."""
    if world.rank != 0:
        return 0
    dry = options.dry
    check_supported(options.model)
    size = dry.world or (world.size if world.has_agent else DEFAULT_WORLD)
    layout = Layout.of(size, options.encode_ranks)
    hardware = None if dry.hardware is None else load_hardware(dry.hardware)
    shown = dry_run(options.model, dry.preset, layout.encode_ranks, layout.language_ranks, hardware)
    print(shown.to_json() if dry.json else shown.to_text())
    return 0


def run_slot(options: ServeOptions, world: World) -> int:
    """Check the arguments, then supervise until everything has left; returns the exit status.

    InputError, CheckpointError or DisaggError for what is wrong before.
    """
    check_dry_run(options.dry, options.model.model, world.size)
    if options.dry.dry_run:
        return show_dry_run(options, world)
    use_log_format(options.log_format)
    start_logging()
    layout = check_arguments(options, world)
    make_folder(options.spans)
    model = replace(options.model, model=shared_model_folder(options.model.model, world))
    options = replace(options, model=model)
    if world.local_rank == 0:
        check_checkpoint(options.model, options.buffers, options.http.max_model_len)
    if world.local_rank != 0 and world.node == 0:
        return other_slot(options, world, layout, meeting_path()).run(tell_running)
    if world.local_rank != 0:
        return far_slot(options, world, layout).run(tell_running)
    path, cores = meeting_path(), cores_file(world)
    try:
        slot = first_slot(options, world, layout, path) if world.node == 0 else far_slot(options, world, layout)
        return slot.run(tell_running)
    finally:
        for file in (path, cores):
            if file is not None:
                file.unlink(missing_ok=True)


def check_arguments(options: ServeOptions, world: World) -> Layout:
    """Who does what. InputError, or another DisaggError, for what can be seen to be wrong before anything is loaded."""
    layout = Layout.of(world.size, options.encode_ranks)
    check_supported(options.model)
    parse_gpus(options.gpus, options.model.device, world.num_local_ranks)
    options.encode.check()
    options.http.check()
    Doors.of(options.http.host, options.http.allow_host, options.http.allow_origin)
    if world.rank == 0:
        ApiKeys.given(options.http, os.environ)
        FetchRules.of(options.http.allow_media_domain, options.http.allow_media_path)
    if options.chunk_tokens is not None and options.chunk_tokens < 1:
        raise InputError(f"--chunk-tokens {options.chunk_tokens}: must be at least 1", param="chunk_tokens")
    target = options.gap_target_ms
    if target != "auto" and options.chunk_tokens is not None:
        raise InputError("--gap-target-ms and --chunk-tokens: only one of them decides", param="gap_target_ms")
    if target != "auto" and not 1 <= target <= MAX_GAP_MS:
        raise InputError(f"--gap-target-ms {target}: must be auto, or from 1 to {MAX_GAP_MS}", param="gap_target_ms")
    stated_meeting(options, world)
    Tls.of(options.tls)
    check_environment()
    plan_faults()
    return layout
