"""The encode side's connections: one link to each language rank, and again when it is lost. What travels over them is
decided by the sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from qwen3vl_disagg.core.errors import DisaggError, HandshakeError, TransferError
from qwen3vl_disagg.core.faults import fault_point
from qwen3vl_disagg.encode.link_canary import CheckedRows
from qwen3vl_disagg.protocol.messages import Frame, Goodbye, LinkAccept, LinkHello, LinkReady, Refused
from qwen3vl_disagg.transport.control import Connection, ConnectionLost, Dial, connect_link
from qwen3vl_disagg.transport.links import Link, LinkFactory, meet, while_there
from qwen3vl_disagg.transport.refusals import Refusals
from qwen3vl_disagg.transport.sockets import Address
from qwen3vl_disagg.transport.tls import FIELD

logger = logging.getLogger(__name__)
CONNECT_S = 20.0
TLS_PAUSE_S = 2.0


@dataclass
class EncodeLink:
    """One live link; `thread` sends its payloads one after another."""

    language_rank: int
    epoch: int
    control: Connection
    payload: Link
    thread: ThreadPoolExecutor

    def post(self, frame: Frame) -> None:
        """Queue a frame; when the connection is gone its reader finds out."""
        try:
            self.control.post(frame)
        except ConnectionLost:
            return
        except Exception as error:  # a frame that does not go out leaves a gap: this link is over, and no other
            logger.error("a frame to language rank %d did not go out", self.language_rank, exc_info=error)
            self.control.abort()


class EncodeLinks:
    """Keeps one link to each language rank alive.

    `on_up` and `on_down` are called when a link comes and goes, `on_frame` with what the other end says, `on_refused`
    when a language rank says that this rank does not fit: there is no use in trying again then. `canary`: what is sent
    over each new link first.
    """

    def __init__(
        self,
        hello: LinkHello,
        *,
        on_up: Callable[[EncodeLink], None],
        on_down: Callable[[EncodeLink, str], None],
        on_frame: Callable[[EncodeLink, Frame], None],
        on_refused: Callable[[HandshakeError], None],
        canary: CheckedRows | None = None,
    ) -> None:
        self.hello = msgspec.structs.replace(hello, has_canary=canary is not None)
        self._canary = canary
        self._on_up, self._on_down, self._on_frame, self._on_refused = on_up, on_down, on_frame, on_refused
        self._links: dict[int, EncodeLink] = {}
        self._keepers: dict[int, tuple[Address, asyncio.Task[None]]] = {}
        self._last_epochs: dict[int, int] = {}
        self._refusals = Refusals()

    def get(self, language_rank: int, epoch: int) -> EncodeLink | None:
        link = self._links.get(language_rank)
        return link if link is not None and link.epoch == epoch else None

    @property
    def linked(self) -> list[tuple[int, int]]:
        """Live links: (language rank, epoch)."""
        return sorted((rank, link.epoch) for rank, link in self._links.items())

    def connect(self, peers: list[tuple[int, str, int]], make_link: LinkFactory, dial: Dial = connect_link) -> None:
        """Link to these language ranks (rank, host, port); those already known are left alone. One with another address
        was started again: the link to it as it was is given up."""
        for language_rank, host, port in peers:
            known, keeper = self._keepers.get(language_rank, (None, None))
            if known == (host, port):
                continue
            if keeper is not None:
                keeper.cancel()
            task = asyncio.create_task(self._keep(language_rank, (host, port), make_link, dial))
            self._keepers[language_rank] = ((host, port), task)

    async def _keep(self, language_rank: int, address: Address, make_link: LinkFactory, dial: Dial) -> None:
        pause = 0.05
        while True:
            try:
                link = await self._open(language_rank, make_link, await dial(address, deadline_s=CONNECT_S))
            except HandshakeError as error:
                if error.field != FIELD:
                    self._on_refused(error)
                    return
                # New files may be on their way.
                self._refusals.say(str(language_rank), f"no link to language rank {language_rank}: {error}")
                await asyncio.sleep(TLS_PAUSE_S)
                continue
            except Exception as error:  # whatever is in the way now may be gone the next time
                if not isinstance(error, DisaggError):
                    logger.error("no link to language rank %d", language_rank, exc_info=error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 2.0)
                continue
            pause = 0.05
            self._links[language_rank] = link
            self._last_epochs[language_rank] = link.epoch
            self._on_up(link)
            reason = "the language rank left"
            try:
                while not isinstance(message := await link.control.receive(), Goodbye):
                    if isinstance(message, Frame):
                        self._on_frame(link, message)
            except TransferError as error:
                reason = str(error)
            except Exception as error:  # one link's failure is not the rank's
                logger.error("the link to language rank %d failed", language_rank, exc_info=error)
                reason = type(error).__name__
            finally:
                self._lose(link, reason)
            await link.control.close()

    async def _open(self, language_rank: int, make_link: LinkFactory, control: Connection) -> EncodeLink:
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"link-{language_rank}")
        try:
            last_epoch = self._last_epochs.get(language_rank, 0)
            await control.send(msgspec.structs.replace(self.hello, last_epoch=last_epoch))
            answer = await control.receive(timeout=CONNECT_S)
            if isinstance(answer, Refused):
                raise HandshakeError(answer.field, answer.expected, answer.got)
            if not isinstance(answer, LinkAccept) or answer.language_rank != language_rank:
                raise TransferError(f"language rank {language_rank} answered {type(answer).__name__}")
            fault_point("in-handshake")
            ends = (self.hello.encode_rank, language_rank, answer.epoch)
            payload = await meet(control, thread, make_link, "encode", *ends)
            if self._canary is not None:
                await control.send(self._canary.announcement())
                await while_there(control.lost(), thread, self._canary.send, payload, CONNECT_S)
            ready = await control.receive(timeout=CONNECT_S)
            if isinstance(ready, Refused):
                raise HandshakeError(ready.field, ready.expected, ready.got)
            if not isinstance(ready, LinkReady):
                raise TransferError(f"language rank {language_rank} did not get ready")
        except BaseException:
            thread.shutdown(wait=False)
            await control.close()
            raise
        control.keep_alive()
        return EncodeLink(language_rank, answer.epoch, control, payload, thread)

    def _lose(self, link: EncodeLink, reason: str) -> None:
        if self._links.get(link.language_rank) is link:
            del self._links[link.language_rank]
        link.payload.close()
        link.thread.shutdown(wait=False)
        self._on_down(link, reason)

    async def close(self) -> None:
        """Say goodbye on every link and stop connecting."""
        fault_point("in-drain")
        links = list(self._links.values())
        for link in links:
            try:
                link.control.post(Goodbye())
            except ConnectionLost:
                continue
        keepers = [keeper for _, keeper in self._keepers.values()]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        await asyncio.gather(*[link.control.close() for link in links])
