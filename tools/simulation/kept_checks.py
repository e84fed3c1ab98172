"""I17, of answers that are kept while nobody hears them: a ledger of a language rank's keyed requests, beside the book
that production has.

What lacks no rows goes on without a hub, and is told to none that did not adopt it; who does is told all of it, from
its beginning on. What nobody adopts in time is given up everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_disagg.language import kept_answers
from qwen3vl_disagg.language.request_book import Said
from qwen3vl_disagg.protocol.messages import (
    Adopt,
    Finished,
    KeptRequest,
    Message,
    NeedItems,
    PromptLogprobs,
    RequestFailed,
    Submit,
    Tokens,
)
from tools.simulation.stays import Stays
from tools.simulation.world import Violation

GIVE_UP_S = 2.5
"""How much longer than `keep_s` something may be there that is looked for once a second."""
PAGES_S = 10.0
"""How long the engine may have what the loop has forgotten: a slow rank's step."""


@dataclass(slots=True)
class _Entry:
    name: str
    open: set[int]
    num_tokens: dict[int, int]
    """That each answer has so far."""
    ended: set[int] = field(default_factory=set)
    """Answers that have come to their end."""
    cut: set[int] = field(default_factory=set)
    """Those that nobody wants: more of them may come until the engine has heard of it."""
    size: int = 0
    """Of what was said."""
    prompt: list[PromptLogprobs] = field(default_factory=list)
    unheard_since: float | None = None
    ended_at: float | None = None

    def is_due(self, now: float, keep_s: float) -> bool:
        """Whether it has to be there."""
        if self.ended_at is not None:
            return now < self.ended_at + keep_s
        return self.unheard_since is None or now < self.unheard_since + keep_s


