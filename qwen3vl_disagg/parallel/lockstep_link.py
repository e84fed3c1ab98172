"""Lockstep over TCP: every rank that shares experts has one connection with the first of them, the first one too.

Liveness is decided here as well: the end of a connection, or its silence, is the end of all of them, because the
experts of the one that is gone are gone, and the others may wait in a collective that will not say so.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

from qwen3vl_disagg.core.errors import DeadlineError, HandshakeError, TransferError, UnavailableError
from qwen3vl_disagg.parallel.lockstep import (
    Lockstep,
    LockstepMessage,
    Outlook,
    Over,
    PeerHello,
    PeerWelcome,
    ReadyToLeave,
    StepPlan,
)
from qwen3vl_disagg.protocol.messages import Message, Refused
from qwen3vl_disagg.transport.control import MAX_LINK_FRAME, Connection, ConnectionLost, encode_frame
from qwen3vl_disagg.transport.doorkeeper import Door
from qwen3vl_disagg.transport.opening import Opening, secure_now
from qwen3vl_disagg.transport.sockets import Address
from qwen3vl_disagg.transport.tls import Tls

CONNECT_S = 10.0
LOAD_S = 1800.0
"""The first rank answers when it has loaded. That it is gone meanwhile is seen by the line."""
GONE = "a language rank is gone, and with it its experts"


class PeerLost(UnavailableError):
    """A rank that holds experts is gone."""

    code = "language_rank_lost"


Line = tuple[Message, Opening]
"""What a rank said first, and the way back to it."""


def say_hello(address: Address, hello: PeerHello, tls: Tls | None = None) -> Opening:
    """Connect to the first rank and say hello; blocks for `CONNECT_S` at most, at a time. PeerLost if none listens
    there, HandshakeError if it is none of the CA's.

    Done before a rank loads: if it dies meanwhile, what the first rank finds on its line is a hello and the end. The
    kernel watches over a line on which nothing is said.
    """
    try:
        sock = socket.create_connection(address, CONNECT_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        line = secure_now(sock, tls)
        line.send_now(encode_frame(hello, MAX_LINK_FRAME))
    except OSError as error:
        raise PeerLost(f"{GONE}: no connection to the first: {type(error).__name__}") from error
    sock.setblocking(False)
    return line


class Gathering:
    """The first rank's side until all have said hello, itself too, before any of them loads."""

    def __init__(self, sock: socket.socket, *, token: str, tls: Tls | None = None) -> None:
        self._lines: list[Line] = []
        self._has_come = asyncio.Event()
        self._door = Door(sock, self._take, token=token, messages=LockstepMessage, name="lockstep", tls=tls)

    async def _take(self, hello: Message, line: Opening) -> None:
        self._lines.append((hello, line))
        self._has_come.set()

    async def all(self, num_ranks: int, deadline_s: float) -> list[Line]:
        """One for each rank; takes no more then. PeerLost when some have not come in time."""
        try:
            async with asyncio.timeout(deadline_s):
                while len(self._lines) < num_ranks:
                    self._has_come.clear()
                    await self._has_come.wait()
        except TimeoutError:
            raise PeerLost(f"{len(self._lines)} of {num_ranks} language ranks came in {deadline_s:g} s") from None
        finally:
            self._door.close()
        await self._door.wait_closed()
        return self._lines


