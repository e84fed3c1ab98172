"""Masks are made beside the steps: nobody waits for a grammar that takes its time but its own request."""

from __future__ import annotations

import threading
import time

import pytest

from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.grammars import Grammars
from qwen3vl_disagg.engine.masks import Mask
from qwen3vl_disagg.language.engine_thread import EngineThread
from qwen3vl_disagg.parallel.lockstep import Outlook, StepPlan
from qwen3vl_disagg.protocol.messages import Finished, Tokens
from tests.support.grammars import Scripted, answer, make_engine, run, text_of, tokenizer

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]


def test_the_vocabulary_is_made_once_and_before_the_first_grammar_where_that_is_asked_for():
    made: list[Scripted] = []
    grammars = Grammars(lambda: made.append(Scripted()) or (lambda grammar, prompt_ids: made[0]))
    assert grammars.warm_up() is grammars.warm_up()
    grammars.warm_up().result(10)
    assert len(made) == 1
    [masks] = grammars.start(Grammar.of_regex("r"), PROMPT)
    started = threading.Event()
    masks.on_started(started.set)
    assert started.wait(10)
    assert len(made) == 1


def test_a_step_does_not_wait_for_a_mask_that_is_late():
    slow = threading.Event()
    engine = make_engine(lambda grammar, prompt_ids: Scripted(slow if grammar.text == "s" else None))
    engine.add("slow", PROMPT, [], SamplingParams(grammar=Grammar.of_regex("s")))
    engine.add("quick", PROMPT, [], SamplingParams(grammar=Grammar.of_regex("q")))
    engine.add("plain", PROMPT, [], SamplingParams(ignore_eos=True, max_new_tokens=30))
    events = {"slow": [], "quick": [], "plain": []}

    def step() -> None:
        new = engine.step()
        for event in new:
            events[event.request_id].append(event)
        if not new and not engine.has_work:
            assert engine.wait(10.0)

    while not all(any(isinstance(event, Finished) for event in events[name]) for name in ("plain", "quick")):
        step()
    assert len(events["slow"]) == 1  # its first token
    assert not engine.has_work
    assert engine.outlook(1).decode == 0
    slow.set()
    while not engine.is_empty:
        step()
    for name in ("slow", "quick"):
        assert text_of(answer(events[name])[0]) == "red pen"


def test_a_step_waits_once_for_all_late_masks(monkeypatch):
    monkeypatch.setattr("qwen3vl_disagg.engine.picking.PATIENCE_S", 0.05)
    slow = threading.Event()
    engine = make_engine(lambda grammar, prompt_ids: Scripted(slow), max_running=32, max_prefill_tokens=1000)
    names = [str(number) for number in range(31)]
    for name in names:
        engine.add(name, PROMPT, [], SamplingParams(grammar=Grammar.of_regex("s")))
    while len(engine.scheduler.admitted) < len(names):
        engine.admit()
        engine.wait(10.0)
    engine.add("plain", PROMPT, [], SamplingParams(ignore_eos=True, max_new_tokens=9))
    assert len([event for event in engine.step() if isinstance(event, Tokens)]) == 32
    started = time.monotonic()
    assert [event.request_id for event in engine.step()] == ["plain"]
    assert time.monotonic() - started < 0.5
    slow.set()


def test_a_request_is_queued_with_its_first_mask():
    gate, asked = threading.Event(), threading.Event()

    class SlowAtFirst(Scripted):
        def mask(self) -> Mask:
            asked.set()
            assert gate.wait(30)
            return super().mask()

    engine = make_engine(lambda grammar, prompt_ids: SlowAtFirst())
    engine.add("slow", PROMPT, [], SamplingParams(grammar=Grammar.of_regex("r")))
    assert asked.wait(30)
    engine.add("plain", PROMPT, [], SamplingParams(max_new_tokens=2))
    while not any(isinstance(event, Finished) for event in engine.step()):
        assert not engine.scheduler.admitted.keys() - {"plain"}
    gate.set()
    events = []
    while not engine.is_empty:
        events += engine.step()
        if not engine.has_work:
            engine.wait(10.0)
    assert text_of(answer(events)[0]) == "red pen"


