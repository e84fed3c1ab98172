"""A rank's way into the hub, and the questions it asks there on connections of their own."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from qwen3vl_disagg.core.errors import DeadlineError, Dismissed, HandshakeError, HubGone, TransferError
from qwen3vl_disagg.protocol.messages import EndJob, FindStore, Message, RankHello, Refused, Stop, StoreAt, Welcome
from qwen3vl_disagg.transport.control import MAX_HUB_FRAME, Connection, ConnectionLost, connect_hub, encode_frame
from qwen3vl_disagg.transport.opening import secure_now
from qwen3vl_disagg.transport.sockets import Address
from qwen3vl_disagg.transport.tls import Tls

logger = logging.getLogger(__name__)
LOAD_S = 1.0
_PAUSE_S = 0.1
_END_S = 2.0
_TLS_S = 10.0
"""With TLS the hub has to answer before it can be told."""


async def enter_hub(
    address: Address, hello: RankHello, *, deadline_s: float, tls: Tls | None = None
) -> tuple[Connection, Welcome]:
    """Connect and say hello until the hub welcomes this rank; a frontend that dies meanwhile is started again.

    The welcome says of which job this is, and to a rank that joins its number. HandshakeError if one of the two
    refuses the other, HubGone if it is not there within `deadline_s`, Dismissed if the job goes down.
    """
    hub, answer = await _ask(address, hello, Welcome, deadline_s, tls)
    return hub.keep_alive(), answer


async def report_load(
    load: Callable[[], Message], tell: Callable[[Message], None], hub: Callable[[], Connection | None]
) -> None:
    """Every LOAD_S say what there is to do, where it is not what this hub heard last; until cancelled."""
    said: tuple[Message, Connection | None] | None = None
    while True:
        await asyncio.sleep(LOAD_S)
        now = load(), hub()
        if now != said and now[1] is not None:
            tell(now[0])
            said = now


async def tell_store(
    hub_address: Address, token: str, address: Address, *, deadline_s: float, tls: Tls | None = None
) -> None:
    """Say where the store is in which ranks meet. HandshakeError for a wrong token, HubGone as `enter_hub`."""
    hub, _ = await _ask(hub_address, StoreAt(token=token, address=address), Welcome, deadline_s, tls)
    await hub.close()


async def find_store(hub_address: Address, token: str, *, deadline_s: float, tls: Tls | None = None) -> Address:
    """Where ranks meet; waits until somebody has said so.

    HandshakeError for a wrong token, HubGone after `deadline_s`, Dismissed when the job goes down meanwhile.
    """
    hub, answer = await _ask(hub_address, FindStore(token=token), StoreAt, deadline_s, tls)
    await hub.close()
    return answer.address


def ask_to_end(hub_address: Address, token: str, tls: Tls | None = None, *, lost: int | None = None) -> None:
    """Let the job end as by SIGTERM to the frontend. For a process without an event loop; waits seconds at most.
    `lost`: as in `EndJob`.

    A hub that cannot be reached is logged and no more: then the job is over, or the caller's limit ends it.
    """
    frame, end = encode_frame(EndJob(token=token, lost=lost), MAX_HUB_FRAME), time.monotonic() + _TLS_S
    while True:
        try:
            with socket.create_connection(hub_address, timeout=_END_S) as hub:
                secure_now(hub, tls).send_now(frame)
            return
        except (OSError, HandshakeError) as error:
            # Without TLS a hub that is busy, or starts again, finds the message in its backlog.
            if tls is not None and isinstance(error, TimeoutError) and time.monotonic() < end:
                continue
            reason = getattr(error, "strerror", None) or error
            what = "this node ends" if lost is None else f"rank {lost} is lost"
            logger.warning("the hub was not told that %s: %s", what, reason)
            return


async def _ask(
    address: Address, first: Message, expected: type[Message], deadline_s: float, tls: Tls | None
) -> tuple[Connection, Any]:
    """The connection, and its answer to the first message. A frontend that dies before it answers is asked again."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    while True:
        left = max(0.01, end - loop.time())
        try:
            hub = await connect_hub(address, deadline_s=left, tls=tls)
        except ConnectionLost as error:
            raise HubGone(f"{error} within {deadline_s:g} s") from None
        try:
            await hub.send(first)
            answer = await hub.receive(timeout=left)
        except (ConnectionLost, DeadlineError) as error:
            await hub.close()
            if loop.time() + _PAUSE_S >= end:
                raise HubGone(f"the hub did not answer within {deadline_s:g} s") from error
            await asyncio.sleep(_PAUSE_S)
            continue
        if isinstance(answer, expected):
            return hub, answer
        await hub.close()
        if isinstance(answer, Refused):
            raise HandshakeError(answer.field, answer.expected, answer.got)
        if isinstance(answer, Stop):
            raise Dismissed("the job is going down")
        raise TransferError(f"the hub answered {type(answer).__name__}")
