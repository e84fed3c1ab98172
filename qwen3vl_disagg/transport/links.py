"""Payload transport of one encode rank -> language rank pair. Blocking; one thread at each end uses it.

What is sent and into what it is received has been agreed on the control connection before: a message longer than the
posted buffer would take the receiving process down, a shorter one would leave stale bytes in its tail.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qwen3vl_disagg.core.errors import TransferError
from qwen3vl_disagg.core.faults import fault_point
from qwen3vl_disagg.protocol.messages import LinkAddress
from qwen3vl_disagg.transport.control import STILL_S, Connection
from qwen3vl_disagg.transport.gloo import Swap, build_pair

T = TypeVar("T")
Side = Literal["encode", "language"]
_RANK_IN_PAIR = {"encode": 0, "language": 1}
MEET_S = 20.0
"""How long one end waits for what the other says of itself, and then for its connection."""


class LinkBroken(TransferError):
    """The peer is gone or did not keep up; the link is of no more use."""

    code = "link_broken"


class Link(Protocol):
    """`send` on one end and `receive` on the other, with tensors of equal shapes and dtypes in equal order.

    What is sent is in memory of the host. All tensors of a payload are in flight at once. Both raise LinkBroken when
    the peer is gone or `timeout` seconds have passed, or too many without any of them; nothing is written into any of
    the tensors after that.
    """

    def send(self, tensors: Sequence[Tensor], timeout: float) -> None: ...

    def receive(self, tensors: Sequence[Tensor], timeout: float) -> Generator[Tensor, None, None]:
        """Yield the tensors in order, each as soon as it is there: the one given, filled, or the sender's own; for one
        on a GPU its bytes in memory of the host, pinned where they came over a wire.

        Has to be run to its end, or closed.
        """
        ...

    def close(self) -> None: ...


LinkFactory = Callable[[Side, int, int, int, Swap], Link]
"""(side, encode rank, language rank, epoch, swap) -> this side's end; blocks until the other side is there too. Ends
that have to tell each other where they are do it by `swap`."""


class _Patience:
    """With a payload: `timeout` for all of it, and not much longer than its share for any one tensor. They come in
    order, and Gloo does not always notice that a peer died: what stands still is given up before all could be there."""

    def __init__(self, tensors: Sequence[Tensor], timeout: float) -> None:
        sizes = [tensor.nbytes for tensor in tensors]
        self._still_s = STILL_S + timeout * max(sizes, default=0) / max(1, sum(sizes))
        self._ends = time.monotonic() + timeout

    @property
    def left_s(self) -> float:
        """For the next tensor."""
        return max(0.01, min(self._ends - time.monotonic(), self._still_s))


class ProcessGroupLink:
    """Over a 2-rank Gloo group."""

    def __init__(self, group: dist.ProcessGroup, side: Side) -> None:
        self._group: dist.ProcessGroup | None = group
        self._peer = 1 - _RANK_IN_PAIR[side]

    def send(self, tensors: Sequence[Tensor], timeout: float) -> None:
        patience = _Patience(tensors, timeout)
        group = self._open_group()
        works = []
        for number, tensor in enumerate(tensors):
            works.append(group.send([tensor], self._peer, 0))
            if number == len(tensors) // 2:
                fault_point("mid-payload-sent")
        for _ in self._wait(works, patience):
            continue

    def receive(self, tensors: Sequence[Tensor], timeout: float) -> Generator[Tensor, None, None]:
        patience = _Patience(tensors, timeout)
        here = [t if t.device.type == "cpu" else torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        group = self._open_group()
        works = [group.recv([tensor], self._peer, 0) for tensor in here]
        waiting = self._wait(works, patience)
        try:
            for tensor, _ in zip(here, waiting, strict=True):
                yield tensor
        finally:
            for _ in waiting:
                continue

    def _open_group(self) -> dist.ProcessGroup:
        if self._group is None:
            raise LinkBroken("the link is closed")
        return self._group

    @staticmethod
    def _wait(works: Sequence[dist.Work], patience: _Patience) -> Iterator[None]:
        """Every one is waited for, also after a failure: until then a buffer may still be written."""
        failure = None
        for work in works:
            try:
                work.wait(timedelta(seconds=patience.left_s))
            except RuntimeError as error:
                failure = error
            if failure is None:
                yield
        if failure is not None:
            raise LinkBroken(f"the payload did not get through: {type(failure).__name__}") from failure

    def close(self) -> None:
        """The group's sockets close when its last reference goes."""
        self._group = None


