"""The language side of all links: lets encode ranks in, grants them room, receives what they send.

One event loop for the control connections; for each link one thread that receives payloads in the order of their
headers. A link is gone when its control connection ends or a payload fails; its sessions are then lost (the router
gives them to another encode rank) and the same rank may come back under a new epoch.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from qwen3vl_disagg.core.errors import DisaggError, HandshakeError, TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.disagg.control import Address, Connection, ConnectionLost
from qwen3vl_disagg.disagg.fingerprint import Fingerprint, check_fingerprint
from qwen3vl_disagg.disagg.links import Link, LinkBroken, LinkFactory, process_group_links
from qwen3vl_disagg.disagg.messages import (
    Abort,
    Ack,
    Goodbye,
    Header,
    HeaderOk,
    LinkAccept,
    LinkHello,
    LinkReady,
    Message,
    Nack,
    Refused,
)
from qwen3vl_disagg.disagg.receiver import LanguageReceiver, ReceivedItem, Receiving

HELLO_S = 5.0
PAYLOAD_S = 10.0

Session = tuple[str, int]  # request id, item
ItemSink = Callable[[str, int, Header, ReceivedItem, float, int], None]
LostSink = Callable[[str, int, int, str, int], None]
"""request id, item, attempt, reason, dead epoch (0: the link is sound)"""


@dataclass(frozen=True)
class _Wanted:
    """An item that waits for room."""

    request_id: str
    item: int
    attempt: int
    visual: VisualItem
    encode_rank: int


@dataclass
class _PeerLink:
    """One encode rank's link and the attempts that run over it."""

    encode_rank: int
    epoch: int
    control: Connection
    payload: Link
    thread: ThreadPoolExecutor
    attempts: dict[Session, int] = field(default_factory=dict)


