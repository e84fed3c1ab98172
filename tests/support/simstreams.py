"""Streams and events of the simulated device (`simcuda.py`): what is touched before it is known to be there.

Every operator is a step of the stream that is current on its thread. A stream knows which steps of others come before
its own, by the events that it has waited for; the host knows which have run, by what it has waited for. A read after
a write, or a write after either, by two of them without such an order is refused. So is memory that goes back to the
allocator while another stream than its own may use it (`record_stream` allows that).

Copies to and from pinned memory that the host does not wait for run late: what is downloaded is garbage until the host
has waited, and what is uploaded must be the same then. Pinned memory that is dropped meanwhile stays, as PyTorch's
cache of it does it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

Clock = dict[int, int]
"""Stream -> its last step that comes before."""


Uses = dict[tuple[int, int, bool], int]
"""(first byte, byte after the last, whether it is written) -> the last step that did so."""


class Step(NamedTuple):
    stream: int
    number: int


def _merge(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def _region(x: Tensor) -> tuple[int, int, int]:
    """(storage, first byte, byte after the last); no bytes for a tensor without numbers."""
    low = x.storage_offset() * x.element_size()
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.untyped_storage()._cdata, low, low + (span * x.element_size() if x.numel() else 0)


class Order:
    """Of all steps. `problem` notes what a device could not have promised, and makes the error. What this thread
    captures is no step: its replay is one."""

    def __init__(
        self, problem: Callable[[str], RuntimeError], count: Callable[[str], None], is_capturing: Callable[[], bool]
    ) -> None:
        self._problem, self._count, self._is_capturing = problem, count, is_capturing
        self._lock = threading.RLock()
        self._here = threading.local()
        self._last: Clock = {0: 0}
        self._priorities = {0: 0}
        self._before: dict[int, Clock] = {0: {}}
        self._known: Clock = {}
        """What the host knows to have run."""
        self._uses: dict[int, dict[int, Uses]] = {}
        """Of a storage, by stream."""
        self._owner: dict[int, int] = {}
        self._shared: set[tuple[int, int]] = set()
        """(storage, stream) of `record_stream`."""
        self._late: list[tuple[Step, Callable[[], None]]] = []

    # -- streams

    @property
    def current(self) -> int:
        return getattr(self._here, "stream", 0)

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self._here.stream = self.current, stream
        try:
            yield
        finally:
            self._here.stream = before

    def new_stream(self, priority: int) -> int:
        """`priority`: as CUDA has it, a lower number goes first."""
        if priority > 0:
            raise self._problem(f"priority {priority}: 0 is the least")
        with self._lock:
            number = len(self._last)
            self._last[number], self._before[number], self._priorities[number] = 0, {}, priority
            return number

    def priority_of(self, stream: int) -> int:
        return self._priorities[stream]

    def clock(self, stream: int) -> Clock:
        """Of what comes next on it."""
        with self._lock:
            clock = dict(self._before[stream])
            _merge(clock, self._known)
            _merge(clock, {stream: self._last[stream]})
            return clock

    def wait(self, stream: int, clock: Clock) -> None:
        with self._lock:
            _merge(self._before[stream], clock)

    def has_run(self, clock: Clock) -> bool:
        with self._lock:
            return all(self._known.get(stream, 0) >= number for stream, number in clock.items())

    def learn(self, clock: Clock) -> None:
        """The host has waited: late copies are there."""
        with self._lock:
            _merge(self._known, clock)
            ready = [run for step, run in self._late if self._known.get(step.stream, 0) >= step.number]
            if not ready:
                return
            self._late = [(s, run) for s, run in self._late if self._known.get(s.stream, 0) < s.number]
        with here():
            for run in ready:
                run()

    # -- what they touch

    def step(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Step:
        """The next one of the current stream."""
        with self._lock:
            stream = self.current
            if self._is_capturing():
                return Step(stream, self._last[stream])
            self._last[stream] += 1
            for tensors, is_write in ((reads, False), (writes, True)):
                for x in tensors:
                    self._check(x, stream, is_write=is_write)
            step = Step(stream, self._last[stream])
            self.tag(step, reads, is_write=False)
            self.tag(step, writes, is_write=True)
            return step

    def tag(self, step: Step, tensors: Sequence[Tensor], *, is_write: bool = True) -> None:
        with self._lock:
            for x in () if self._is_capturing() else tensors:
                storage, low, high = _region(x)
                uses = self._uses.get(storage)
                if uses is None:
                    uses = self._uses[storage] = {}
                    self._owner[storage] = step.stream
                    weakref.finalize(x.untyped_storage(), self._freed, storage).atexit = False
                own = uses.setdefault(step.stream, {})
                if is_write and len(own) > 8:
                    for use in [use for use in own if low <= use[0] and use[1] <= high]:
                        del own[use]
                own[low, high, is_write] = step.number

    def enter(self, func: Any, reads: Sequence[Tensor], writes: Sequence[Tensor], *, is_simulated: bool) -> Step | None:
        """An operator, of the current stream or of the host; one that makes a view touches nothing."""
        if is_simulated and not func.is_view:
            return self.step(reads, writes)
        if not is_simulated and (reads or writes):
            self.touch_by_host(reads, writes)
        return None

    def touch_by_host(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        with self._lock:
            for tensors, is_write in ((reads, False), (writes, True)):
                for x in tensors:
                    self._check(x, None, is_write=is_write)

    def _check(self, x: Tensor, stream: int | None, *, is_write: bool) -> None:
        """`stream`: None for the host."""
        uses = self._uses.get(x.untyped_storage()._cdata, {})
        others = [other for other in uses if other != stream]
        if not others:
            return
        _, low, high = _region(x)
        before = self._known if stream is None else self.clock(stream)
        for other in others:
            for (first, end, wrote), number in list(uses[other].items()):
                if self._known.get(other, 0) >= number:
                    del uses[other][first, end, wrote]
                elif first < high and low < end and (is_write or wrote) and before.get(other, 0) < number:
                    who = "the host" if stream is None else f"stream {stream}"
                    did, does = "wrote" if wrote else "reads", "writes" if is_write else "reads"
                    raise self._problem(f"{who} {does} what stream {other} {did}, without an order between them")

    def share(self, x: Tensor, stream: int) -> None:
        with self._lock:
            self._shared.add((_region(x)[0], stream))

    def _freed(self, storage: int) -> None:
        with self._lock:
            owner, uses = self._owner.pop(storage), self._uses.pop(storage)
            for stream in [stream for stream in uses if stream != owner]:
                is_late = self.clock(owner).get(stream, 0) < max(uses[stream].values(), default=0)
                if is_late and (storage, stream) not in self._shared:
                    self._problem(f"memory of stream {owner} is freed while stream {stream} may use it")
                self._shared.discard((storage, stream))

    # -- copies that the host does not wait for

    def download(self, step: Step, target: Tensor, source: Tensor) -> None:
        """`target` is garbage until the host has waited."""
        came = source.to(target.dtype, copy=True)
        if target.dtype.is_floating_point:
            target.fill_(float("nan"))
        elif target.dtype == torch.bool:
            target.logical_not_().copy_(~came)
        else:
            target.fill_(-91)
        with self._lock:
            self._late.append((step, lambda: target.copy_(came)))

    def upload(self, step: Step, source: Tensor) -> None:
        """`source` must stay as it is until the device has read it."""
        if self._is_capturing():
            return
        seen = source.clone(memory_format=torch.contiguous_format)

        def compare() -> None:
            if not torch.equal(seen.view(torch.uint8), source.contiguous().view(torch.uint8)):
                self._problem("pinned memory was written before its upload had run")

        with self._lock:
            self._late.append((step, compare))

    @contextlib.contextmanager
    def simulated(self) -> Iterator[None]:
        """With `torch.cuda`'s streams and events."""
        order = self

        class Event:
            def __init__(self, *_: Any, **__: Any) -> None:
                self.clock: Clock = {}

            def record(self, stream: Stream | None = None) -> None:
                self.clock = order.clock(order.current if stream is None else stream.number)

            def wait(self, stream: Stream | None = None) -> None:
                order.wait(order.current if stream is None else stream.number, self.clock)

            def query(self) -> bool:
                return order.has_run(self.clock)

            def synchronize(self) -> None:
                order._count("event")
                order.learn(self.clock)

        class Stream:
            def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None) -> None:
                self.number = order.new_stream(priority) if number is None else number

            def record_event(self, event: Event | None = None) -> Event:
                made = event or Event()
                made.record(self)
                return made

            def wait_event(self, event: Event) -> None:
                event.wait(self)

            def wait_stream(self, other: Stream) -> None:
                order.wait(self.number, order.clock(other.number))

            def query(self) -> bool:
                return order.has_run(order.clock(self.number))

            def synchronize(self) -> None:
                order._count("event")
                order.learn(order.clock(self.number))

        def record_stream(x: Any, stream: Stream) -> None:
            order.share(x.elem, stream.number)

        def synchronize(*_: Any) -> None:
            for number in list(order._last):
                order.learn(order.clock(number))

        stands_in = {
            "Event": Event,
            "Stream": Stream,
            "stream": lambda stream: order.on(stream.number),
            "current_stream": lambda *_: Stream(number=order.current),
            "default_stream": lambda *_: Stream(number=0),
            "synchronize": synchronize,
        }
        with contextlib.ExitStack() as stack:
            for name, stand_in in stands_in.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
            stack.enter_context(mock.patch.object(Tensor, "record_stream", record_stream))
            yield
            synchronize()