def process_group_links(host: str, *, timeout_s: float = MEET_S) -> LinkFactory:
    """Links over Gloo groups, on the interface of `host`. LinkBroken when the two ends do not come together."""

    def make(side: Side, encode_rank: int, language_rank: int, epoch: int, swap: Swap) -> Link:
        try:
            group = build_pair(swap, rank_in_pair=_RANK_IN_PAIR[side], host=host, timeout_s=timeout_s)
        except (RuntimeError, ValueError, TimeoutError, CancelledError) as error:
            name = f"link {encode_rank}-{language_rank}, epoch {epoch}"
            raise LinkBroken(f"no group of {name}: {type(error).__name__}: {error}") from error
        return ProcessGroupLink(group, side)

    return make


async def meet(control: Connection, thread: Executor, make_link: LinkFactory, side: Side, *ends: int) -> Link:
    """This side's end, made on a thread of the link's own. Where the two are crosses `control`; when that ends, the
    swap does, too."""
    loop = asyncio.get_running_loop()
    theirs = Future[bytes]()

    def swap(ours: bytes) -> bytes:
        asyncio.run_coroutine_threadsafe(control.send(LinkAddress(address=ours)), loop)
        return theirs.result(MEET_S)

    def take(message: Any) -> bool:
        is_first = isinstance(message, LinkAddress) and not theirs.done()
        if is_first:
            theirs.set_result(message.address)
        return is_first

    try:
        return await while_there(control.lost(take), thread, make_link, side, *ends, swap)
    finally:
        theirs.cancel()


async def while_there(lost: Awaitable[TransferError], thread: Executor, work: Callable[..., T], *args: Any) -> T:
    """`work(*args)` on a thread of the link's own, for as long as its other end is there (`Connection.lost`). When that
    is gone its error is raised at once: nothing breaks off a call that waits for the dead, but only its thread waits
    for its deadline."""
    running = asyncio.get_running_loop().run_in_executor(thread, partial(work, *args))
    running.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody asks any more
    watching = asyncio.ensure_future(lost)
    try:
        await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise watching.result()
        return running.result()
    finally:
        watching.cancel()
        await asyncio.wait((watching,))  # two may not read at once


class InProcessLink:
    """Both ends in one process, possibly on one thread: `send` leaves the tensors here and returns at once, `receive`
    hands out the very same ones: nothing is copied."""

    def __init__(self) -> None:
        self._sent: queue.Queue[list[Tensor] | None] = queue.Queue()
        """None: the link is closed."""

    def send(self, tensors: Sequence[Tensor], timeout: float) -> None:
        self._sent.put(list(tensors), timeout=timeout)

    def receive(self, tensors: Sequence[Tensor], timeout: float) -> Generator[Tensor, None, None]:
        try:
            sent = self._sent.get(timeout=timeout)
        except queue.Empty:
            raise LinkBroken(f"nothing was sent within {timeout:g} s") from None
        if sent is None:
            self._sent.put(None)  # for the next one
            raise LinkBroken("the link is closed")
        if len(sent) != len(tensors):
            raise LinkBroken(f"{len(sent)} tensors were sent, {len(tensors)} expected")
        for target, source in zip(tensors, sent, strict=True):
            if target.shape != source.shape or target.dtype != source.dtype:
                raise LinkBroken(
                    f"sent {tuple(source.shape)} {source.dtype}, expected {tuple(target.shape)} {target.dtype}"
                )
            yield source

    def close(self) -> None:
        """What was sent before can still be received."""
        self._sent.put(None)


def in_process_links() -> LinkFactory:
    """Links between roles that live in one process."""
    made: dict[tuple[int, int, int], InProcessLink] = {}
    lock = threading.Lock()

    def make(side: Side, encode_rank: int, language_rank: int, epoch: int, swap: Swap | None = None) -> Link:
        with lock:
            key = (encode_rank, language_rank, epoch)
            return made.pop(key) if key in made else made.setdefault(key, InProcessLink())

    return make