class LockstepServer:
    """The first rank's side from then on: carries out what `Lockstep` decides."""

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self._peers: dict[int, Connection] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False

    def serve(self, lines: Sequence[Line]) -> None:
        """The ranks that have come."""
        self._tasks += [asyncio.create_task(self.take_in(*line)) for line in lines]

    async def close(self) -> None:
        """Send what is queued, and close."""
        for peer in list(self._peers.values()):
            await peer.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    async def take_in(self, hello: Message, line: Opening) -> None:
        """One rank, until its line ends."""
        try:
            peer = Connection(*await line.streams(), messages=LockstepMessage, max_frame=MAX_LINK_FRAME)
        except OSError:  # it died meanwhile
            line.close()
            if isinstance(hello, PeerHello) and not self._is_over:
                self._abort(hello.rank)
            return
        try:
            await self._accept(hello, peer)
        finally:
            await peer.close()

    async def _accept(self, hello: Message, peer: Connection) -> None:
        rank = None
        try:
            rank = await self._let_in(hello, peer)
            await peer.send(PeerWelcome())
            peer.keep_alive()
            while True:
                self._take(rank, await peer.receive())
        except (TransferError, OSError):
            return  # it is gone; or none of ours, or does not fit, and has been told
        finally:
            if rank is not None and not self._is_over:
                self._abort(rank)

    async def _let_in(self, hello: Message, peer: Connection) -> int:
        if self._is_over:
            raise ConnectionLost("another rank is gone")
        try:
            if not isinstance(hello, PeerHello):
                raise TransferError(f"{type(hello).__name__} in place of a hello")
            self._lockstep.join(hello.rank)
        except HandshakeError as error:
            await peer.send(Refused(field=error.field, expected=str(error.expected), got=str(error.got)))
            raise
        self._peers[hello.rank] = peer
        return hello.rank

    def _take(self, rank: int, message: Message) -> None:
        match message:
            case Outlook():
                plan = self._lockstep.report(rank, message)
                if plan is not None:
                    self._tell_all(plan)
            case ReadyToLeave():
                if self._lockstep.leave(rank):
                    self._is_over = True
                    self._tell_all(Over())

    def _tell_all(self, message: Message) -> None:
        for rank, peer in self._peers.items():
            try:
                peer.post(message)
            except ConnectionLost:
                self._abort(rank)
                return

    def _abort(self, rank: int) -> None:
        """Rank `rank` is gone: everybody's connection ends, and with it everybody."""
        self._is_over = True
        for other, peer in self._peers.items():
            if other != rank:
                peer.abort()


class LockstepClient:
    """One rank's side. `run` until all leave; `report` from any thread; `on_plan` is called on the event loop."""

    def __init__(self, connection: Connection, on_plan: Callable[[StepPlan], None] = lambda plan: None) -> None:
        self.on_plan = on_plan
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._is_over = asyncio.Event()

    @classmethod
    async def join(cls, line: Opening, *, deadline_s: float = LOAD_S) -> LockstepClient:
        """On a line that `say_hello` has made. PeerLost if the first rank is gone, or does not answer in time;
        HandshakeError if it refuses."""
        connection = Connection(*await line.streams(), messages=LockstepMessage, max_frame=MAX_LINK_FRAME)
        try:
            answer = await connection.receive(timeout=deadline_s)
        except (TransferError, DeadlineError) as error:
            await connection.close()
            if isinstance(error, HandshakeError):
                raise
            raise PeerLost(f"{GONE}: {error}") from error
        if isinstance(answer, PeerWelcome):
            return cls(connection.keep_alive())
        await connection.close()
        if isinstance(answer, Refused):
            raise HandshakeError(answer.field, answer.expected, answer.got)
        raise TransferError(f"the first language rank answered {type(answer).__name__}")

    async def run(self) -> None:
        """Until all want to leave. PeerLost when one of them is gone."""
        try:
            while not isinstance(message := await self._connection.receive(), Over):
                if isinstance(message, StepPlan):
                    self.on_plan(message)
        except TransferError as error:
            raise PeerLost(f"{GONE}: {error}") from error
        self._is_over.set()

    def report(self, outlook: Outlook) -> None:
        self._loop.call_soon_threadsafe(self._post, outlook)

    async def leave(self, patience_s: float) -> bool:
        """Say that this rank wants nothing any more; whether all said so within `patience_s`."""
        self._post(ReadyToLeave())
        try:
            await asyncio.wait_for(self._is_over.wait(), patience_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        await self._connection.close()

    def _post(self, message: Message) -> None:
        try:
            self._connection.post(message)
        except ConnectionLost:
            return  # `run` finds out
