"""Jobs that are ended from outside: at once, wherever they are, and nothing but they."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.stop import Slots, Stopped, StopSignal
from tests.support.media_bytes import clip
from tests.support.media_children import is_there, once_ready, open_files, runs, with_each_job
from tests.support.media_clips import N
from tests.support.media_images import jpeg

AT_ONCE_S = 0.2
SLACK_S = 0.4
"""For a machine that has much else to do."""
LONG = jpeg() + bytes(3 * 2**20)
"""More than a pipe holds."""

JOBS: dict[str, Callable[[MediaDecoder, StopSignal], object]] = {
    "image": lambda decoder, stop: decoder.image(LONG, stop=stop),
    "probe": lambda decoder, stop: decoder.probe_video(clip(), stop=stop),
    "frames": lambda decoder, stop: next(decoder.video_frames(clip(), [0], stop=stop)),
}


@pytest.fixture
def decoder() -> Iterator[MediaDecoder]:
    decoder = MediaDecoder(max_children=1)
    yield decoder
    decoder.close()


def test_a_stop():
    stop = StopSignal()
    stop.check()
    assert (stop.is_set, stop.seconds_left()) == (False, float("inf"))
    stop.set()
    assert stop.is_set
    late = StopSignal(time.monotonic() + 0.05)
    assert not late.is_set
    time.sleep(0.06)
    assert late.is_set
    with pytest.raises(Stopped):
        late.check()
    assert not issubclass(Stopped, InputError)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("is_late", [False, True])
def test_one_that_is_set_starts_nothing(decoder, started, job, is_late):
    stop = StopSignal(time.monotonic() if is_late else None)
    if not is_late:
        stop.set()
    with pytest.raises(Stopped):
        JOBS[job](decoder, stop)
    assert started == []


def test_frames_that_nobody_has_asked_for_start_nothing(decoder, started):
    stop = StopSignal()
    frames = decoder.video_frames(clip(), [0], stop=stop)
    stop.set()
    with pytest.raises(Stopped):
        next(frames)
    assert started == []


@pytest.mark.parametrize(
    ("job", "act"),
    [
        ("image", "time.sleep(60)"),  # we are still sending
        ("image", "with_each_job: time.sleep(60)"),
        ("image", "with_each_job: say(Picture(64, 96)), os.write(1, b'x'), time.sleep(60)"),  # in the middle of pixels
        ("probe", "with_each_job: time.sleep(60)"),
        ("frames", "with_each_job: time.sleep(60)"),
        ("image", "runs: import time; time.sleep(60)"),  # it does not even start
    ],
)
def test_a_job_that_runs_ends_at_once(monkeypatch, decoder, started, job, act):
    before, stop, ended = open_files(), StopSignal(), []

    def end_it() -> None:
        while not started or not (decoder._busy or act.startswith("runs")):
            time.sleep(0.005)
        time.sleep(0.1)
        ended.append(time.monotonic())
        stop.set()

    with monkeypatch.context() as patch:
        how, _, code = act.rpartition(": ")
        {"": once_ready, "with_each_job": with_each_job, "runs": runs}[how](patch, code)
        thread = threading.Thread(target=end_it)
        thread.start()
        with pytest.raises(Stopped):
            JOBS[job](decoder, stop)
    assert 0 <= time.monotonic() - ended[0] < AT_ONCE_S + SLACK_S
    thread.join()
    (child,) = started
    assert child.process.returncode is not None
    assert not is_there(child.process.pid)
    assert open_files() <= before
    if job == "frames":
        assert len(list(decoder.video_frames(clip(), range(N)))) == N  # in a new one, without waiting
        assert len(started) == 2


def test_a_job_ends_with_its_time(monkeypatch, decoder, started):
    with_each_job(monkeypatch, "time.sleep(60)")
    began = time.monotonic()
    with pytest.raises(Stopped):
        decoder.image(jpeg(), stop=StopSignal(began + 0.4))
    assert 0.4 <= time.monotonic() - began < 0.4 + AT_ONCE_S + SLACK_S
    assert not is_there(started[0].process.pid)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_job_that_waits_for_its_turn_ends_at_once_and_the_other_goes_on(decoder, started, is_late):
    frames = decoder.video_frames(clip(), range(N))
    next(frames)
    began = time.monotonic()
    stop = StopSignal(began + 0.2 if is_late else None)
    timer = threading.Timer(0.2, (StopSignal() if is_late else stop).set)
    timer.start()
    with pytest.raises(Stopped):
        decoder.probe_video(clip(), stop=stop)
    assert 0.2 <= time.monotonic() - began < 0.2 + AT_ONCE_S + SLACK_S
    assert len(list(frames)) == N - 1
    assert decoder.probe_video(clip(), stop=StopSignal()).width == 96
    assert len(started) == 1


def test_frames_that_are_there_already_are_not_handed_out(decoder, started):
    stop = StopSignal()
    frames = decoder.video_frames(clip(), range(N), stop=stop)
    next(frames)
    stop.set()
    with pytest.raises(Stopped):
        next(frames)
    assert not is_there(started[0].process.pid)
    assert decoder.image(jpeg()).shape == (64, 96, 3)


def test_one_stop_ends_many_jobs(monkeypatch, started):
    with_each_job(monkeypatch, "time.sleep(60)")
    decoder, stop = MediaDecoder(max_children=2), StopSignal()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(decoder.image, jpeg(), stop=stop) for _ in range(4)]
        while len(decoder._busy) < 2 or len(decoder._slots["image"]._queue) < 2:
            time.sleep(0.01)
        stop.set()
        began = time.monotonic()
        assert [type(job.exception(10)) for job in jobs] == [Stopped] * 4
    assert time.monotonic() - began < AT_ONCE_S + SLACK_S
    assert len(started) == 2
    assert not any(is_there(child.process.pid) for child in started)


def test_turns_come_in_order_whoever_leaves():
    slots, order = Slots(1), []
    gone = StopSignal()

    def ask(number: int) -> None:
        try:
            with slots.one(gone if number == 2 else StopSignal()):
                order.append(number)
        except Stopped:
            order.append(-number)

    with slots.one(StopSignal()):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for count, thread in enumerate(threads, 1):
            thread.start()
            while len(slots._queue) < count:
                time.sleep(0.001)
        gone.set()
        while len(slots._queue) == 6:
            time.sleep(0.01)
        time.sleep(0.15)  # all have looked at their Stops since
    for thread in threads:
        thread.join(10)
    assert order == [-2, 0, 1, 3, 4, 5]