class LinkServer:
    """Set `on_item` and `on_lost` before the first request; both are called on the event loop."""

    on_item: ItemSink
    on_lost: LostSink

    def __init__(
        self,
        receiver: LanguageReceiver,
        *,
        fingerprint: Fingerprint,
        token: str,
        language_rank: int,
        host: str = "127.0.0.1",
        make_link: LinkFactory | None = None,
    ) -> None:
        if not token:
            raise ValueError("an empty token would let anybody in")
        self._receiver, self._fingerprint, self._token = receiver, fingerprint, token
        self._language_rank = language_rank
        self._links: dict[int, _PeerLink] = {}
        self._epochs: dict[int, int] = {}
        self._waiting: deque[_Wanted] = deque()
        self._store: dist.TCPStore | None = None
        self._host, self._make_link = host, make_link
        self._can_meet = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def serve(self) -> Address:
        """Listen for encode ranks on a free port."""
        self._server = await asyncio.start_server(self._accept, self._host, 0)
        return self._server.sockets[0].getsockname()[:2]

    def use_store(self, store: dist.TCPStore) -> None:
        """Where epochs are counted and groups meet; encode ranks wait at the door until it is known."""
        self._store = store
        if self._make_link is None:
            self._make_link = process_group_links(store, host=self._host)
        self._can_meet.set()

    @property
    def has_store(self) -> bool:
        return self._store is not None

    async def close(self) -> None:
        """Say goodbye and let go of everything."""
        if self._server is not None:
            self._server.close()
        for link in list(self._links.values()):
            if not link.control.is_closed:
                link.control.post(Goodbye())
            self._drop(link, "the language rank leaves")
            await link.control.close()

    # -- what the language rank asks for

    def request(self, request_id: str, item: int, attempt: int, visual: VisualItem, encode_rank: int) -> None:
        """Get an item from an encode rank: a grant goes out as soon as there is room, in the order of the calls."""
        session = (request_id, item)
        self._waiting = deque(old for old in self._waiting if (old.request_id, old.item) != session)
        for link in self._links.values():
            self._abort(link, session, "another attempt takes its place")
        self._waiting.append(_Wanted(request_id, item, attempt, visual, encode_rank))
        self._grant_waiting()

    def cancel(self, request_id: str) -> None:
        """Give up all items of a request, wherever they are."""
        self._waiting = deque(wanted for wanted in self._waiting if wanted.request_id != request_id)
        for link in self._links.values():
            for session in [session for session in link.attempts if session[0] == request_id]:
                self._abort(link, session, "cancelled")
        self._receiver.cancel(request_id)
        self._grant_waiting()

    def _abort(self, link: _PeerLink, session: Session, reason: str) -> None:
        """Tell the encode rank that an attempt is no longer wanted, and give up its room."""
        attempt = link.attempts.pop(session, None)
        if attempt is not None:
            self._post(link, Abort(request_id=session[0], item=session[1], attempt=attempt, reason=reason))
            self._receiver.drop(*session, attempt)

    def _grant_waiting(self) -> None:
        while self._waiting:
            wanted = self._waiting[0]
            link = self._links.get(wanted.encode_rank)
            session = (wanted.request_id, wanted.item)
            if link is None:
                self._waiting.popleft()
                reason, epoch = f"no link to encode rank {wanted.encode_rank}", self._epochs.get(wanted.encode_rank, 0)
                self._lose(session, wanted.attempt, reason, epoch)
                continue
            try:
                grant = self._receiver.grant(*session, wanted.attempt, wanted.visual)
            except DisaggError as error:  # larger than the buffers, or stale
                self._waiting.popleft()
                self._lose(session, wanted.attempt, str(error))
                continue
            if grant is None:
                return
            self._waiting.popleft()
            link.attempts[session] = wanted.attempt
            self._post(link, grant)

    # -- links coming and going

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        control = Connection.link(reader, writer)
        try:
            link = await self._handshake(control)
        except (DisaggError, TimeoutError, RuntimeError):
            await control.close()
            return
        self._links[link.encode_rank] = link
        control.keep_alive()
        self._post(link, LinkReady())
        reason = "the encode rank left"
        try:
            while not isinstance(message := await control.receive(), Goodbye):
                self._handle(link, message)
        except TransferError as error:
            reason = str(error)
        self._drop(link, reason)
        await control.close()

    async def _handshake(self, control: Connection) -> _PeerLink:
        hello = await control.receive(timeout=HELLO_S)
        if not isinstance(hello, LinkHello) or not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            await control.send(Refused(field="token", expected="the job's token", got="another"))
            raise HandshakeError("token", "the job's token", "another")
        try:
            check_fingerprint(self._fingerprint, hello.fingerprint)
        except HandshakeError as error:
            await control.send(Refused(field=error.field, expected=str(error.expected), got=str(error.got)))
            raise
        await asyncio.wait_for(self._can_meet.wait(), HELLO_S * 4)
        store, make_link = self._store, self._make_link
        if store is None or make_link is None:
            raise TransferError("the store is not known")
        encode_rank, language_rank = hello.encode_rank, self._language_rank
        if encode_rank in self._links:  # a new incarnation of that rank
            old = self._links[encode_rank]
            self._drop(old, "the encode rank was started again")
            old.control.abort()
        epoch = await asyncio.to_thread(store.add, f"epoch/{encode_rank}-{language_rank}", 1)
        await control.send(LinkAccept(epoch=epoch, language_rank=language_rank))
        payload = await asyncio.to_thread(make_link, "language", encode_rank, language_rank, epoch)
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"link-{encode_rank}")
        self._epochs[encode_rank] = epoch
        return _PeerLink(encode_rank, epoch, control, payload, thread)

    def _drop(self, link: _PeerLink, reason: str) -> None:
        is_current = self._links.get(link.encode_rank) is link
        if is_current:
            del self._links[link.encode_rank]
        attempts, link.attempts = link.attempts, {}
        for session, attempt in attempts.items():
            self._receiver.drop(*session, attempt)
            self._lose(session, attempt, reason, link.epoch)
        if is_current:  # a newer link of the same rank serves what waits
            lost = [wanted for wanted in self._waiting if wanted.encode_rank == link.encode_rank]
            self._waiting = deque(wanted for wanted in self._waiting if wanted.encode_rank != link.encode_rank)
            for wanted in lost:
                self._lose((wanted.request_id, wanted.item), wanted.attempt, reason, link.epoch)
        link.thread.shutdown(wait=False)
        self._grant_waiting()

    def _lose(self, session: Session, attempt: int, reason: str, dead_epoch: int = 0) -> None:
        self.on_lost(*session, attempt, reason, dead_epoch)

    def _post(self, link: _PeerLink, message: Message) -> None:
        try:
            link.control.post(message)
        except ConnectionLost:
            return  # its reader finds out and drops the link

    # -- transfers

    def _handle(self, link: _PeerLink, message: Message) -> None:
        match message:
            case Header():
                self._start_receiving(link, message)
            case Nack() | Abort():
                self._end(link, (message.request_id, message.item), message.attempt, message.reason)

    def _start_receiving(self, link: _PeerLink, header: Header) -> None:
        session, attempt = (header.request_id, header.item), header.attempt
        ids: dict[str, Any] = {"request_id": session[0], "item": session[1], "attempt": attempt}
        try:
            if link.attempts.get(session) != attempt:
                raise TransferError("no such session on this link")
            receiving = self._receiver.begin(header)
        except TransferError as error:
            self._post(link, Nack(**ids, reason=str(error)))
            self._end(link, session, attempt, str(error))
            return
        self._post(link, HeaderOk(**ids))
        work = asyncio.get_running_loop().run_in_executor(link.thread, self._receive, link, receiving)
        work.add_done_callback(lambda done: self._received(link, header, done))

    def _end(self, link: _PeerLink, session: Session, attempt: int, reason: str, dead_epoch: int = 0) -> None:
        """An attempt that failed by itself; stale ones change nothing."""
        if link.attempts.get(session) == attempt:
            del link.attempts[session]
            self._receiver.drop(*session, attempt)
            self._lose(session, attempt, reason, dead_epoch)
            self._grant_waiting()

    def _receive(self, link: _PeerLink, receiving: Receiving) -> tuple[ReceivedItem | None, float]:
        started = time.monotonic()
        received = self._receiver.receive(link.payload, receiving, PAYLOAD_S)
        return received, (time.monotonic() - started) * 1e3

    def _received(self, link: _PeerLink, header: Header, done: asyncio.Future) -> None:
        session, attempt = (header.request_id, header.item), header.attempt
        ids: dict[str, Any] = {"request_id": session[0], "item": session[1], "attempt": attempt}
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is not None:
            self._post(link, Nack(**ids, reason=str(error)))
            is_broken = not isinstance(error, TransferError) or isinstance(error, LinkBroken)
            self._end(link, session, attempt, str(error), link.epoch if is_broken else 0)
            if is_broken:
                link.control.abort()  # its reader drops the link
        else:
            received, transfer_ms = done.result()
            self._post(link, Ack(**ids, received=header.total_rows))
            if received is not None and link.attempts.get(session) == attempt:
                del link.attempts[session]
                num_bytes = self._receiver.buffers.row_sizes.transfer_bytes(
                    header.row_stop - header.row_start, header.deepstack_stop - header.deepstack_start
                )
                self.on_item(*session, header, received, transfer_ms, num_bytes)
        self._grant_waiting()
