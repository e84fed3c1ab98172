"""Serve a checkpoint: encode ranks, language ranks, and an HTTP frontend.

    torchrun --nproc-per-node 8 recipes/serve.py [options]

Each worker of torchrun is a slot that forks its rank and supervises it; slot 0 also forks the frontend.
"""

from __future__ import annotations

import functools
import mmap
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from qwen3vl_disagg.checkpoint import open_checkpoint
from qwen3vl_disagg.core.errors import CheckpointError, DisaggError, InputError
from qwen3vl_disagg.core.faults import plan_faults
from qwen3vl_disagg.core.settings import (
    BufferOptions,
    EncodeOptions,
    ModelOptions,
    check_supported,
    resolve_model_folder,
)
from qwen3vl_disagg.core.spans import write_spans
from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers
from qwen3vl_disagg.disagg.encode_rank import run_encode_rank
from qwen3vl_disagg.disagg.rendezvous import Layout, Meeting, RankContext, World, find, meeting_path, publish
from qwen3vl_disagg.disagg.slots import EXIT_INPUT, Child, Slot, die_with_parent
from qwen3vl_disagg.engine.rank_bodies import run_combined_rank, run_language_rank
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.serving.frontend import run_frontend

MEET_S = 60.0
EXIT_LAST_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EncodeOptions, BufferOptions, ModelOptions):
    """Serve a checkpoint over HTTP."""

    encode_ranks: int | None = None
    """Ranks 0 .. E-1 encode, the others generate. Default: a quarter, at least one."""
    host: str = "127.0.0.1"
    """Address of the HTTP server."""
    port: int = 8000
    overlap: Literal["on", "off"] = "on"
    """Prefill what is there while later images of the same request are still encoded or sent."""
    prefix_cache: Literal["on", "off"] = "on"
    """Keep what full pages hold, for prompts that begin the same way."""
    chunk_tokens: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Tokens of prompts in a step while other requests are being answered: fewer disturb those less, and take longer
    themselves. Default: 64 on CPU, 512 on a GPU."""
    spans: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write what each rank does when as JSON lines into this folder."""
    debug: bool = False
    """Open GET /debug/processes."""


def parse_options(is_silent: bool) -> ServeOptions:
    """The command line. SystemExit for --help and for what does not parse."""
    return tyro.cli(ServeOptions, prog="serve.py", console_outputs=not is_silent)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. InputError if the address cannot be had."""
    try:
        sock = socket.create_server((host, port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}", param="port") from None
    sock.setblocking(False)
    return sock


def rank_child(context: RankContext) -> Child:
    """The rank that this slot supervises. Encode ranks may die alone."""
    rank = context.rank
    if context.layout.world_size == 1:
        return Child("rank 0", functools.partial(run_threaded, run_combined_rank, context), is_vital=True)
    if rank in context.layout.encode_ranks:
        return Child(f"encode rank {rank}", functools.partial(run_threaded, run_encode_rank, context), is_vital=False)
    return Child(f"language rank {rank}", functools.partial(run_threaded, run_language_rank, context), is_vital=True)


def run_threaded(body: Callable[[RankContext], int], context: RankContext) -> int:
    """A rank's body with its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // context.layout.world_size))
    if context.spans is not None:
        write_spans(context.spans, context.rank)
    return body(context)


def check_checkpoint(options: ServeOptions) -> None:
    """Everything wrong with the checkpoint, said once, before any rank starts."""
    folder = resolve_model_folder(options.model)
    with open_checkpoint(folder) as checkpoint:
        Processor.from_folder(folder, checkpoint.config)
        MultimodalDataBuffers.check(checkpoint.config, options)


def make_folder(folder: Path | None) -> None:
    """Where spans go. InputError if it cannot be made."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--spans {folder}: {error.strerror}", param="spans") from None


def rank_context(options: ServeOptions, rank: int, layout: Layout, meeting: Meeting) -> RankContext:
    """What a rank's body is told."""
    return RankContext(
        rank,
        layout,
        meeting.hub_address,
        meeting.token,
        options,
        buffers=options,
        encode=options,
        overlap=options.overlap == "on",
        prefix_cache=options.prefix_cache == "on",
        chunk_tokens=options.chunk_tokens,
        spans=options.spans,
    )


def first_slot(options: ServeOptions, layout: Layout, path: Path) -> Slot:
    """Slot 0: binds both sockets, tells the others where the hub is, forks the frontend beside its rank."""
    check_checkpoint(options)
    http_socket, hub_socket = bind(options.host, options.port), bind("127.0.0.1", 0)
    announced = memoryview(mmap.mmap(-1, 1))  # shared with every frontend that is forked
    token = secrets.token_hex(16)
    context = rank_context(options, 0, layout, Meeting(hub_address=hub_socket.getsockname()[:2], token=token, pid=0))
    publish(path, Meeting(hub_address=context.hub_address, token=token, pid=os.getpid()))
    frontend = Child(
        "frontend",
        functools.partial(run_frontend, context, http_socket, hub_socket, announced, debug=options.debug),
        is_vital=False,
        sockets=(http_socket, hub_socket),
        takes_signals=True,
    )

    def on_left(name: str) -> None:
        if name == "frontend":
            path.unlink(missing_ok=True)
            for sock in (http_socket, hub_socket):  # whoever still knocks hears at once that nobody is there
                sock.close()

    return Slot(
        [frontend, rank_child(context)],
        sockets=(http_socket, hub_socket),
        is_hub_gone=lambda: not path.exists(),
        on_left=on_left,
    )


def other_slot(options: ServeOptions, layout: Layout, rank: int, path: Path) -> Slot:
    """Any other slot: finds slot 0, forks its rank."""
    meeting = find(path, MEET_S)
    context = rank_context(options, rank, layout, meeting)
    return Slot([rank_child(context)], is_hub_gone=lambda: not path.exists())


def main() -> int:
    """Run one slot; returns the exit status. Slot 0 speaks for all when something is wrong with the arguments."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        status = run_slot(rank)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    if rank != 0 and status == EXIT_INPUT:
        time.sleep(EXIT_LAST_S)  # torchrun ends the others when the first one leaves
    return status


def run_slot(rank: int) -> int:
    """Parse the arguments, then supervise until everything has left."""
    path = None
    try:
        options = parse_options(is_silent=rank != 0)
        world = World.from_env()
        if world.has_agent:
            die_with_parent(os.getppid())
        layout = Layout.of(world.size, options.encode_ranks)
        check_supported(options)
        EncodeOptions.check(options)
        if options.chunk_tokens is not None and options.chunk_tokens < 1:
            raise InputError(f"--chunk-tokens {options.chunk_tokens}: must be at least 1", param="chunk_tokens")
        plan_faults()
        make_folder(options.spans)
        path = meeting_path()
        if world.rank == 0:
            return first_slot(options, layout, path).run()
        return other_slot(options, layout, world.rank, path).run()
    except (InputError, CheckpointError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except DisaggError as error:
        print(f"error: slot {rank}: {error}", file=sys.stderr)
        return 1
    finally:
        if rank == 0 and path is not None:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
