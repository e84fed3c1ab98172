"""What a language rank keeps of answers: all of what it said, in order, for as long as it promised and no longer."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen3vl_disagg.core.errors import Failure, UnavailableError
from qwen3vl_disagg.core.requests import RequestTimings
from qwen3vl_disagg.language import kept_answers
from qwen3vl_disagg.language.kept_answers import KEEP_S, KeptAnswers
from qwen3vl_disagg.protocol.messages import Finished, PromptLogprobs, RequestFailed, Tokens


def tokens(request_id: str, index: int, count: int = 1, sample: int = 0) -> Tokens:
    return Tokens(request_id=request_id, index=index, token_ids=list(range(count)), sample=sample)


def finished(request_id: str, sample: int = 0) -> Finished:
    return Finished(request_id=request_id, finish_reason="stop", timings=RequestTimings(), sample=sample)


def failed(request_id: str) -> RequestFailed:
    return RequestFailed(request_id=request_id, failure=Failure.of(UnavailableError("no")))


def test_only_what_was_asked_to_be_kept_is():
    kept = KeptAnswers()
    assert kept.note(tokens("plain", 0), 0.0)
    assert not kept.unhear("plain", 0.0)
    assert kept.is_heard("plain")
    assert kept.adopt("plain") is None
    assert not len(kept)


def test_it_is_silent_until_it_is_adopted_and_then_says_everything():
    kept = KeptAnswers()
    kept.begin("r", "order", 1)
    said = [tokens("r", 0), tokens("r", 1)]
    assert kept.note(said[0], 0.0)
    assert kept.unhear("r", 1.0)
    assert not kept.note(said[1], 2.0)
    assert not kept.is_heard("r")
    [one] = kept.requests(3)
    assert (one.name, one.request_id, one.last_attempt) == ("order", "r", 3)
    assert kept.adopt("r") == said
    assert kept.note(finished("r"), 3.0)
    assert kept.expired(1.0 + KEEP_S) == []
    assert kept.expired(3.0 + KEEP_S) == ["r"]


def test_a_request_ends_with_its_last_answer():
    kept = KeptAnswers()
    kept.begin("r", "order", 2)
    kept.note(finished("r", 1), 0.0)
    assert kept.expired(1e9) == []
    kept.note(finished("r", 0), 5.0)
    assert kept.expired(5.0 + KEEP_S) == ["r"]


def test_what_failed_is_kept_no_longer():
    kept = KeptAnswers()
    kept.begin("r", "order", 1)
    assert kept.note(failed("r"), 0.0)
    assert kept.adopt("r") is None
    kept.begin("s", "order", 1)
    kept.unhear("s", 0.0)
    assert not kept.note(failed("s"), 0.0)


def test_a_name_has_one_answer():
    kept = KeptAnswers()
    kept.begin("r", "order", 1)
    kept.note(finished("r"), 0.0)
    kept.begin("s", "order", 1)
    assert kept.adopt("r") is None
    assert [one.request_id for one in kept.requests(0)] == ["s"]


@pytest.mark.parametrize(("most", "size", "left"), [(3, 1000, 3), (100, 25, 2), (100, 9, 0)])
def test_what_ended_first_makes_room(monkeypatch, most, size, left):
    monkeypatch.setattr(kept_answers, "MAX_KEPT", most)
    monkeypatch.setattr(kept_answers, "MAX_KEPT_SIZE", size)
    kept = KeptAnswers()
    for i in range(8):
        kept.begin(f"r{i}", f"n{i}", 1)
        kept.note(tokens(f"r{i}", 0, 10), float(i))
        kept.note(finished(f"r{i}"), float(i))
    assert [one.request_id for one in kept.requests(0)] == [f"r{i}" for i in range(8 - left, 8)]


def test_log_probabilities_weigh_more(monkeypatch):
    monkeypatch.setattr(kept_answers, "MAX_KEPT_SIZE", 100)
    kept = KeptAnswers()
    for name in ("a", "b"):
        kept.begin(name, name, 1)
        kept.note(PromptLogprobs(request_id=name, index=0, own=bytes(80), ranks=bytes(80), top_ids=b"", top=b""), 0.0)
        kept.note(finished(name), 0.0)
    assert len(kept) == 2
    kept.begin("c", "c", 1)
    kept.note(tokens("c", 0, 30), 1.0)
    kept.note(finished("c"), 1.0)
    assert len(kept) == 2


class KeptMachine(RuleBasedStateMachine):
    """Against a plain list of everything that was said."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.now = KeptAnswers(), 0.0
        self.said: dict[str, list[object]] = defaultdict(list)
        self.running: dict[str, int] = {}
        self.unheard_since: dict[str, float] = {}
        self.ended_at: dict[str, float] = {}
        self.count = 0

    @rule(num_answers=st.integers(1, 3))
    def begin(self, num_answers: int) -> None:
        self.count += 1
        name = f"r{self.count}"
        self.kept.begin(name, f"n{self.count}", num_answers)
        self.running[name] = num_answers
        self.said[name] = []

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def say(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        message = tokens(name, len(self.said[name]))
        assert self.kept.note(message, self.now) == (name not in self.unheard_since)
        self.said[name].append(message)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.running[name] -= 1
        message = finished(name, self.running[name])
        self.kept.note(message, self.now)
        self.said[name].append(message)
        if not self.running[name]:
            del self.running[name]
            self.ended_at[name] = self.now

    @rule()
    def frontend_dies(self) -> None:
        for name in self.running:
            assert self.kept.unhear(name, self.now)
            self.unheard_since.setdefault(name, self.now)

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.said)))
        assert self.kept.adopt(name) == self.said[name]
        self.unheard_since.pop(name, None)

    @rule(seconds=st.floats(0, KEEP_S))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for name in self.kept.expired(self.now):
            since = min(self.unheard_since.get(name, self.now), self.ended_at.get(name, self.now))
            assert self.now - since >= KEEP_S - 1e-6
            self.kept.forget(name)
            for table in (self.said, self.running, self.unheard_since, self.ended_at):
                table.pop(name, None)

    @invariant()
    def nothing_stays_for_ever(self) -> None:
        assert len(self.kept) == len(self.said)
        for name in self.said:
            since = min(self.unheard_since.get(name, self.now), self.ended_at.get(name, self.now))
            assert self.now - since <= 2 * KEEP_S


KeptMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestKept = KeptMachine.TestCase
