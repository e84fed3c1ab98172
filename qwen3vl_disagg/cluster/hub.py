"""The hub: the frontend's end of every rank's control connection, the router in the middle, requests on top.

One event loop. What ranks and clients do becomes router events; what the router answers is carried out here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qwen3vl_disagg.cluster.backend import AllDecoded, FinishedEvent, PromptCall, Readiness, TokenEvent
from qwen3vl_disagg.cluster.backend import Event as ClientEvent
from qwen3vl_disagg.cluster.job_memory import JobMemory
from qwen3vl_disagg.cluster.loads import Load, Loads
from qwen3vl_disagg.cluster.media_store import MediaStore
from qwen3vl_disagg.cluster.registry import RankKey, Registry
from qwen3vl_disagg.cluster.rendezvous import Layout, host_id
from qwen3vl_disagg.cluster.traces import Traces, Watched
from qwen3vl_disagg.core.errors import DisaggError, HandshakeError, TransferError, UnavailableError
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.protocol.messages import (
    Decoded,
    EncodeLoad,
    EndJob,
    FindStore,
    Finished,
    HubMessage,
    ItemFailed,
    ItemLost,
    LanguageLoad,
    Message,
    Peers,
    PromptLogprobs,
    Pull,
    RankHello,
    Refused,
    Spans,
    Stop,
    StoreAt,
    Tokens,
    Welcome,
)
from qwen3vl_disagg.protocol.pump import Pump
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import (
    TOKEN_ID_BYTES,
    Abandon,
    Action,
    Admit,
    AdmitTogether,
    Deliver,
    Drain,
    End,
    EndAll,
    Event,
    FromRank,
    RankDown,
    RankUp,
    RouterLimits,
    Send,
)
from qwen3vl_disagg.transport.control import MAX_HUB_FRAME, Connection
from qwen3vl_disagg.transport.doorkeeper import Doorkeeper
from qwen3vl_disagg.transport.ticks import tick

logger = logging.getLogger(__name__)
EXPECTED_TOKENS = 1024
CLOSE_S = 2.0


@dataclass
class _Handle:
    """An answer as its HTTP handler sees it."""

    hub: Hub
    request_id: str
    sample: int
    items: list[VisualItem]
    events: asyncio.Queue[ClientEvent | DisaggError] = field(default_factory=asyncio.Queue)
    undecoded: set[int] = field(default_factory=set)

    async def __aiter__(self) -> AsyncIterator[ClientEvent]:
        while True:
            event = await self.events.get()
            if isinstance(event, DisaggError):
                raise event
            yield event
            if isinstance(event, FinishedEvent):
                return

    def cancel(self) -> None:
        self.hub.take(Abandon(self.request_id, self.sample))

    def deliver(self, message: Decoded | PromptLogprobs | Tokens | Finished) -> None:
        """What is said of the request's prompt, or of this answer."""
        match message:
            case Decoded():
                self._decoded({message.item})
            case PromptLogprobs():
                self.events.put_nowait(message)
            case Tokens():
                # Another connection than the one that brings the news of decoded items: it may be faster.
                self._decoded(set(self.undecoded))
                for i, token_id in enumerate(message.token_ids):
                    entry = message.logprobs[i] if message.logprobs else None
                    self.events.put_nowait(TokenEvent(token_id, entry, None if i else message.timings))
            case Finished():
                self._decoded(set(self.undecoded))
                self.events.put_nowait(FinishedEvent(message.finish_reason, message.timings, message.vector))

    def _decoded(self, items: set[int]) -> None:
        if self.undecoded and items:
            self.undecoded -= items
            if not self.undecoded:
                self.events.put_nowait(AllDecoded())


def _log_failure(key: RankKey, message: Message) -> None:
    """One line for each attempt that failed: clients do not hear of it when another one succeeds."""
    if isinstance(message, ItemLost) or (isinstance(message, ItemFailed) and not message.failure.is_final):
        reason = message.reason if isinstance(message, ItemLost) else message.failure.message
        name = f"request {message.request_id}, item {message.item}, attempt {message.attempt}"
        logger.warning("%s rank %d: %s: %s", *key, name, reason)


