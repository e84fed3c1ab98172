"""The frontend process: HTTP, router and media store on one event loop, over two inherited sockets."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.checkpoint.download import model_name, resolve_model_folder
from qwen3vl_disagg.cluster.hub import Hub
from qwen3vl_disagg.cluster.job_memory import JobMemory
from qwen3vl_disagg.cluster.last_words import LastWords
from qwen3vl_disagg.cluster.rendezvous import RankContext
from qwen3vl_disagg.cluster.slots import run_loop
from qwen3vl_disagg.core.host import give_large_blocks_back, trim_heap
from qwen3vl_disagg.core.logs import say, write_line
from qwen3vl_disagg.core.progress import SILENT, Progress
from qwen3vl_disagg.core.settings import HttpOptions
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.protocol.routing import RouterLimits
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.doors import Doors
from qwen3vl_disagg.serving.fetch_rules import FetchRules
from qwen3vl_disagg.serving.http_server import HttpServer
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.preparation import Fetcher
from qwen3vl_disagg.transport.sockets import address_text

DRAINED_S, CLOSED_S, LEFT_S = 20.0, 22.0, 26.0
"""Running requests have ended, HTTP connections are closed, the ranks have left: by then, after the signal."""
TRIM_S, BUSY_S, BEAT_S = 1.0, 5.0, 1.0
WAITING_S, MOST_REASONS = 15.0, 4
"""So long nothing is said of what is missing; each time after that, twice as long. Of many reasons, the first ones."""
SETTLE_S = 15.0
"""How long to wait for the last encode rank before the ready line is printed without it."""


def run_frontend(
    context: RankContext,
    http_socket: socket.socket,
    hub_socket: socket.socket,
    memory: JobMemory,
    options: HttpOptions,
    keys: ApiKeys,
    *,
    debug: bool = False,
    words: socket.socket | None = None,
) -> int:
    """The body of the frontend's process; returns its exit status. `memory` outlives it. `words`: the door
    to the keeper of its last words."""
    give_large_blocks_back()
    folder = resolve_model_folder(context.options.model.model)
    config = read_config(folder)
    processor = Processor.from_folder(
        folder,
        config,
        video_outer_wrapper=context.options.model.video_outer_wrapper,
        max_model_len=options.max_model_len,
        task=context.options.model.task,
    )
    name, *more_names = options.served_model_name or (model_name(folder),)
    limits = RouterLimits(max_waiting=options.max_waiting)
    hub = Hub(config, context.layout, context.token, memory=memory, limits=limits, tls=context.tls)
    app = create_app(
        hub,
        processor,
        model_name=name,
        more_names=more_names,
        limits=Limits(
            request_timeout_s=options.request_timeout,
            first_token_target_s=options.first_token_target_s,
            max_answer_tokens=options.max_answer_tokens,
            hide_cache_hits=options.hide_cache_hits == "on",
        ),
        doors=Doors.of(options.host, options.allow_host, options.allow_origin),
        keys=keys,
        fetcher=_fetcher(options),
        debug=debug,
        warm_up=True,
        store=memory.answers,
    )
    http = HttpServer(app, words=LastWords(words))
    return run_loop(serve(hub, http, http_socket, hub_socket, memory, context.progress))


def _fetcher(options: HttpOptions) -> Fetcher | None:
    rules = FetchRules.of(options.allow_media_domain, options.allow_media_path)
    if not rules:
        return None
    from qwen3vl_disagg.serving.media_fetch import MediaFetcher

    return MediaFetcher(rules)


async def serve(
    hub: Hub,
    http: HttpServer,
    http_socket: socket.socket,
    hub_socket: socket.socket,
    memory: JobMemory,
    progress: Progress = SILENT,
) -> int:
    """Until SIGTERM or SIGINT, here or on another node: then drain, stop the ranks, and return 0.

    Raises if a server ends by itself.
    """
    stopping = hub.end_job
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Once or more often makes no difference: torchrun and the slot both pass the signal on.
        loop.add_signal_handler(number, stopping.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})

    url = f"http://{address_text(http_socket.getsockname()[:2])}"
    listener = http_socket.dup()  # the server closes the other one
    ticking = await hub.serve(hub_socket)
    serving = asyncio.ensure_future(http.serve(http_socket))
    beside = [asyncio.ensure_future(task) for task in (_trim(), _say_busy(hub), _beat(memory))]
    announcing = asyncio.ensure_future(_announce(hub, url, memory, progress))
    ends: list[asyncio.Future[Any]] = [asyncio.ensure_future(stopping.wait()), ticking, serving]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.is_set():
        raise RuntimeError("a server of the frontend ended") from next(end for end in ends if end.done()).exception()
    announcing.cancel()
    for task in beside:
        task.cancel()
    # The slot hears a signal at once; this loop may have been busy, on a busy host for seconds.
    stopped_at = memory.stopped_at or time.monotonic()
    await hub.drain(time_left(stopped_at, DRAINED_S))
    http.shutdown()
    await asyncio.wait([serving], timeout=time_left(stopped_at, CLOSED_S))
    _refuse(listener)
    await hub.close(time_left(stopped_at, LEFT_S))
    return 0


def _refuse(listener: socket.socket) -> None:
    """Whoever connects from now on is refused at once. The slot has the socket, too: only to close it here would let
    connections wait, with nobody to take them, until the ranks have left."""
    with contextlib.suppress(OSError):  # as some systems have it, for what is not connected
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def time_left(stopped_at: float, by_s: float, now: float | None = None) -> float:
    """Seconds until `by_s` after the signal; none of a stage's time is made up for by a later one."""
    return max(0.0, stopped_at + by_s - (time.monotonic() if now is None else now))


async def _announce(hub: Hub, url: str, memory: JobMemory, progress: Progress) -> None:
    """Print the ready line, once in the life of the job; before, what is waited for where that takes long."""
    usable_since, say_at, pause_s = None, time.monotonic() + WAITING_S, WAITING_S
    while not memory.is_announced:
        state = hub.readiness()
        if state.ready:
            usable_since = usable_since or time.monotonic()
            if not state.degraded or time.monotonic() - usable_since > SETTLE_S:
                memory.announce()
                progress.end()
                write_line(sys.stdout, f"ready: {url}")
        if time.monotonic() >= say_at:
            progress.stage("waiting", "waiting: " + _some(state.reasons), reasons=state.reasons)
            say_at, pause_s = time.monotonic() + pause_s, 2 * pause_s
        await asyncio.sleep(0.05)


def _some(reasons: Sequence[str]) -> str:
    more = [f"and {len(reasons) - MOST_REASONS} more"] if len(reasons) > MOST_REASONS else []
    return "; ".join([*reasons[:MOST_REASONS], *more])


async def _say_busy(hub: Hub) -> None:
    """A line every so often while there is something to do."""
    while True:
        await asyncio.sleep(BUSY_S)
        if fields := hub.business():
            say("busy", fields)


async def _beat(memory: JobMemory) -> None:
    """Show the slot that this loop turns."""
    while True:
        memory.beat()
        await asyncio.sleep(BEAT_S)


async def _trim() -> None:
    while True:
        await asyncio.sleep(TRIM_S)
        await asyncio.to_thread(trim_heap)
