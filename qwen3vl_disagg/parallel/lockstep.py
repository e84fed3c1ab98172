"""Steps of ranks that share experts: all of them run a step together, or none does.

Each rank says what it could do in the next step (`Outlook`), also when that is nothing, and then only if it changes.
The first rank has the last word of each; as soon as all have spoken about the step and one of them has work, it tells
all what the step is (`StepPlan`). So one message from each rank and one to each is the whole agreement, a rank without
work sleeps on a socket until another one has some, and none is ever asked.

A prompt's chunk makes a step long for every rank. As on one rank alone, no two such steps follow one another while
a rank decodes, and then a rank's chunks are the least `chunk` of those with prompts: that bounds the time between two
tokens.

Pure: no clock, socket or thread inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.model.moe import DispatchKind
from qwen3vl_disagg.parallel.sizes import padded_rows
from qwen3vl_disagg.protocol.messages import Heartbeat, Message, Refused


class PeerHello(Message, frozen=True):
    """First message of a rank to the first one. `rank` counts the ranks that share experts, from 0."""

    token: str
    rank: int


class PeerWelcome(Message, frozen=True):
    """The first rank took this one in."""


class Outlook(Message, frozen=True):
    """What a rank could do in a step: tokens of prompts, and sequences to decode one token of. `chunk`: the most tokens
    of prompts while any rank decodes, as far as this rank's measure goes, if it has prompts."""

    step: int
    prefill: int = 0
    decode: int = 0
    chunk: int = 0

    @property
    def has_work(self) -> bool:
        return self.prefill > 0 or self.decode > 0


class StepPlan(Message, frozen=True):
    """What everybody does in a step: a rank runs prompts up to `prefill` tokens, else what it has to decode.

    `num_rows`: room for each rank's tokens in the exchange, and so the most that it may run. `kind`: how they travel.
    """

    step: int
    num_rows: int
    prefill: int = 0
    kind: DispatchKind = "gather"


class ReadyToLeave(Message, frozen=True):
    """This rank wants nothing any more; it goes on taking part until all want to leave."""


class Over(Message, frozen=True):
    """All want to leave: there will be no other step."""


LockstepMessage = Heartbeat | Refused | PeerHello | PeerWelcome | Outlook | StepPlan | ReadyToLeave | Over


@dataclass(frozen=True)
class PaceLimits:
    """`chunk_tokens`: of prompts in a step of a rank while any rank decodes, before steps were measured; else
    `max_prefill_tokens`."""

    chunk_tokens: int
    max_prefill_tokens: int


class Lockstep:
    """The first rank's tables. `choose_kind(rows of each rank, num_rows)` says how the rows of a step travel."""

    def __init__(
        self, num_ranks: int, limits: PaceLimits, choose_kind: Callable[[Sequence[int], int], DispatchKind]
    ) -> None:
        self.num_ranks, self.limits, self._choose_kind = num_ranks, limits, choose_kind
        self.step = 1
        self._outlooks: dict[int, Outlook] = {}
        self._joined: set[int] = set()
        self._leaving: set[int] = set()
        self._was_prefill = False

    def join(self, rank: int) -> None:
        """HandshakeError for a rank that is none of them, or is there."""
        if not 0 <= rank < self.num_ranks or rank in self._joined:
            missing = sorted(set(range(self.num_ranks)) - self._joined)
            raise HandshakeError("rank", f"one of {missing}", rank)
        self._joined.add(rank)

    def report(self, rank: int, outlook: Outlook) -> StepPlan | None:
        """A rank's last word about the step; the plan when that was all that it lacked."""
        if outlook.step != self.step:
            return None  # of a step that was decided meanwhile; it will speak about the next one
        self._outlooks[rank] = outlook
        if len(self._outlooks) < self.num_ranks or not any(o.has_work for o in self._outlooks.values()):
            return None
        plan = self._plan()
        self.step += 1
        self._outlooks.clear()
        return plan

    def leave(self, rank: int) -> bool:
        """Whether that was the last one."""
        self._leaving.add(rank)
        return len(self._leaving) == self.num_ranks

    def _plan(self) -> StepPlan:
        outlooks = [self._outlooks[rank] for rank in range(self.num_ranks)]
        is_decoding = any(outlook.decode for outlook in outlooks)
        has_prompts = any(outlook.prefill for outlook in outlooks)
        self._was_prefill = has_prompts and not (self._was_prefill and is_decoding)
        budget = 0
        if self._was_prefill:
            measured = [outlook.chunk for outlook in outlooks if outlook.chunk]
            chunk = min(measured, default=self.limits.chunk_tokens)
            budget = chunk if is_decoding else self.limits.max_prefill_tokens
        rows = [min(o.prefill, budget) or o.decode for o in outlooks]
        num_rows = padded_rows(max(rows))
        return StepPlan(step=self.step, num_rows=num_rows, prefill=budget, kind=self._choose_kind(rows, num_rows))
