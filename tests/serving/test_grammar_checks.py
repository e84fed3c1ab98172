"""Grammars of strangers are checked in a child that can be killed: a bad one is a 400 at once, and nobody waits."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_disagg.core.errors import Failure, InputError, PreparationFailed
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.media.child import ChildProcess, Ready, pack
from qwen3vl_disagg.media.stop import Stopped, StopSignal
from qwen3vl_disagg.serving import known_grammars, prepare_child, prepare_pool
from qwen3vl_disagg.serving.known_grammars import KnownGrammars
from qwen3vl_disagg.serving.prepare_child import Checked, GrammarJob
from qwen3vl_disagg.serving.prepare_pool import PreparePool
from qwen3vl_disagg.serving.prepared import Rules
from tests.support.fake_backend import ASK, PATH, FakeBackend, tiny_processor
from tests.support.http import post_json
from tests.support.running import Running, wait_for


def deep(num_levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(num_levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def doubled(num_levels: int) -> dict[str, Any]:
    """Each level has the one below twice."""
    schema: dict[str, Any] = {"type": "integer"}
    for i in range(num_levels):
        schema = {"anyOf": [schema, {"type": "object", "properties": {f"k{i}": schema}}]}
    return schema


def referring(num_levels: int) -> dict[str, Any]:
    """Each name stands for an object that has the next one twice."""
    named = {
        f"d{i}": {"type": "object", "properties": {key: {"$ref": f"#/$defs/d{i + 1}"} for key in "ab"}}
        for i in range(num_levels)
    }
    return {"$defs": {**named, f"d{num_levels}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


HOSTILE: dict[str, dict[str, Any]] = {
    "deep": {"guided_json": deep(29)},
    "doubled": {"guided_json": doubled(9)},
    "many properties": {"guided_json": {"type": "object", "properties": {f"p{i}": {} for i in range(4000)}}},
    "huge enum": {"guided_json": {"enum": [f"value {i}" for i in range(20_000)]}},
    "long": {"guided_json": {"enum": ["x" * 200_000]}},
    "multiple of": {"guided_json": {"type": "integer", "multipleOf": 9_999_991}},
    "patterns together": {"guided_json": {"allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(2, 14)]}},
    "recursion": {"guided_json": {"$ref": "#"}},
    "references": {"guided_json": referring(60)},
    "references together": {"guided_json": {"allOf": [referring(60), referring(59)]}},
    "equal items": {"guided_json": {"type": "array", "prefixItems": [deep(6)] * 300, "minItems": 300}},
    "equal ways": {"guided_json": {"anyOf": [deep(6)] * 300}},
    "many items": {"guided_json": {"type": "array", "items": deep(6), "minItems": 10**9}},
    "long text": {"guided_json": {"type": "string", "minLength": 10**9 - 1, "maxLength": 10**9}},
    "a reference to elsewhere": {"guided_json": {"$ref": "http://127.0.0.1:1/x"}},
    "a file": {"guided_json": {"$ref": "file:///etc/passwd"}},
    "repetitions": {"regex": "a{100000000}"},
    "states": {"regex": "(.*a.{2000}b.*){2000}"},
    "exponential": {"regex": "(((a|aa)+)+)+(.*a.{40}){9}$"},
    "nested repetitions": {"regex": "((((a{0,900}){1,900}b){1,900}){1,900}c{900}){900}"},
    "brackets": {"ebnf": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "doubling rules": {
        "ebnf": "\n".join(["start: r0"] + [f"r{i}: r{i + 1} r{i + 1}" for i in range(60)] + ['r60: "a"'])
    },
    "no end": {"ebnf": "start: start"},
    "gbnf": {"grammar": "root ::= " + "(" * 20_000},
    "many choices": {"choice": [f"c{i}" for i in range(8000)]},
}
MAY_PASS = (
    *("deep", "nested repetitions", "states", "doubled"),
    *("references", "equal items", "equal ways", "many items", "long text", "exponential"),
)
KILLS = ("many properties", "multiple of", "patterns together", "doubled")
"""More than they may take."""
SOON_S = 15.0
"""By the clock, beside whatever else runs; alone it is less than one."""


def children() -> list[int]:
    """Preparing children of this process, those that have ended but not been waited for among them not."""
    lists = [(task / "children").read_text() for task in Path("/proc/self/task").iterdir()]
    pids = [int(pid) for pids in lists for pid in pids.split()]
    found = []
    for pid in pids:
        with suppress(OSError):  # it has just ended
            if b"serving.prepare_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.fixture(scope="module")
def server():
    with Running(FakeBackend()) as running:
        yield running


def post(server: Running, **fields: Any) -> tuple[int, Any]:
    reply = post_json(server.url + PATH, {**ASK, **fields})
    return reply.status, reply.json


def make_ready(server: Running, new: Iterator[int] = count(1)) -> None:  # noqa: B008 - numbers go on from call to call
    """A child is there, and has read the vocabulary: it checks a grammar that nobody had before."""
    assert post(server, regex=f"a{{{next(new)}}}")[0] == 200


def test_a_child_without_work_reads_the_vocabulary_before_the_first_grammar(server):
    make_ready(server)
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not children(), 10)
    post(server, messages=[{"role": "user", "content": "long " * 4000}])  # finds it dead: another is started
    wait_for(lambda: any(b"llguidance" in Path(f"/proc/{pid}/maps").read_bytes() for pid in children()), 30)


def check_hostile(server: Running, name: str, limit_s: float) -> None:
    make_ready(server)
    started = time.monotonic()
    status, body = post(server, **HOSTILE[name])
    took = time.monotonic() - started
    assert status == 400 or (status == 200 and name in MAY_PASS), body
    if status == 400:
        assert body["error"]["param"].split(".")[0] in HOSTILE[name]
        assert "root:" not in body["error"]["message"]
    assert took < limit_s


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in KILLS])
def test_a_hostile_grammar_is_refused_at_once(server, name):
    check_hostile(server, name, SOON_S)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "multiple of" else pytest.mark.slow) for name in KILLS]
)
def test_a_grammar_that_takes_too_long_costs_no_child(server, name):
    make_ready(server)
    before = children()
    check_hostile(server, name, SOON_S)
    assert children() == before
    assert post(server)[0] == 200


@pytest.mark.acceptance
@pytest.mark.parametrize("first", range(0, len(HOSTILE), 8))
def test_eight_hostile_grammars_at_once(server, first):
    """Each has its turn with a child; what is known, and what has no grammar, waits for none of it."""
    make_ready(server)
    assert post(server, regex="known+")[0] == 200
    took: dict[str, float] = {}

    def ask(name: str) -> None:
        started = time.monotonic()
        status, _ = post(server, **{key: varied(value) for key, value in HOSTILE[name].items()})
        is_right = status in (400, 429) or (status == 200 and name in MAY_PASS)
        took[name] = time.monotonic() - started if is_right else float("inf")

    names = [*HOSTILE, *HOSTILE][first : first + 8]
    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    others = []
    while any(thread.is_alive() for thread in threads):
        started = time.monotonic()
        assert post(server)[0] == post(server, regex="known+")[0] == 200
        others.append(time.monotonic() - started)
    print(f"\n{ {name: round(seconds, 2) for name, seconds in took.items()} }, others {max(others, default=0.0):.2f} s")
    assert len(took) == len(names)
    assert max(took.values()) < 15.0  # of CPU time 8 x 0.2 + 3 x 0.7 s at the most, beside whatever else runs
    assert max(others, default=0.0) < 1.0


def varied(value: Any) -> Any:
    """The same thing that nobody has asked for before."""
    if isinstance(value, dict):
        return {**value, "description": "varied"}
    return [*value, "varied"] if isinstance(value, list) else value + " "


def test_nobody_waits_for_a_check(server):
    """While grammars are checked that take all the time that they may, requests without one and with one that is known
    are answered, and the event loop turns."""
    make_ready(server)
    assert post(server, regex="known+")[0] == 200
    answers: list[int] = []
    hostile = [
        threading.Thread(target=lambda k=k: answers.append(post(server, guided_json={"multipleOf": k})[0]))
        for k in (9_999_973, 9_999_971, 9_999_943)
    ]
    with server.lateness() as late:
        for thread in hostile:
            thread.start()
        for _ in range(5):
            started = time.monotonic()
            assert post(server)[0] == 200
            assert post(server, regex="known+")[0] == 200
            assert time.monotonic() - started < 2.0
        alive = [thread.is_alive() for thread in hostile]
        for thread in hostile:
            thread.join(60)
    assert any(alive)
    assert answers == [400, 400, 400]
    assert max(late) < 0.2


def test_one_that_was_refused_is_not_checked_again(server):
    make_ready(server)
    bad = {"guided_json": {"multipleOf": 9_999_937}}
    assert post(server, **bad)[0] == 400
    started = time.monotonic()
    for _ in range(5):
        status, body = post(
            server, response_format={"type": "json_schema", "json_schema": {"schema": bad["guided_json"]}}
        )
        assert (status, body["error"]["code"]) == (400, "grammar_too_complex")
        assert body["error"]["param"].startswith("response_format")
    assert time.monotonic() - started < 0.5


def test_a_child_that_died_between_two_grammars_is_no_fault(server):
    make_ready(server)
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not children(), 10)
    assert post(server, regex="after+")[0] == 200


SLOW_CHILD = """
import os, sys, time
ready, checked = map(bytes.fromhex, sys.argv[1:])
os.write(1, ready)
while size := os.read(0, 4):
    os.read(0, int.from_bytes(size, "big"))
    time.sleep(0.5)
    os.write(1, ready)
    time.sleep(0.5)
    os.write(1, checked)