_pinned: set[int] = set()


def pin(x: Tensor) -> Tensor:
    """A copy that counts as pinned for as long as it lives, with all views of it."""
    made = x.clone()
    number = made.untyped_storage()._cdata
    _pinned.add(number)
    weakref.finalize(made.untyped_storage(), _pinned.discard, number)
    return made


def is_pinned(x: Tensor) -> bool:
    return bool(_pinned) and x.untyped_storage()._cdata in _pinned


@functools.cache
def _written(func: Any) -> frozenset[str | int]:
    """Its arguments that it writes into, by place and name."""
    found = [(i, x.name) for i, x in enumerate(func._schema.arguments) if x.alias_info and x.alias_info.is_write]
    return frozenset(key for pair in found for key in pair)


def split_uses(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What an operator reads and what it writes, of its arguments' tensors; nothing for one that makes a view, or a new
    tensor like another."""
    name = func._schema.name.split("::")[1]
    if func.is_view or name.startswith("new_") or name.endswith("_like"):
        return [], []
    places = _written(func)
    given = [*[x for i, x in enumerate(args) if i in places], *[x for name, x in kwargs.items() if name in places]]
    writes = [x for part in given for x in (part if isinstance(part, (list, tuple)) else [part])]
    numbers = {id(x) for x in writes}
    return [x for x in tensors if id(x) not in numbers], [x for x in tensors if id(x) in numbers]


@contextlib.contextmanager
def here() -> Iterator[None]:
    """On the CPU, whatever is simulated around it."""
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        yield