def _num_expected(sampling: SamplingParams) -> int:
    """Tokens of an answer that a rank is counted to have: one of which nobody said how long it may be is none of the
    context's whole rest."""
    return min(sampling.max_new_tokens, EXPECTED_TOKENS) if sampling.is_open_ended else sampling.max_new_tokens


class Hub:
    """The `Backend` of the HTTP app, and the server that ranks connect to."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        token: str,
        *,
        media: MediaStore | None = None,
        memory: JobMemory | None = None,
        limits: RouterLimits | None = None,
    ) -> None:
        self._token = token
        self._layout, self._memory = layout, memory or JobMemory()
        self._registry = Registry(layout, token, self._memory)
        together = layout.language_ranks if config.text.num_experts else ()
        self._router = Router(limits, required=together)
        self._pump = Pump[Event, Action](self._router.handle, self._perform, time.monotonic)
        self.media = MediaStore() if media is None else media
        self._ranks: dict[RankKey, Connection] = {}
        self._loads, self._traces = Loads(), Traces()
        self._handles: dict[str, list[_Handle]] = {}
        """Request -> its answers."""
        self._store_is_known = asyncio.Event()
        if self._memory.store_address is not None:
            self._store_is_known.set()
        self._prefix = secrets.token_hex(4)
        self._num_requests = 0
        self._was_ready = False
        self._closing = asyncio.Event()
        self.end_job = asyncio.Event()
        """Set when a node is asked to end: whoever runs the hub should end the job."""
        self._absent: set[RankKey] = set()
        self._lost: set[RankKey] = set()
        """Ranks that were here and will not come back."""
        self._server: Doorkeeper | None = None
        self._ticker: asyncio.Future[None] | None = None

    # ---- for the HTTP app ----

    def submit(self, prompts: Sequence[PromptCall], timeout_s: float) -> list[_Handle]:
        admits, handles = list[Admit](), list[_Handle]()
        for prompt in prompts:
            items, sampling = prompt.items, prompt.sampling
            self._num_requests += 1
            request_id = self._router.kept_id(prompt.keep_as) or f"{self._prefix}-{self._num_requests}"
            num_tokens = len(prompt.token_ids) // TOKEN_ID_BYTES + _num_expected(sampling)
            target_s, keep_as = prompt.target_s, prompt.keep_as
            admit = Admit(request_id, prompt.token_ids, num_tokens, items, sampling, timeout_s, target_s, keep_as)
            admits.append(admit)
            self._handles[request_id] = [
                _Handle(self, request_id, sample, items, undecoded=set(range(len(items))))
                for sample in range(sampling.n)
            ]
            handles += self._handles[request_id]
        self.take(AdmitTogether(admits))
        if admits[0].request_id not in self._handles:
            refusal = handles[0].events.get_nowait()
            if isinstance(refusal, DisaggError):
                raise refusal
        for handle in handles:
            if not handle.items:
                handle.events.put_nowait(AllDecoded())
        return handles

    def refusal(self, num_coming: int = 0) -> DisaggError | None:
        readiness = self._presence()
        if not readiness.ready:
            return UnavailableError("the server is not ready: " + "; ".join(readiness.reasons))
        return self._router.refusal(time.monotonic(), num_coming=num_coming)

    def readiness(self) -> Readiness:
        """As `_presence`, and whether all language ranks get on: others should be asked then, but who asks is heard."""
        stuck = self._loads.stuck(time.monotonic())
        return Readiness(ready=False, reasons=stuck) if stuck else self._presence()

    def _presence(self) -> Readiness:
        """Ready once every language rank is there with a link from some encode rank; after that, and where others
        are linked, a missing encode rank only degrades, as a language rank does that others can do without."""
        router = self._router
        if router.is_draining:
            return Readiness(ready=False, reasons=["the server is shutting down"])
        language = set(self._layout.language_ranks)
        reasons = [f"language rank {rank} is missing" for rank in sorted(language - router.language_ranks)]
        if reasons and (router.required or not self._was_ready or not router.linked_language_ranks):
            return Readiness(ready=False, reasons=reasons)
        missing = sorted(set(self._layout.encode_ranks) - router.encode_ranks)
        reasons += [f"encode rank {rank} is missing" for rank in missing]
        unlinked = sorted(router.language_ranks - router.linked_language_ranks)
        reasons += [f"language rank {rank} has no link to an encode rank" for rank in unlinked]
        self._was_ready = self._was_ready or not unlinked
        return Readiness(ready=self._was_ready, degraded=bool(reasons), reasons=reasons)

    def rank_loads(self) -> dict[RankKey, Load | None]:
        missing: dict[RankKey, Load | None] = dict.fromkeys(sorted(self._all_ranks()))
        silent = {key: EncodeLoad() if key[0] == "encode" else LanguageLoad() for key in self._ranks}
        return missing | silent | dict(self._loads)

    def business(self) -> dict[str, Any]:
        """Of all ranks together, for a line of the log; nothing where there is nothing to do."""
        return {"requests": self._router.num_requests} | self._loads.sums() if self._router.num_requests else {}

    async def spans(self, after: int = 0) -> Watched:
        await self._traces.collect()
        return await asyncio.to_thread(self._traces.since, after)

    def debug_processes(self) -> list[dict[str, Any]]:
        ranks = [
            {"role": role, "rank": rank, "pid": hello.pid, "address": c.peer[0], "weight_bytes": hello.weight_bytes}
            for (role, rank), c in self._ranks.items()
            for hello in [self._registry.hellos[role, rank]]
        ]
        return [{"role": "frontend", "pid": os.getpid()}, *ranks]

    # ---- lifetime ----

    async def serve(self, sock: socket.socket) -> asyncio.Future[None]:
        """Take connections on a bound socket, until `close`. What it returns ends only if the hub fails before."""
        self._server = Doorkeeper(
            sock, self._greet, token=self._token, messages=HubMessage, max_frame=MAX_HUB_FRAME, name="hub"
        )
        self._ticker = asyncio.create_task(tick(self.take, must_succeed=True))
        return self._ticker

    async def drain(self, limit_s: float) -> None:
        """Admit nothing more and wait until nothing runs; after `limit_s` end what is left with an error."""
        self.take(Drain())
        end = time.monotonic() + limit_s
        while self._router.num_requests and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.take(EndAll(UnavailableError("the server is shutting down")))

    async def close(self, limit_s: float) -> None:
        """Tell every rank to stop, also those still to come; returns when all have left, or after `limit_s`."""
        self._closing.set()
        self._absent = self._all_ranks() - self._ranks.keys() - self._lost
        for connection in self._ranks.values():
            self._post(connection, Stop())
        end = time.monotonic() + limit_s
        while (self._ranks or self._absent) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self._ticker is not None:
            self._ticker.cancel()
        if self._server is not None:
            self._server.close()
            # Handlers still closing their connections.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), CLOSE_S)

    def _all_ranks(self) -> set[RankKey]:
        encode, language = self._layout.encode_ranks, self._layout.language_ranks
        return {("encode", rank) for rank in encode} | {("language", rank) for rank in language}

    # ---- router ----

    def take(self, event: Event) -> None:
        """Let the router decide, and do what it says."""
        self._pump.handle(event)

    def _perform(self, action: Action) -> None:
        match action:
            case Send():
                connection = self._ranks.get((action.role, action.rank))
                if connection is not None:
                    self._post(connection, action.message)
            case Deliver():
                handles = self._handles.get(action.request_id, [])
                match action.message:
                    case Decoded():
                        concerned = handles
                    case PromptLogprobs():
                        concerned = handles[:1]
                    case Tokens(sample=sample) | Finished(sample=sample):
                        concerned = handles[sample : sample + 1]
                for handle in concerned:
                    handle.deliver(action.message)
            case End():
                handles = self._handles.pop(action.request_id, [])
                self.media.release(handles[0].items if handles else [])
                if action.error is not None:
                    for handle in handles:
                        handle.events.put_nowait(action.error)

    @staticmethod
    def _post(connection: Connection, message: Message) -> None:
        try:
            connection.post(message)
        except TransferError:
            return  # the connection is gone; its reader finds out

    # ---- ranks ----

    async def _greet(self, first: Message, connection: Connection) -> None:
        """What a connection is for is said by its first message, which has shown the token."""
        try:
            match first:
                case Pull():
                    await self.media.answer(connection, first)
                case StoreAt():
                    self._learn_store(first.address)
                    await connection.send(Welcome())
                case FindStore():
                    await self._tell_store(connection, first.token)
                case EndJob():
                    self._give_up({key for key in self._all_ranks() if key[1] == first.lost})
                    self.end_job.set()
                case RankHello():
                    await self._welcome(connection, first)
        except HandshakeError as error:
            await connection.send(Refused(field=error.field, expected=str(error.expected), got=str(error.got)))

    def _give_up(self, keys: set[RankKey]) -> None:
        """These will not come, nor come again."""
        self._lost |= keys - self._ranks.keys()
        self._absent -= self._lost

    def _learn_store(self, address: tuple[str, int]) -> None:
        try:
            self._memory.store_address = address
        except ValueError as error:
            raise HandshakeError("store_address", "an address", str(error)) from None
        self._store_is_known.set()

    async def _tell_store(self, connection: Connection, token: str) -> None:
        await self._wait_for(self._store_is_known, connection)
        address = self._memory.store_address
        await connection.send(Stop() if address is None else StoreAt(token=token, address=address))

    async def _wait_for(self, event: asyncio.Event, connection: Connection) -> None:
        """Until it is set, or the hub closes. TransferError if the peer leaves before."""
        peer = asyncio.ensure_future(connection.receive())
        waits = [asyncio.create_task(e.wait()) for e in (event, self._closing)]
        try:
            await asyncio.wait([peer, *waits], return_when=asyncio.FIRST_COMPLETED)
            if peer.done():
                raise TransferError(f"{type(peer.result()).__name__} before the answer to what was asked first")
        finally:
            for task in (peer, *waits):
                task.cancel()
            await asyncio.gather(peer, *waits, return_exceptions=True)

    async def _welcome(self, connection: Connection, hello: RankHello) -> None:
        """Serve one rank until its connection ends."""
        registry = self._registry
        if not registry.has_measure.is_set() and not registry.is_of_a_slot(hello.role, hello.rank):
            await self._wait_for(registry.has_measure, connection)
            if self._closing.is_set():
                await connection.send(Stop())
                return
        rank = registry.take(hello)
        key: RankKey = (hello.role, rank)
        if key in self._ranks:  # an earlier incarnation, whose end has not been noticed yet
            self._ranks[key].abort()
        self._ranks[key] = connection
        self._lost.discard(key)
        self._loads.forget(key)
        try:
            await connection.send(Welcome(rank=rank, job=self._memory.job))
            connection.keep_alive()
            self.take(RankUp(hello.role, rank, hello.kv_tokens, hello.kept))
            self._traces.up(key, partial(self._post, connection), has_our_clock=hello.host == host_id())
            self._introduce()
            if self._closing.is_set():
                self._absent.discard(key)
                self._post(connection, Stop())
            while True:
                message = await connection.receive()
                if self._ranks.get(key) is not connection:
                    return
                if isinstance(message, LanguageLoad | EncodeLoad):
                    self._loads.note(key, message, time.monotonic())
                    continue
                if isinstance(message, Spans):
                    self._traces.note(key, message)
                    continue
                _log_failure(key, message)
                self.take(FromRank(hello.role, rank, message))
        except TransferError:
            return
        finally:
            if self._ranks.get(key) is connection:
                del self._ranks[key], registry.hellos[key]
                self._loads.forget(key)
                self._traces.down(key)
                # Experts that are lost end the job, and after a signal nothing is started again.
                if (hello.role == "language" and rank in self._router.required) or self._memory.stopped_at:
                    self._lost.add(key)
                self.take(RankDown(hello.role, rank))

    def _introduce(self) -> None:
        """Tell all encode ranks who the language ranks are."""
        hellos = self._registry.hellos.items()
        links = sorted((rank, *h.link_address) for (_, rank), h in hellos if h.link_address is not None)
        for connection in [connection for (role, _), connection in self._ranks.items() if role == "encode"]:
            self._post(connection, Peers(language_ranks=links))
