"""The encode side of all links: connects to every language rank, and again when a link is lost."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qwen3vl_disagg.core.errors import DisaggError, HandshakeError, TransferError
from qwen3vl_disagg.disagg.control import Address, Connection, ConnectionLost, connect_link
from qwen3vl_disagg.disagg.encode_worker import EncodedItem
from qwen3vl_disagg.disagg.links import Link, LinkBroken, LinkFactory
from qwen3vl_disagg.disagg.messages import (
    Abort,
    Ack,
    Goodbye,
    Grant,
    HeaderOk,
    LinkAccept,
    LinkHello,
    LinkReady,
    Message,
    Nack,
    Refused,
)

CONNECT_S = 20.0
PAYLOAD_S = 10.0
ANSWER_S = 15.0
MAX_ENDED = 4096

Attempt = tuple[str, int, int]  # request id, item, attempt


def attempt_of(message: Any) -> Attempt:
    return message.request_id, message.item, message.attempt


@dataclass
class _Answers:
    """What a language rank said about one attempt."""

    grant: asyncio.Future[Grant]
    header_ok: asyncio.Future[None]
    ack: asyncio.Future[None]

    @classmethod
    def pending(cls) -> _Answers:
        loop = asyncio.get_running_loop()
        return cls(loop.create_future(), loop.create_future(), loop.create_future())

    def fail(self, reason: str) -> None:
        for future in (self.grant, self.header_ok, self.ack):
            if not future.done():
                future.set_exception(TransferError(reason))
                future.exception()  # nobody may be waiting for this one


@dataclass
class EncodeLink:
    """One live link. Payloads go out one after another, each in the order of its header."""

    language_rank: int
    epoch: int
    control: Connection
    payload: Link
    thread: ThreadPoolExecutor
    order: asyncio.Lock = field(default_factory=asyncio.Lock)
    answers: dict[Attempt, _Answers] = field(default_factory=dict)
    delivering: set[Attempt] = field(default_factory=set)
    _ended: OrderedDict[Attempt, None] = field(default_factory=OrderedDict)
    """The last attempts that ended: a grant for one of them comes too late."""

    def answers_for(self, attempt: Attempt) -> _Answers:
        """A grant may come before the item itself is known here, or after."""
        return self.answers.setdefault(attempt, _Answers.pending())

    async def wait_grant(self, attempt: Attempt, timeout: float) -> Grant:
        """Room for the item. TransferError if it is refused, the link is lost, or `timeout` seconds pass."""
        return await _within(self.answers_for(attempt).grant, timeout, "no room was granted")

    async def deliver(self, encoded: EncodedItem, grant: Grant) -> None:
        """Send one item's rows and wait until they are acknowledged. TransferError if they are not.

        Not to be cancelled: once the header is answered the payload has to follow.
        """
        attempt = attempt_of(grant)
        answers = self.answers_for(attempt)
        header, payload = encoded.header(grant), encoded.payload(grant)
        self.delivering.add(attempt)
        try:
            async with self.order:
                await self.control.send(header)
                await self._header_answered(answers)
                await self._send(payload)
            await _within(answers.ack, ANSWER_S, "the rows were not acknowledged")
        finally:
            self.delivering.discard(attempt)
            self.forget(attempt)

    async def _header_answered(self, answers: _Answers) -> None:
        await asyncio.wait([answers.header_ok], timeout=ANSWER_S)
        if not answers.header_ok.done():
            # The peer may be about to wait for this payload: it would take the next one for it.
            self.control.abort()
            raise LinkBroken(f"the header was not answered within {ANSWER_S:g} s")
        answers.header_ok.result()

    async def _send(self, payload: list[Tensor]) -> None:
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.thread, self.payload.send, payload, PAYLOAD_S)
        except LinkBroken:
            self.control.abort()  # its reader drops the link
            raise

    def forget(self, attempt: Attempt) -> None:
        """An attempt has ended, or is given up; a delivery under way ends by itself."""
        if attempt in self.delivering:
            return
        self._ended[attempt] = None
        while len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)
        if attempt in self.answers:
            self.answers.pop(attempt).fail("given up")

    def handle(self, message: Message) -> None:
        """A frame from the language rank. Frames about attempts that ended change nothing."""
        match message:
            case Grant() if attempt_of(message) in self._ended:
                request_id, item, attempt = attempt_of(message)
                late = Abort(request_id=request_id, item=item, attempt=attempt, reason="given up")
                self.control.post(late)  # so that the language rank takes its blocks back
            case Grant():
                answers = self.answers_for(attempt_of(message))
                if not answers.grant.done():
                    answers.grant.set_result(message)
            case HeaderOk() | Ack():
                known = self.answers.get(attempt_of(message))
                if known is not None:
                    future = known.header_ok if isinstance(message, HeaderOk) else known.ack
                    if not future.done():
                        future.set_result(None)
            case Nack() | Abort():
                known = self.answers.pop(attempt_of(message), None)
                if known is not None:
                    known.fail(message.reason)


async def _within(future: asyncio.Future[Any], timeout: float, what: str) -> Any:
    try:
        return await asyncio.wait_for(asyncio.shield(future), timeout)
    except TimeoutError:
        raise TransferError(f"{what} within {timeout:g} s") from None


class EncodeLinks:
    """Keeps one link to each language rank alive.

    `on_change` is called with the live links (language rank, epoch), whenever they change; `on_refused` when a language
    rank says that this rank does not fit: there is no use in trying again then.
    """

    def __init__(
        self,
        hello: LinkHello,
        *,
        on_change: Callable[[list[tuple[int, int]]], None],
        on_refused: Callable[[HandshakeError], None],
    ) -> None:
        self._hello, self._on_change, self._on_refused = hello, on_change, on_refused
        self._links: dict[int, EncodeLink] = {}
        self._keepers: dict[tuple[int, Address], asyncio.Task[None]] = {}

    def get(self, language_rank: int) -> EncodeLink | None:
        return self._links.get(language_rank)

    @property
    def linked(self) -> list[tuple[int, int]]:
        return sorted((rank, link.epoch) for rank, link in self._links.items())

    def connect(self, peers: list[tuple[int, str, int]], make_link: LinkFactory) -> None:
        """Link to these language ranks (rank, host, port); those already known are left alone."""
        for language_rank, host, port in peers:
            key = (language_rank, (host, port))
            if key not in self._keepers:
                self._keepers[key] = asyncio.create_task(self._keep(language_rank, (host, port), make_link))

    async def _keep(self, language_rank: int, address: Address, make_link: LinkFactory) -> None:
        pause = 0.05
        while True:
            try:
                link = await self._open(language_rank, address, make_link)
            except HandshakeError as error:
                self._on_refused(error)
                return
            except DisaggError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 2.0)
                continue
            pause = 0.05
            self._links[language_rank] = link
            self._on_change(self.linked)
            reason = "the language rank left"
            try:
                while not isinstance(message := await link.control.receive(), Goodbye):
                    link.handle(message)
            except TransferError as error:
                reason = str(error)
            finally:
                self._lose(link, reason)
            await link.control.close()

    async def _open(self, language_rank: int, address: Address, make_link: LinkFactory) -> EncodeLink:
        control = await connect_link(address, deadline_s=CONNECT_S)
        try:
            await control.send(self._hello)
            answer = await control.receive(timeout=CONNECT_S)
            if isinstance(answer, Refused):
                raise HandshakeError(answer.field, answer.expected, answer.got)
            if not isinstance(answer, LinkAccept) or answer.language_rank != language_rank:
                raise TransferError(f"language rank {language_rank} answered {type(answer).__name__}")
            payload = await asyncio.to_thread(make_link, "encode", self._hello.encode_rank, language_rank, answer.epoch)
            if not isinstance(await control.receive(timeout=CONNECT_S), LinkReady):
                raise TransferError(f"language rank {language_rank} did not get ready")
        except BaseException:
            await control.close()
            raise
        control.keep_alive()
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"link-{language_rank}")
        return EncodeLink(language_rank, answer.epoch, control, payload, thread)

    def _lose(self, link: EncodeLink, reason: str) -> None:
        if self._links.get(link.language_rank) is link:
            del self._links[link.language_rank]
        for answers in link.answers.values():
            answers.fail(reason)
        link.answers.clear()
        link.thread.shutdown(wait=False)
        self._on_change(self.linked)

    async def close(self) -> None:
        """Say goodbye on every link and stop connecting."""
        for link in self._links.values():
            try:
                link.control.post(Goodbye())
            except ConnectionLost:
                continue
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