class KeptChecks:
    """Of one incarnation of a language rank."""

    def __init__(self, rank: Any) -> None:
        self.rank, self.world = rank, rank.world
        self.entries: dict[str, _Entry] = {}
        self._stays, self._keep_s = Stays(self.world), rank.cluster.sizes.keep_s
        self._overheard: list[Message] | None = None
        self._dropped: set[str] = set()
        """Those for which there was no room."""

    # ---- the ledger ----

    def begun(self, message: Submit) -> None:
        if message.keep_as:
            for other in [key for key, entry in self.entries.items() if entry.name == message.keep_as]:
                if self.entries[other].ended_at is not None:
                    del self.entries[other]
            answers = range(message.sampling.n)
            self._dropped.discard(message.request_id)
            self.entries[message.request_id] = _Entry(message.keep_as, set(answers), dict.fromkeys(answers, 0))

    def forgotten(self, request_id: str) -> None:
        self.entries.pop(request_id, None)

    def cut(self, request_id: str, sample: int) -> None:
        """A client wants this answer no more."""
        entry = self.entries.get(request_id)
        if entry is not None and entry.ended_at is None and sample in entry.open:
            entry.cut.add(sample)
            self._close(entry, sample)

    def _close(self, entry: _Entry, sample: int) -> None:
        entry.open.discard(sample)
        if not entry.open:
            entry.ended_at = self.world.now
            self._make_room()

    def _make_room(self) -> None:
        """There is a bound on how many are kept, and on how long those are that have ended: the oldest of these go."""
        ended = sorted((entry.ended_at, key) for key, entry in self.entries.items() if entry.ended_at is not None)
        sizes = {key: self.entries[key].size for _, key in ended}
        for _, key in ended:
            if len(self.entries) <= kept_answers.MAX_KEPT and sum(sizes.values()) <= kept_answers.MAX_KEPT_SIZE:
                return
            del self.entries[key], sizes[key]
            self._dropped.add(key)

    @contextlib.contextmanager
    def hearing(self, event: Said) -> Iterator[None]:
        """What the engine says goes to the hub at once, if there is one that hears of the request."""
        entry = self.entries[event.request_id]
        if entry.ended_at is not None:
            yield
            return
        is_wanted = isinstance(event, RequestFailed) or (
            isinstance(event, PromptLogprobs) or (isinstance(event, (Tokens, Finished)) and event.sample in entry.open)
        )
        self._hear(event, entry)
        self._overheard = []
        yield
        told, self._overheard = self._overheard, None
        if is_wanted and (event in told) != (entry.unheard_since is None):
            raise Violation("I17", f"{event} is told {len(told)} times; unheard since {entry.unheard_since}")

    @contextlib.contextmanager
    def hearing_late(self, event: Said | str, request_id: str) -> Iterator[None]:
        """It is of a request that is over, whose id another has now: the sessions know no more of it, nor does the
        hub."""
        before, self._overheard = self.rank.sessions.requests.get(request_id), []
        running = self.rank.book.running.get(request_id)
        yield
        told, self._overheard = self._overheard, None
        is_same = self.rank.book.running.get(request_id) is running
        if told or not is_same or self.rank.sessions.requests.get(request_id) is not before:
            raise Violation("I17", f"{event} is of a request that was begun anew since, and {told} is told")

    def _hear(self, event: Said, entry: _Entry) -> None:
        match event:
            case RequestFailed():
                self.forgotten(event.request_id)
            case NeedItems() if entry.unheard_since is not None:
                self.forgotten(event.request_id)
            case Tokens(sample=sample):
                entry.size += len(event.token_ids) * (16 if event.logprobs else 1)
                if sample in entry.open:
                    entry.num_tokens[sample] += len(event.token_ids)
            case PromptLogprobs():
                entry.prompt.append(event)
                entry.size += (len(event.own) + len(event.ranks) + len(event.top_ids) + len(event.top)) // 4
            case Finished(sample=sample):
                entry.size += 1
                if sample in entry.open:
                    entry.ended.add(sample)
                    self._close(entry, sample)

    def of_sessions(self, message: Message) -> None:
        if isinstance(message, RequestFailed):
            self.forgotten(message.request_id)

    # ---- a death of the hub ----

    def losing_hub(self) -> None:
        """What lacks rows cannot go on: the engine has asked for more than has been delivered."""
        lacking = {request_id for (request_id, item) in self.rank.asked if self._lacks(request_id, item)}
        for request_id, entry in list(self.entries.items()):
            if entry.ended_at is None and request_id in lacking:
                del self.entries[request_id]
            elif entry.unheard_since is None and entry.ended_at is None:
                entry.unheard_since = self.world.now

    def _lacks(self, request_id: str, item: int) -> bool:
        request = self.rank.sessions.requests.get(request_id)
        if request is None:
            return False
        _, stop = self.rank.progress.get((request_id, item), (0, 0))
        return stop < request.sessions[item].total

    def lost_hub(self) -> None:
        for request_id in self.rank.book.running:
            if request_id not in self.entries:
                raise Violation("I17", f"{request_id} goes on though nobody will ask for it, or it lacks rows")
        gone = self.entries.keys() - {offer.request_id for offer in self.rank.book.offer(0)}
        for request_id in gone:
            if self.entries[request_id].is_due(self.world.now, self._keep_s):
                raise Violation("I17", f"{request_id} has all its rows, and is given up with its hub")

    def offers(self, offers: list[KeptRequest]) -> None:
        """I10: who adopts counts the attempts on, also at what is over, and may have to begin anew."""
        assigned = self.rank.ledger.assigned
        for offer in offers:
            last = max((one.attempt for key, one in assigned.items() if key[0] == offer.request_id), default=0)
            if offer.last_attempt < last:
                raise Violation("I10", f"{offer.request_id} is offered after attempt {offer.last_attempt} of {last}")

    def told(self, message: Message) -> None:
        if self._overheard is not None:
            self._overheard.append(message)

    @contextlib.contextmanager
    def adopting(self, message: Adopt) -> Iterator[None]:
        """All that there is has to be told at once."""
        self._overheard = []
        yield
        told, self._overheard = self._overheard, None
        entry = self.entries.get(message.request_id)
        if entry is None:
            return
        if any(isinstance(one, RequestFailed) for one in told):
            if entry.is_due(self.world.now, self._keep_s):
                raise Violation("I17", f"{message.request_id} is adopted, and nothing of it is there")
            self.forgotten(message.request_id)
            return
        entry.unheard_since = None
        request = self.rank.sessions.requests.get(message.request_id)
        if request is not None and request.deadline < self.world.now + message.timeout_s:
            raise Violation("I11", f"{message.request_id} ends at {request.deadline}, with the client that has left")
        if [one for one in told if isinstance(one, PromptLogprobs)] != entry.prompt:
            raise Violation("I17", f"{message.request_id} is told {told}, without {entry.prompt}")
        for sample, count in entry.num_tokens.items():
            said = [one for one in told if isinstance(one, Tokens) and one.sample == sample]
            ends = [one for one in told if isinstance(one, Finished) and one.sample == sample]
            ids = [token_id for one in said for token_id in one.token_ids]
            if sample in entry.cut:
                count, ends = max(count, len(ids)), []
            if ids != list(range(count)) or len(ends) != (sample in entry.ended):
                raise Violation("I17", f"answer {sample} of {message.request_id} is told as {ids} of {count}, {ends}")

    # ---- while time passes ----

    def on_time(self) -> None:
        """What nobody adopted in time is not in the book, nor known to the engine or the sessions."""
        rank, now = self.rank, self.world.now
        if not (rank.engine.known or self.entries or len(rank.book.kept)):
            self._stays.forget()
            return
        stays = self._stays.look(now)
        for request_id in rank.engine.known:
            if request_id not in rank.book.running and stays.stay((request_id, "pages")) > PAGES_S:
                raise Violation("I17", f"{request_id} is over, and keeps its pages")
        kept = [offer.request_id for offer in rank.book.offer(0)] if len(rank.book.kept) else []
        for request_id in kept:
            entry = self.entries.get(request_id)
            since = None if entry is None else entry.unheard_since if entry.ended_at is None else entry.ended_at
            if entry is None and request_id in self._dropped:
                raise Violation("I12", f"{request_id} is kept, and more is kept than may be")
            is_for_nobody = entry is None or since is not None
            if is_for_nobody and stays.stay((request_id, since)) > self._keep_s + GIVE_UP_S:
                raise Violation("I17", f"{request_id} is kept for longer than {self._keep_s} s")
        for request_id in self.entries.keys() - set(kept):
            if self.entries[request_id].is_due(now, self._keep_s):
                raise Violation("I17", f"{request_id} is kept no longer, though its time is not over")
            del self.entries[request_id]
        stays.done()

    def has(self, request_id: str) -> bool:
        """Whether a request is here that only has to be adopted."""
        entry = self.entries.get(request_id)
        return entry is not None and entry.is_due(self.world.now, self._keep_s)