"""


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_client_that_hangs_up_costs_no_child(monkeypatch, is_begun):
    """Whether or not the child has begun, for it may have to read the vocabulary first: the check goes on to its end
    and has its verdict; the child checks the next one."""
    pool = PreparePool(tiny_processor(), Rules(model_names=["tiny"]))
    words = [pack(Ready()).hex(), pack(Checked(Failure.of(InputError("bad")))).hex()]
    monkeypatch.setattr(pool, "_command", (sys.executable, "-S", "-c", SLOW_CHILD, *words))
    seen, stop = list[ChildProcess](), StopSignal()
    receive, send = ChildProcess.receive, ChildProcess.send

    def send_and_leave(child: ChildProcess, job: Any, *args: Any) -> None:
        send(child, job, *args)
        seen.append(child)
        if not is_begun:
            stop.set()

    def receive_and_leave(child: ChildProcess) -> Any:
        word = receive(child)
        if isinstance(word, Ready) and seen:
            stop.set()
        return word

    monkeypatch.setattr(ChildProcess, "send", send_and_leave)
    monkeypatch.setattr(ChildProcess, "receive", receive_and_leave)
    for signal_ in (stop, StopSignal()):
        with pytest.raises(InputError, match="bad"):
            pool.check_grammar(GRAMMAR, cpu_s=1.0, in_reasoning=False, stop=signal_)
    [child] = set(seen)
    assert pool._idle == [child]
    assert child.process.poll() is None
    child.close()


def test_who_hangs_up_before_a_child_is_there_leaves_the_queue(monkeypatch):
    pool, stop = PreparePool(tiny_processor(), Rules(model_names=["tiny"])), StopSignal()
    monkeypatch.setattr(pool, "_command", (sys.executable, "-S", "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(prepare_pool, "START_S", 2.0)
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Stopped):
        pool.check_grammar(GRAMMAR, cpu_s=1.0, in_reasoning=False, stop=stop)


def test_a_child_that_does_not_begin_is_not_waited_for_long(monkeypatch):
    pool = PreparePool(tiny_processor(), Rules(model_names=["tiny"]))
    stuck = "import os, sys; os.write(1, bytes.fromhex(sys.argv[1]))\nwhile os.read(0, 99): pass"
    monkeypatch.setattr(pool, "_command", (sys.executable, "-S", "-c", stuck, pack(Ready()).hex()))
    monkeypatch.setattr(pool, "warm_up", lambda: None)
    monkeypatch.setattr(prepare_pool, "GRAMMAR_START_S", 0.1)
    started = time.monotonic()
    with pytest.raises(PreparationFailed):
        pool.check_grammar(GRAMMAR, cpu_s=1.0, in_reasoning=False, stop=StopSignal())
    assert time.monotonic() - started < 10, "two children, each for 0.1 s"


def test_a_child_that_has_begun_and_says_nothing_more_ends_with_its_time(monkeypatch):
    pool = PreparePool(tiny_processor(), Rules(model_names=["tiny"]))
    says, word = "os.write(1, bytes.fromhex(sys.argv[1]))", pack(Ready()).hex()
    silent = f"import os, sys; {says}; os.read(0, 99); {says}\nwhile os.read(0, 99): pass"
    monkeypatch.setattr(pool, "_command", (sys.executable, "-S", "-c", silent, word))
    monkeypatch.setattr(pool, "warm_up", lambda: None)
    monkeypatch.setattr(prepare_pool, "GRAMMAR_S", 0.3)
    started = list[ChildProcess]()
    send = ChildProcess.send
    monkeypatch.setattr(ChildProcess, "send", lambda child, *args: (started.append(child), send(child, *args))[1])
    before = time.monotonic()
    with pytest.raises(InputError, match="too"):
        pool.check_grammar(GRAMMAR, cpu_s=1.0, in_reasoning=False, stop=StopSignal())
    assert 0.3 < time.monotonic() - before < 10
    assert started[0].process.poll() is not None
    assert pool._idle == []


GRAMMAR = Grammar.of_regex("a", param="regex")
FORKS = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # which has threads


def code_of(check: Callable[[Grammar, bool], None]) -> str:
    checked = prepare_child.check_grammar(GrammarJob(GRAMMAR, False, 1.0), check)
    assert checked.failure is not None
    return checked.failure.code


def test_a_process_that_cannot_fork_says_so(monkeypatch):
    def refuse_fork() -> int:
        raise BlockingIOError("too many processes")

    num_files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fork", refuse_fork)
    assert code_of(lambda *_: None) == PreparationFailed().code
    assert len(os.listdir("/proc/self/fd")) == num_files


@FORKS
def test_a_check_that_goes_wrong_is_our_fault_and_its_traceback_is_shown(capfd):
    def fail(grammar: Grammar, in_reasoning: bool) -> None:
        raise ZeroDivisionError("of ours")

    logging.getLogger(prepare_child.__name__).addHandler(handler := logging.StreamHandler())
    try:
        assert code_of(fail) == PreparationFailed().code
    finally:
        logging.getLogger(prepare_child.__name__).removeHandler(handler)
    assert "ZeroDivisionError: of ours" in capfd.readouterr().err


@FORKS
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, None])
def test_a_check_that_took_all_that_it_may_is_the_grammars_fault(ending):
    def end(grammar: Grammar, in_reasoning: bool) -> None:
        if ending is None:
            raise MemoryError
        signal.signal(ending, signal.SIG_DFL) if ending != signal.SIGKILL else None
        os.kill(os.getpid(), ending)

    assert code_of(end) == "grammar_too_complex"


@FORKS
def test_a_check_that_took_all_its_cpu_time_has_no_verdict():
    def spin(grammar: Grammar, in_reasoning: bool) -> None:
        while True:
            pass

    assert prepare_child.check_grammar(GrammarJob(GRAMMAR, False, 0.05), spin) == Checked(is_whole=False)


def pass_it(_: Grammar) -> bool:
    return True


def refuse(_: Grammar) -> bool:
    raise InputError("bad", code="grammar_too_complex")


def test_verdicts_are_kept_by_what_a_grammar_says(monkeypatch):
    known, seen = KnownGrammars(), list[Grammar]()

    def see(grammar: Grammar) -> bool:
        seen.append(grammar)
        return True

    assert not known.is_good(GRAMMAR, in_reasoning=False)
    for _ in range(2):
        assert known.check(GRAMMAR, see, in_reasoning=False)
    assert len(seen) == 1
    assert known.is_good(Grammar.of_regex("a", param="ebnf"), in_reasoning=False)
    assert not known.is_good(GRAMMAR, in_reasoning=True)
    with pytest.raises(InputError):
        known.check(GRAMMAR, refuse, in_reasoning=True)
    with pytest.raises(InputError) as caught:
        known.check(Grammar.of_regex("a", param="ebnf"), see, in_reasoning=True)
    assert (caught.value.param, caught.value.code, len(seen)) == ("ebnf", "grammar_too_complex", 1)
    monkeypatch.setattr(known_grammars, "REFUSED_S", 0.0)
    with pytest.raises(InputError):
        known.check(Grammar.of_regex("b"), refuse, in_reasoning=False)
    known.check(Grammar.of_regex("b"), see, in_reasoning=False)
    assert len(seen) == 2


def test_a_check_without_an_end_is_a_verdict_only_where_it_is_the_last():
    """Until then it is known that another would have none either."""
    known, seen = KnownGrammars(), list[Grammar]()

    def see(grammar: Grammar) -> bool:
        seen.append(grammar)
        return False

    for _ in range(2):
        assert not known.check(GRAMMAR, see, in_reasoning=False, is_last=False)
        assert not known.is_good(GRAMMAR, in_reasoning=False)
    assert len(seen) == 1
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            known.check(GRAMMAR, lambda _: False, in_reasoning=False)
        assert caught.value.code == "grammar_too_complex"
    with pytest.raises(InputError):
        known.is_good(GRAMMAR, in_reasoning=False)


def test_verdicts_and_those_who_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(known_grammars, "MAX_KNOWN", 2)
    known = KnownGrammars()
    for text in "abc":
        known.check(Grammar.of_regex(text), pass_it, in_reasoning=False)
        with pytest.raises(InputError):
            known.check(Grammar.of_regex(text), refuse, in_reasoning=True)
    assert [known.is_good(Grammar.of_regex(text), in_reasoning=False) for text in "abc"] == [False, True, True]
    assert not known.is_good(Grammar.of_regex("a"), in_reasoning=True)
    with pytest.raises(InputError):
        known.is_good(Grammar.of_regex("b"), in_reasoning=True)


def test_what_a_checked_grammar_is_told_to_the_ranks(server):
    assert post(server, response_format={"type": "json_object"}, seed=5)[0] == 200
    [sampling] = [h.sampling for h in server.backend.handles if h.sampling.seed == 5]
    assert sampling.grammar is not None
    assert (sampling.grammar.kind, sampling.grammar.param) == ("json", "response_format")
