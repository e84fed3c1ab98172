"""Captured decode steps that are begun before the host knows the tokens that they go on from.

The tokens of a step go from the device to the host; meanwhile the device computes the next step from them, beside
what the host does between two steps. Who turns out to be at its end, or is cancelled, has a row of that step
which nobody reads: what it wrote lies behind all that is known of its pages. So whatever else is to be done, a prompt
among it, comes one step later.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qwen3vl_disagg.engine.graphs import GraphedDecode, GraphedPick
from qwen3vl_disagg.engine.scheduler import Scheduler
from qwen3vl_disagg.engine.sequence import Sequence


class StepAhead:
    """Before tokens are picked `plan` says who goes on; the step behind them is `taken` next."""

    def __init__(self, decode: GraphedDecode, pick: GraphedPick) -> None:
        self._decode, self._pick = decode, pick
        pick.meanwhile = self._begin
        self._planned: dict[Sequence, int] = {}
        self._begun: dict[Sequence, int] = {}
        """Row of each sequence, in their order."""
        self._places: list[int] = []
        self._num_rows = 0

    def plan(self, logits_BV: Tensor, batch: list[Sequence], scheduler: Scheduler) -> None:
        """The step of `batch` is under way; where nobody else has anything to do, another one may follow it."""
        self._planned = {}
        if logits_BV is not self._decode.logits_BV:
            return  # a step from Python
        going_on = {s: row for s, row in zip(batch, self._decode.places, strict=True) if s.goes_on}
        is_few = all(s.masks is None and s.sampling_row.needs_few for s in batch)
        if is_few and scheduler.are_all_that_run(batch) and all(map(scheduler.has_page_ahead, going_on)):
            self._planned = going_on

    def _begin(self) -> None:
        places, self._planned = self._planned, {}
        if places and (num_rows := self._decode.size_for(len(places), None)):
            self._decode.run_behind([*places], num_rows, self._pick.picked_R, [*places.values()])
            self._num_rows = num_rows
            self._begun = {sequence: row for row, sequence in enumerate(places)}

    def taken(self, admitted: Mapping[str, Sequence]) -> list[Sequence]:
        """Of the step that was begun: who is still here; nobody where none was."""
        begun, self._begun = self._begun, {}
        here = {sequence: row for sequence, row in begun.items() if admitted.get(sequence.name) is sequence}
        self._places = [*here.values()]
        return [*here]

    def logits(self) -> Tensor:
        """`[B, V]` of those that were taken."""
        return self._decode.logits(self._places, self._num_rows)
