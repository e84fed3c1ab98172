"""What the model of the engine, and the loop beside it, do in a `World`."""

from __future__ import annotations

from qwen3vl_disagg.protocol import session_events as ev
from tests.properties.session_parts import ModelSequence, make_visual


class EngineMoves:
    """The part of `World` that is about requests: they come, are preempted and admitted again, read rows, end."""

    def submit(self, rows: list[int], ranks: int, found: int = 0) -> None:
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        visuals = [make_visual(n) for n in rows]
        self.running[request_id] = visuals
        self.checks.totals |= {(request_id, item): n for item, n in enumerate(rows)}
        sequence = self.engine.known[request_id] = ModelSequence(rows)
        lacking, firsts = sequence.admit(found)
        if lacking:
            self._expect(request_id, lacking, firsts)
        self.router.admit(request_id, visuals, ranks, lacking)

    def _expect(self, request_id: str, lacking: list[int], firsts: list[int]) -> None:
        visuals = self.running[request_id]
        for item in range(len(visuals)):
            self.asked.pop((request_id, item), None)
        self.progress = {key: at for key, at in self.progress.items() if key[0] != request_id}
        self.asked |= {(request_id, item): first for item, first in zip(lacking, firsts, strict=True)}
        self.to_language(ev.Expect(request_id, visuals, lacking, 1e9, firsts if any(firsts) else []))

    def preempt(self, request_id: str, *, is_told: bool = True) -> None:
        """The engine gives up what it had of a request, and says so now, or only when it asks for rows again."""
        if self.engine.batch is not None:
            self.end_step()
        sequence = self.engine.known.get(request_id)
        if sequence is not None and sequence.is_admitted:
            sequence.give_up()
            sequence.is_told = is_told
            if is_told:
                self.engine.events.append(("preempted", (request_id, 0, 0)))

    def admit_again(self, request_id: str, found: int) -> None:
        sequence = self.engine.known[request_id]
        lacking, firsts = sequence.admit(found)
        if lacking:
            self.engine.events.append(("needed", (request_id, 0, 0), lacking, firsts))
        elif not sequence.is_told:
            self.engine.events.append(("preempted", (request_id, 0, 0)))

    def step(self, request_id: str, most: int = 10**6) -> None:
        """The engine begins to put some of the tokens that it could into the cache; or ends what it has begun."""
        if self.engine.batch is not None:
            self.end_step()
            return
        self.engine.take_commands()
        sequence = self.engine.known.get(request_id)
        if sequence is not None and sequence.is_admitted:
            start = sequence.num_cached
            self.engine.batch = (request_id, start, max(start, min(start + most, sequence.limit)))

    def end_step(self) -> None:
        """Rows are read until now, whatever has become of them meanwhile."""
        (request_id, start, stop), self.engine.batch = self.engine.batch, None  # type: ignore[misc]
        sequence = self.engine.known[request_id]
        for item, rows in enumerate(sequence.rows):
            offset = sequence.offset(item)
            low, high = max(start - offset, 0), min(stop - offset, rows)
            if low < high:
                self._read(request_id, item, sequence, low, high)
        sequence.num_cached = stop

    def _read(self, request_id: str, item: int, sequence: ModelSequence, low: int, high: int) -> None:
        first, last, job = sequence.here[item]
        attempt = (request_id, item, job.grant.attempt)
        self.checks.may_read(job)
        for row in range(low, high):
            first_row = self.first_of[attempt]
            self.cells.check_row(job.room, job.hold, job.grant, row, first_row, has_deepstack=self.has_deepstack)
        if low > sequence.first_row(item):
            assert sequence.read[item] == (attempt[2], low), f"I10: {attempt} {low} after {sequence.read[item]}"
        sequence.read[item] = (attempt[2], high)
        assert first <= low
        self.engine.events.append(("consumed", attempt, high))
        if high == last:
            del sequence.here[item]

    def loop_takes(self) -> None:
        kind, attempt, *rest = self.engine.events.popleft()
        if kind == "returned":
            self.to_language(ev.Returned(*attempt))
        elif attempt[0] not in self.running:
            return
        elif kind == "consumed":
            self.to_language(ev.Consumed(*attempt, *rest))
        elif kind == "preempted":
            self._expect(attempt[0], [], [])
        else:
            self._expect(attempt[0], *rest)
            self.router.of["language"].append(("needed", attempt[0], rest[0]))

    def finish(self, request_id: str) -> None:
        """A prefilled request has all its tokens."""
        if self.engine.batch is not None:
            self.end_step()
        del self.engine.known[request_id]
        if self.running.pop(request_id, None) is not None:
            self.to_language(ev.Forget(request_id))
            self.router.of["language"].append(("finished", request_id))
