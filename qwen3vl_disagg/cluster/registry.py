"""Who may come in at the hub, and under which number; what two ranks must agree on before a row travels."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from qwen3vl_disagg.cluster.job_memory import JobMemory
from qwen3vl_disagg.cluster.rendezvous import Layout, host_id, parent_of
from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.core.sampling_params import OPTIONS
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import PROTOCOL_VERSION, RankHello

RankKey = tuple[str, int]  # role, rank
Fingerprint = dict[str, str]


def link_fingerprint(
    config: ModelConfig,
    checkpoint: Mapping[str, str],
    *,
    dtype: torch.dtype,
    block_size: int,
    processor: ImageProcessor,
) -> Fingerprint:
    """The checkpoint's fingerprint (`checkpoint.fingerprint`) and how this job uses it; named fields, all text."""
    levels = config.num_deepstack_levels
    sizes = RowSizes.of(hidden_size=config.text.hidden_size, num_levels=levels, itemsize=dtype.itemsize)
    return {
        **checkpoint,
        **processor.settings(),
        "protocol": str(PROTOCOL_VERSION),
        "deepstack_levels": str(levels),
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": str(block_size),
        "sampling": " ".join(OPTIONS),  # a rank would pass over an option that it does not know
        **{f"row_bytes.{name}": str(getattr(sizes, name)) for name in sizes.__dataclass_fields__},
    }


def check_fingerprint(expected: Mapping[str, str], got: Mapping[str, str]) -> None:
    """HandshakeError naming the first field that differs and both values."""
    for name in sorted({*expected, *got}):
        if expected.get(name) != got.get(name):
            raise HandshakeError(name, expected.get(name, "absent"), got.get(name, "absent"))


@dataclass
class Registry:
    """Checks hellos. `hellos` are those of the ranks that are in.

    Numbers of ranks that join start at the world's size. Slot ranks set the measure: what joins is compared with them
    and never they with it, so that a stranger who comes first turns nobody away.
    """

    layout: Layout
    token: str
    memory: JobMemory
    hellos: dict[RankKey, RankHello] = field(default_factory=dict)
    has_measure: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a rank of a slot has been in: before that, what joins has to wait."""
    _measure: Fingerprint = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.token:
            raise ValueError("an empty token would let anybody in")

    def check_token(self, token: str) -> None:
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            raise HandshakeError("token", "the job's token", "another")

    def is_of_a_slot(self, role: str, rank: int | None) -> bool:
        ranks = self.layout.encode_ranks if role == "encode" else self.layout.language_ranks
        return rank in ranks

    def take(self, hello: RankHello) -> int:
        """Let a rank in; its number. HandshakeError names what does not fit. Not what joins, before `has_measure`."""
        self.check_token(hello.token)
        rank = self._check_rank(hello, self.is_of_a_slot(hello.role, hello.rank))
        if not self.has_measure.is_set():
            self._measure = hello.fingerprint
            self.has_measure.set()
        check_fingerprint(self._measure, hello.fingerprint)
        if rank is None:
            rank = self.layout.world_size + self.memory.count_joined()
        self.hellos[hello.role, rank] = hello
        return rank

    def _check_rank(self, hello: RankHello, is_of_a_slot: bool) -> int | None:
        """The number that it states, if it may; None for one that has none yet."""
        if hello.job and hello.job != self.memory.job:
            raise HandshakeError("job", "a rank of this job", "one of another")
        if hello.rank is None and hello.role == "encode":
            return None
        first = self.layout.world_size
        has_joined = hello.role == "encode" and hello.job and hello.rank in range(first, first + self.memory.num_joined)
        if hello.rank is None or not (is_of_a_slot or has_joined):
            ranks = self.layout.encode_ranks if hello.role == "encode" else self.layout.language_ranks
            raise HandshakeError("rank", f"{hello.role} ranks {ranks.start} to {ranks.stop - 1}", hello.rank)
        before = self.hellos.get((hello.role, hello.rank))
        if before is not None and _lives_beside(before, hello):
            raise HandshakeError("rank", f"no other {hello.role} rank {hello.rank}", f"pid {hello.pid}")
        return hello.rank


def _lives_beside(before: RankHello, hello: RankHello) -> bool:
    """Whether the process that had the number still runs, as far as can be seen from here: of another host's nothing
    is known, and the new one takes its place."""
    is_another = (before.host, before.pid) != (hello.host, hello.pid)
    return is_another and before.host == host_id() and parent_of(before.pid) is not None
