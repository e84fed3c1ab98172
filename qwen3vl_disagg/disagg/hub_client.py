"""A rank's way into the hub."""

from __future__ import annotations

import asyncio

from qwen3vl_disagg.core.errors import DeadlineError, HandshakeError, TransferError
from qwen3vl_disagg.disagg.control import Address, Connection, ConnectionLost, connect_hub
from qwen3vl_disagg.disagg.messages import RankHello, Refused, Welcome

_PAUSE_S = 0.1


async def join_hub(address: Address, hello: RankHello, *, deadline_s: float) -> Connection:
    """Connect and say hello until the hub welcomes this rank; a frontend that dies meanwhile is started again.

    HandshakeError if the hub refuses, TransferError if it is not there within `deadline_s`.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    while True:
        left = max(0.01, end - loop.time())
        hub = await connect_hub(address, deadline_s=left)
        try:
            await hub.send(hello)
            answer = await hub.receive(timeout=left)
        except (ConnectionLost, DeadlineError) as error:
            await hub.close()
            if loop.time() + _PAUSE_S >= end:
                raise TransferError(f"the hub did not answer within {deadline_s:g} s") from error
            await asyncio.sleep(_PAUSE_S)
            continue
        if isinstance(answer, Welcome):
            return hub.keep_alive()
        await hub.close()
        if isinstance(answer, Refused):
            raise HandshakeError(answer.field, answer.expected, answer.got)
        raise TransferError(f"the hub answered {type(answer).__name__}")