@pytest.mark.parametrize("is_preempted", [False, True])
def test_a_lone_late_mask_holds_up_no_other_rank(is_preempted):
    """Where ranks have agreed on a step, they wait for each other in it; `is_preempted`: it is a step of prefill."""
    slow = threading.Event()
    engine = make_engine(lambda grammar, prompt_ids: Scripted(slow), prefix_cache=False)
    engine.add("slow", PROMPT, [], SamplingParams(grammar=Grammar.of_regex("s")))
    events = []
    while not any(isinstance(event, Tokens) for event in events):
        events += engine.step()
        if not engine.has_work:
            engine.wait(10.0)
    if is_preempted:
        engine.scheduler._preempt(engine.scheduler.admitted["slow"])
        engine.admit()
    opened = threading.Timer(5.0, slow.set)
    opened.start()
    for number in range(4):
        events += engine.step(StepPlan(step=number, num_rows=8, prefill=8 if is_preempted else 0))
    assert not slow.is_set()
    assert engine.outlook(5) == Outlook(step=5)
    opened.cancel()
    slow.set()
    while not engine.is_empty:
        events += engine.step()
        if not engine.has_work:
            engine.wait(10.0)
    assert text_of(answer(events)[0]) == "red pen"


def test_a_mask_that_fails_ends_its_own_request():
    engine = make_engine(lambda grammar, prompt_ids: Scripted(broken_at=int(grammar.text)))
    params = [SamplingParams(grammar=Grammar.of_regex(str(at))) for at in range(6)]
    events = run(engine, {str(at): (PROMPT, param) for at, param in enumerate(params)})
    num_tokens = len(tokenizer().encode("red pen")) + 1
    for at in range(6):
        ids, code = answer(events[str(at)])
        if at < num_tokens:
            assert (len(ids), code) == (at, "grammar_too_complex")
        else:
            assert (len(ids), code) == (num_tokens, "stop")


def test_a_request_that_is_cancelled_while_its_grammar_is_compiled():
    gate = threading.Event()

    def compile(grammar: Grammar, prompt_ids) -> Scripted:
        assert gate.wait(30)
        return Scripted()

    engine = make_engine(compile)
    for name in "abc":
        engine.add(name, PROMPT, [], SamplingParams(grammar=Grammar.of_regex("r")))
    engine.add("plain", PROMPT, [], SamplingParams(max_new_tokens=2))
    while not any(isinstance(event, Finished) for event in engine.step()):
        pass  # nobody waits for a grammar
    engine.cancel("a")
    engine.cancel("c")
    assert not engine.is_empty
    gate.set()
    events = []
    while not engine.is_empty:
        events += engine.step()
        if not engine.has_work:
            engine.wait(10.0)
    assert {event.request_id for event in events} == {"b"}
    assert text_of(answer(events)[0]) == "red pen"


def test_the_engines_thread_wakes_up_for_a_grammar_and_for_a_late_mask():
    gate, slow, done = threading.Event(), threading.Event(), threading.Event()
    seen: list = []

    def compile(grammar: Grammar, prompt_ids) -> Scripted:
        assert gate.wait(30)
        return Scripted(slow)

    def on_events(events) -> None:
        seen.extend(events)
        if any(isinstance(event, Finished) for event in events):
            done.set()

    thread = EngineThread(make_engine(compile), on_events, lambda error: done.set())
    thread.start()
    params = SamplingParams(grammar=Grammar.of_regex("r"))
    for name in "ab":
        thread.post(lambda engine, name=name: engine.add(name, PROMPT, [], params))
    time.sleep(0.1)
    assert seen == []
    gate.set()
    deadline = time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(seen) == 2
    slow.set()
    assert done.wait(20)
    assert thread.stop(10)
