"""`LLM` over many conversations: in order, a window ahead, nothing left behind by what goes wrong on the way."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import sys
import threading
from unittest.mock import Mock

import msgspec
import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.errors import DisaggError, InputError, UnavailableError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.engine.engine import EngineOptions
from qwen3vl_disagg.language import engine_thread
from qwen3vl_disagg.llm import llm as llm_module
from qwen3vl_disagg.llm import requests as requests_module
from qwen3vl_disagg.protocol.session_events import Encoded, PayloadEnd, PayloadSent
from tests.support.local import comes, settled
from tests.support.scenes import ask_scenes

SHORT = SamplingParams(max_new_tokens=4)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(engine_options=EngineOptions(max_running=4), encode_options=EncodeOptions(embedding_cache_mib=0))


@pytest.fixture(scope="module")
def question(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("scenes")
    return ask_scenes(folder, seed=5, count=1)[0].messages()


@pytest.fixture(scope="module")
def expected(llm, question) -> list:
    return [llm.chat([entry], SHORT)[0].token_ids for entry in (TEXT, question)]


TEXT = [{"role": "user", "content": "What is it?"}]
NO_SUCH = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/no/such/picture.png"}}]}]


class Odd(Exception):
    """What no code expects."""


def check_whole(llm: LLM, question: list, expected: list) -> None:
    """Nothing is held, and the next ones are answered as ever."""
    pool = llm.engine.scheduler.pool
    assert llm.engine.is_empty
    assert pool.num_free == pool.num_pages
    assert settled(llm)
    assert llm.transfer.receiver.buffers.allocator.is_idle
    assert [r.token_ids for r in llm.chat([TEXT, question], SHORT)] == expected


def test_several_answers_encode_and_prefill_once(llm, question, expected, monkeypatch):
    """As many as run at once, and more; each as a conversation alone with its seed."""
    prefilled, encoded = [], []
    prefill, encode = llm.engine.runner.prefill, llm.transfer.worker.encode

    def counting(chunks, plan=None):
        prefilled.extend(chunk.stop - chunk.start for chunk in chunks)
        return prefill(chunks, plan)

    def encoding(items, *args, **kwargs):
        encoded.extend(items)
        return encode(items, *args, **kwargs)

    params = SamplingParams(n=6, max_new_tokens=6, temperature=20.0, seed=11, logprobs=1, ignore_eos=True, stop=["e"])
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner, "prefill", counting)
        patched.setattr(llm.transfer.worker, "encode", encoding)
        llm.engine.reset()  # nothing of the question is cached
        [result] = llm.chat([question], params)
    assert sum(prefilled) == len(result.prompt_token_ids)
    assert len(encoded) == len(result.timings.items) > 0
    alone = [llm.chat([question], msgspec.structs.replace(params, n=1, seed=11 + i))[0] for i in range(6)]
    assert [r.token_ids for r in (result, *result.others)] == [r.token_ids for r in alone]
    assert [r.text for r in (result, *result.others)] == [r.text for r in alone]
    assert [r.finish_reason for r in (result, *result.others)] == [r.finish_reason for r in alone]
    assert len({str(r.token_ids) for r in alone}) > 1
    assert "stop" in {r.finish_reason for r in alone}, "a stop string ends some of them"
    check_whole(llm, question, expected)


def raise_odd(*_, **__):
    raise Odd


def interrupt(*_, **__):
    signal.raise_signal(signal.SIGINT)


def fail_at(monkeypatch, target, name: str, nth: int, fault) -> None:
    """The nth call of a method does what `fault` does first. (On another thread than the main one an interrupt comes a
    moment later, and the call goes on.)"""
    calls, real = itertools.count(1), getattr(target, name)

    def faulty(*args, **kwargs):
        if next(calls) == nth:
            fault()
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, faulty)


@pytest.mark.parametrize("fault", [raise_odd, interrupt])
@pytest.mark.parametrize(
    ("where", "name", "nth"),
    [
        ("processor", "prepare", 3),
        ("module", "AnswerParts", 3),
        ("engine", "add", 3),
        ("engine", "step", 2),
        ("scheduler", "_chunks", 1),
        ("pool", "allocate", 2),
        ("runner", "decode", 1),
        ("worker", "preprocess", 1),
        ("worker", "encode", 1),
        ("receiver", "receive", 1),
    ],
)
def test_whatever_is_raised_on_the_way_leaves_nothing_behind(
    llm, question, expected, monkeypatch, fault, where, name, nth
):
    llm.engine.reset()  # no prefix is known
    targets = {
        "processor": llm.processor,
        "module": llm_module,
        "engine": llm.engine,
        "scheduler": llm.engine.scheduler,
        "pool": llm.engine.scheduler.pool,
        "runner": llm.engine.runner,
        "worker": llm.transfer.worker,
        "receiver": llm.transfer.receiver,
    }
    fail_at(monkeypatch, targets[where], name, nth, fault)
    if fault is raise_odd and where in ("worker", "receiver"):  # an item is tried again, as on a server
        assert [r.token_ids for r in llm.chat([TEXT, question] * 2, SHORT)] == expected * 2
    else:
        with pytest.raises((Odd, KeyboardInterrupt, DisaggError)):
            llm.chat([TEXT, question, TEXT, question], SHORT)
    monkeypatch.undo()
    check_whole(llm, question, expected)


@pytest.mark.parametrize("where", ["reset", "close", "steps", "transfer"])
def test_a_second_interrupt_while_the_first_is_handled(llm, question, expected, monkeypatch, where):
    other = llm.chat_iter([TEXT, question], SHORT, ahead=2)
    next(other)
    target, name = {
        "reset": (llm.engine, "reset"),
        "close": (llm.transfer, "close"),
        "steps": (requests_module, "EngineSteps"),
        "transfer": (llm._requests, "_make_transfer"),
    }[where]
    fail_at(monkeypatch, target, name, 1, interrupt)
    fail_at(monkeypatch, llm.engine, "step", 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.chat([TEXT, question], SHORT)
    monkeypatch.undo()
    [rest] = other
    assert isinstance(rest, DisaggError)
    assert "KeyboardInterrupt" in str(rest)
    check_whole(llm, question, expected)


def test_an_interrupt_while_an_iterator_is_closed(llm, question, expected, monkeypatch):
    iterator = llm.chat_iter([TEXT, question, TEXT], SHORT)
    next(iterator)
    fail_at(monkeypatch, llm.engine, "cancel", 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        iterator.close()
    monkeypatch.undo()
    llm.chat([TEXT], SHORT)
    check_whole(llm, question, expected)


def test_a_forked_child_answers_text_and_refuses_images(llm, question, expected):
    pid = os.fork()
    if not pid:
        is_well = False
        try:
            text, image = llm.chat_each([TEXT, question], SHORT)
            is_well = text.token_ids == expected[0] and isinstance(image, DisaggError) and "forked" in str(image)
        finally:
            os._exit(0 if is_well else 1)
    if not comes(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), 30):
        os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    check_whole(llm, question, expected)


def kill_transfer(llm: LLM) -> None:
    """End its thread without a word to anybody."""
    llm.transfer.close()
    llm.transfer._thread.join(10)
    assert llm.transfer.is_dead


@pytest.mark.parametrize("when", ["before", "meanwhile", "exit"])
def test_a_transfer_whose_thread_ended_is_made_anew(llm, question, expected, monkeypatch, when):
    llm.engine.reset()
    monkeypatch.setattr(engine_thread, "CHECK_S", 0.1)
    if when == "before":
        kill_transfer(llm)
    elif when == "exit":
        transfer = llm.transfer
        transfer._call(sys.exit)
        assert comes(lambda: transfer.is_dead)
    else:
        timer = threading.Timer(0.3, kill_transfer, [llm])
        monkeypatch.setattr(llm.transfer, "admit", lambda *_: timer.start())
        with pytest.raises(DisaggError, match="images and clips has ended"):
            llm.chat([question], SHORT)
    check_whole(llm, question, expected)


@pytest.mark.parametrize(
    ("where", "event"),
    [("encode", Encoded), ("encode", PayloadSent), ("links", PayloadEnd), ("pipeline", None)],
)
def test_what_no_coroutine_of_the_transfer_catches_is_raised(llm, question, expected, monkeypatch, where, event):
    transfer = llm.transfer
    if event is None:
        monkeypatch.setattr(transfer.pipeline, "_come_out", raise_odd)
    else:
        server = getattr(transfer, where)
        real = server.handle
        monkeypatch.setattr(server, "handle", lambda it: raise_odd() if isinstance(it, event) else real(it))
    llm.engine.reset()  # no prefix is known
    with pytest.raises(Odd):
        llm.chat([TEXT, question], SHORT)
    check_whole(llm, question, expected)


def test_a_request_that_the_router_refuses_leaves_the_engine(llm, question, expected, monkeypatch):
    llm.engine.reset()  # no prefix is known: it would wait for rows
    monkeypatch.setattr(llm.transfer._router, "refusal", lambda *_, **__: UnavailableError("no"))
    text, error = llm.chat_each([TEXT, question], SHORT)
    assert text.token_ids == expected[0]
    assert isinstance(error, UnavailableError)
    monkeypatch.undo()
    check_whole(llm, question, expected)


def test_an_item_that_fails_three_times_fails_its_conversation_alone(llm, question, expected, monkeypatch):
    llm.engine.reset()  # no prefix is known
    broken = Mock(side_effect=Odd)
    monkeypatch.setattr(llm.transfer.worker, "preprocess", broken)
    text, error = llm.chat_each([TEXT, question], SHORT)
    assert text.token_ids == expected[0]
    assert isinstance(error, DisaggError)
    assert (error.status, error.code, error.param) == (500, "encode_error", "messages[0].content[0]")
    num_images = sum(part["type"] == "image_url" for part in question[0]["content"])
    assert 3 <= broken.call_count <= 3 * num_images
    monkeypatch.undo()
    check_whole(llm, question, expected)


def test_where_the_callers_thread_runs_an_event_loop(llm, question, expected):
    async def cell() -> list:
        return llm.chat([TEXT, question], SHORT)

    assert [r.token_ids for r in asyncio.run(cell())] == expected
    check_whole(llm, question, expected)


def test_its_thread_ends_with_it(question):
    llm = LLM()
    llm.chat([question], SHORT)
    thread = llm.transfer._thread
    assert thread.is_alive()
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_many_calls_that_fail_and_then_a_good_one(llm, question, expected):
    for _ in range(llm.engine.options.max_running + 2):
        with pytest.raises(InputError, match="no/such"):
            llm.chat([TEXT, question, NO_SUCH], SHORT)
        with pytest.raises(InputError, match="SamplingParams"):
            llm.chat([TEXT, question], [SHORT, None])
        with pytest.raises(Odd):
            list(llm.chat_iter((TEXT if i < 2 else raise_odd() for i in range(3)), SHORT))
        with pytest.raises(Odd):
            llm.chat([TEXT, question], SHORT, on_text=raise_odd)
        next(llm.chat_iter([TEXT, question, TEXT], SHORT))  # and not looked at any more
    check_whole(llm, question, expected)


def test_results_come_in_order_and_conversations_are_taken_a_window_ahead(llm, question, expected):
    lengths, num_taken, num_given, most = [9, 1, 3, 2, 1, 1, 6, 1], 0, 0, 0

    def conversations():
        nonlocal num_taken, most
        for number in range(len(lengths)):
            num_taken += 1
            most = max(most, num_taken - num_given)
            yield question if number % 2 else TEXT

    sampling = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in lengths]
    iterator = llm.chat_iter(conversations(), sampling, ahead=3)
    assert num_taken == 0
    for number, result in enumerate(iterator):
        assert len(result.token_ids) == lengths[number]
        assert result.token_ids[:1] == expected[number % 2][:1]
        num_given += 1
        assert num_taken <= num_given + 2
    assert (num_given, most) == (len(lengths), 3)
    check_whole(llm, question, expected)


def test_conversations_with_many_bytes_wait_for_those_before(llm, question, expected, monkeypatch):
    size = len(llm.processor.prepare(question, allow_paths=True).media[0])
    monkeypatch.setattr(llm_module, "MAX_AHEAD_BYTES", 2 * size)
    held, real = [], llm.processor.prepare

    def prepare(*args, **kwargs):
        held.append(llm._requests.media_bytes // size)
        return real(*args, **kwargs)

    monkeypatch.setattr(llm.processor, "prepare", prepare)
    assert [r.token_ids for r in llm.chat([question] * 5, SHORT)] == [expected[1]] * 5
    assert max(held) == 1


def test_errors_stay_in_their_places(llm, question, expected):
    given = [NO_SUCH, TEXT, InputError("line 3: not JSON"), question, 7]
    first, text, third, image, last = llm.chat_iter(given, SHORT)
    assert [text.token_ids, image.token_ids] == expected
    assert third is given[2]
    assert isinstance(first, InputError)
    assert "at least one message" in str(last)


def test_iterators_that_are_read_in_turns_and_one_that_is_closed(llm, question, expected):
    first, second, third = (llm.chat_iter([TEXT, question, TEXT], SHORT) for _ in range(3))
    found = [[next(iterator).token_ids] for iterator in (first, second, third)]
    third.close()
    for _ in range(2):
        found[0].append(next(first).token_ids)
        found[1].append(next(second).token_ids)
    text, image = expected
    assert found == [[text, image, text]] * 2 + [[text]]
    assert list(first) == list(second) == list(third) == []
    check_whole(llm, question, expected)


def test_a_step_that_breaks_ends_the_other_iterators_with_an_error(llm, question, expected, monkeypatch):
    first, second = (llm.chat_iter([TEXT, question], SHORT, ahead=2) for _ in range(2))
    next(first)
    monkeypatch.setattr(llm.engine, "step", raise_odd)
    with pytest.raises(Odd):
        next(second)
    monkeypatch.undo()
    [rest] = first
    assert isinstance(rest, DisaggError)
    assert "Odd" in str(rest)
    check_whole(llm, question, expected)


@pytest.mark.parametrize("ahead", [0, -1])
def test_a_window_is_at_least_one(llm, ahead):
    with pytest.raises(InputError, match="at least 1"):
        llm.chat_iter([TEXT], ahead=ahead)


@pytest.mark.parametrize("token_id", [10**8, 10**6])
def test_token_ids_outside_of_the_vocabulary(llm, question, expected, token_id):
    with pytest.raises(InputError, match="logit_bias takes token ids from 0 to") as caught:
        llm.chat([TEXT], SamplingParams(logit_bias={token_id: 1.0}))
    assert caught.value.param == "logit_bias"
    check_whole(llm, question, expected)
