"""Decoding children: reused, replaced, bounded, killed when too slow, not believed, gone with their parent."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qwen3vl_disagg.core.errors import InputError, MediaTimeout, ServerError, UnavailableError
from qwen3vl_disagg.media import child as child_module
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.images import decode_rgb
from qwen3vl_disagg.media.sandbox import MAX_MEMORY
from tests.support.media_bytes import clip
from tests.support.media_children import is_there, open_files, runs, with_each_job
from tests.support.media_clips import N, moving
from tests.support.media_hostile import many_scans
from tests.support.media_images import jpeg

REPO = Path(__file__).parent.parent.parent


@pytest.fixture
def decoder() -> Iterator[MediaDecoder]:
    decoder = MediaDecoder(max_children=2)
    yield decoder
    decoder.close()


def image(decoder: MediaDecoder) -> object:
    return decoder.image(jpeg())


def probe(decoder: MediaDecoder) -> object:
    return decoder.probe_video(clip())


def two_frames(decoder: MediaDecoder) -> object:
    return list(decoder.video_frames(clip(), [0, 1]))


def pids(decoder: MediaDecoder) -> set[int]:
    return {child.process.pid for child in decoder._idle}


def test_pixels_are_those_of_this_process(decoder, started):
    data = jpeg()
    for _ in range(3):
        assert np.array_equal(decoder.image(data), np.asarray(decode_rgb(data)))
    assert len(started) == 1
    with pytest.raises(InputError, match="damaged"):
        decoder.image(data[:700])
    decoder.image(data)
    assert len(started) == 1  # a refusal is no failure


def test_children_are_bounded_and_wait_for_one_another(decoder, started):
    data = jpeg()
    expected = np.asarray(decode_rgb(data))
    with ThreadPoolExecutor(6) as pool:
        assert all(np.array_equal(image, expected) for image in pool.map(lambda _: decoder.image(data), range(40)))
    assert 1 <= len(started) <= 2


def test_a_child_that_was_killed_is_replaced_within_the_same_job(decoder, started):
    decoder.image(jpeg())
    started[0].process.kill()
    started[0].process.wait()
    assert decoder.image(jpeg()).shape == (64, 96, 3)
    assert len(started) == 2


def test_frames_come_one_at_a_time_and_may_be_left(decoder, started):
    data = clip(frames=moving())
    frames = decoder.video_frames(data, [0, 4, 29])
    assert started == []
    assert next(frames).shape == (64, 96, 3)
    frames.close()  # in the middle: its child is of no use any more
    assert not is_there(started[0].process.pid)
    assert len(list(decoder.video_frames(data, range(30)))) == 30
    assert list(decoder.video_frames(data, [])) == []
    assert decoder.probe_video(data).num_frames == 30
    assert len(started) == 2


def test_frames_that_are_left_in_the_middle_keep_nobody_waiting(monkeypatch, started):
    with_each_job(monkeypatch, "say(Picture(1, 1)), os.write(1, bytes(3)), time.sleep(60)")
    decoder, before = MediaDecoder(max_children=1), open_files()
    for count in (1, 2):
        began = time.monotonic()
        frames = decoder.video_frames(clip(), [0, 1])
        next(frames)
        frames.close()
        assert time.monotonic() - began < 5
        assert len(started) == count
        assert not is_there(started[-1].process.pid)
        assert open_files() <= before
    decoder.close()


@pytest.mark.parametrize("indices", [[3, 3], [5, 4], [-1]])
def test_indices_must_rise(decoder, indices):
    with pytest.raises(ValueError, match="must rise"):
        decoder.video_frames(clip(), indices)


def test_time_between_two_frames_is_the_callers(started):
    decoder = MediaDecoder(max_children=1, video_patience_s=0.5)
    got = 0
    for _ in decoder.video_frames(clip(size=(800, 600)), range(N)):  # more than a pipe holds
        time.sleep(0.1)
        got += 1
    decoder.close()
    assert got == N


def test_cpu_time_runs_out(decoder, started):
    with pytest.raises(MediaTimeout, match="too long"):
        decoder.image(many_scans())
    assert started[0].process.returncode == -signal.SIGPROF
    assert len(started) == 1  # no second try of what was too slow
    assert decoder.image(jpeg()).shape == (64, 96, 3)


@pytest.mark.parametrize("act", ["time.sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_patience_runs_out_and_the_next_one_has_another_child(monkeypatch, started, act):
    decoder = MediaDecoder(image_patience_s=0.3)
    with monkeypatch.context() as patched:
        with_each_job(patched, act)
        before = time.monotonic()
        with pytest.raises(MediaTimeout, match="too long"):
            decoder.image(jpeg())
        assert time.monotonic() - before < 10
    assert not is_there(started[0].process.pid)
    decoder._image_patience_s = 10.0
    assert decoder.image(jpeg()).shape == (64, 96, 3)
    decoder.close()


@pytest.mark.parametrize("number", ["SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL"])
def test_a_child_that_crashes_on_an_image_is_one_refusal(monkeypatch, decoder, started, number):
    with_each_job(monkeypatch, f"os.kill(os.getpid(), signal.{number})")
    with pytest.raises(InputError, match="the image is damaged and cannot be decoded"):
        decoder.image(jpeg())
    monkeypatch.undo()
    assert decoder.image(jpeg()).shape == (64, 96, 3)


@pytest.mark.parametrize("ask", [image, probe, two_frames])
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_child_that_others_kill_is_not_the_clients_fault(monkeypatch, decoder, started, ask, number):
    """As the kernel does when memory runs out. A new child is tried once."""
    decoder.image(jpeg())
    with_each_job(monkeypatch, f"os.kill(os.getpid(), signal.{number})")
    started[0].process.kill()
    started[0].process.wait()
    with pytest.raises(ServerError) as caught:
        ask(decoder)
    assert (caught.value.status, caught.value.code) == (500, "decoder_killed")
    assert len(started) == 2
    monkeypatch.undo()
    ask(decoder)


@pytest.mark.parametrize(
    ("ask", "act"),
    [
        (image, "os.write(1, b'\\xff' * 100)"),  # a header of 4 GiB
        (image, "os.write(1, (5).to_bytes(4, 'big') + b'\\xc1' * 5)"),  # not msgpack
        (image, "os.write(1, (2).to_bytes(4, 'big') + b'\\x91\\x01')"),  # not a reply
        (image, "say(Picture(2**31, 2**31))"),
        (image, "say(Picture(-1, -1))"),
        (image, "say(Picture(0, 5))"),
        (image, "say(Picture(9000, 9000))"),
        (image, "say(Picture(96, 64)), os.write(1, bytes(96 * 64 * 3))"),  # not the size that the header tells
        (image, "say(Ready())"),
        (image, "say(Done())"),
        (image, "say(VideoInfo('mp4', 5, 5, 5, 5.0))"),
        (image, "say(Picture(64, 96)), os.write(1, bytes(96 * 64 * 3 - 1)), sys.exit(0)"),
        (probe, "say(VideoInfo('mp4', 5, 5, 10**9, 5.0))"),
        (probe, "say(VideoInfo('mp4', 5, -5, 5, 5.0))"),
        (probe, "say(VideoInfo('mp4', 10**5, 10**5, 5, 5.0))"),
        (probe, "say(VideoInfo('mp4', 5, 5, 5, float('nan')))"),
        (probe, "say(VideoInfo('/etc/passwd', 5, 5, 5, 5.0))"),
        (probe, "say(Picture(1, 1)), os.write(1, bytes(3))"),
        (
            two_frames,
            "say(Picture(1, 1)), os.write(1, bytes(3)), say(Picture(2, 1)), os.write(1, bytes(6))",
        ),  # two sizes
        (two_frames, "say(Picture(1, 1)), os.write(1, bytes(3)), say(Done())"),  # too few
        (
            two_frames,
            "say(Picture(1, 1)), os.write(1, bytes(3)), say(Picture(1, 1)), os.write(1, bytes(3)), say(Ready())",
        ),
    ],
)
def test_nonsense_is_not_believed(monkeypatch, decoder, ask, act):
    with_each_job(monkeypatch, act)
    with pytest.raises(InputError, match="cannot be decoded"):
        ask(decoder)


def test_a_refusal_is_cut_to_a_plain_line(monkeypatch, decoder):
    with_each_job(monkeypatch, "say(MediaRefused('a\\x1b[31m\\n' + 'b' * 1000, 200, 'x' * 1000))")
    with pytest.raises(InputError) as caught:
        decoder.image(jpeg())
    assert caught.value.message.startswith("a[31mbbb")
    assert len(caught.value.message) <= 300
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")


@pytest.mark.parametrize("code", ["pass", "import time; time.sleep(60)", "print('hello, ' * 9)"])
def test_a_child_that_does_not_start_is_not_the_clients_fault_and_leaves_nothing(monkeypatch, decoder, started, code):
    runs(monkeypatch, code)
    monkeypatch.setattr(child_module, "_START_S", 0.5)
    before = open_files()
    with pytest.raises(UnavailableError, match="no process for decoding"):
        decoder.image(jpeg())
    (child,) = started
    assert child.process.returncode is not None
    assert not is_there(child.process.pid)
    assert open_files() <= before


def test_a_child_that_is_ready_too_late_for_a_closed_decoder(monkeypatch, started):
    runs(monkeypatch, "import time; time.sleep(0.5)\nfrom qwen3vl_disagg.media.child import main; main()")
    decoder = MediaDecoder()
    timer = threading.Timer(0.2, decoder.close)
    timer.start()
    with pytest.raises(UnavailableError, match="has ended"):
        decoder.image(jpeg())
    timer.join()
    assert not is_there(started[0].process.pid)


def test_closing_ends_jobs_and_children(monkeypatch, started):
    with_each_job(monkeypatch, "time.sleep(60)")
    decoder = MediaDecoder()
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            decoder.image(jpeg())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not decoder._busy:
        time.sleep(0.01)
    decoder.close()
    thread.join(10)
    assert [type(error) for error in errors] == [UnavailableError]
    assert not any(is_there(child.process.pid) for child in started)
    with pytest.raises(UnavailableError):
        decoder.image(jpeg())


def test_a_child_has_limits_and_no_secrets(monkeypatch, decoder):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    ours, theirs = socket.socketpair()
    ours.set_inheritable(True)  # as a server's sockets may be
    with ours, theirs:
        decoder.image(jpeg())
    (pid,) = pids(decoder)
    assert b"hush" not in Path(f"/proc/{pid}/environ").read_bytes()
    targets = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert {target.partition(":")[0] for target in targets} == {"pipe", "/dev/null"}
    limits = {kind: resource.prlimit(pid, kind)[1] for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)}
    assert limits == {resource.RLIMIT_AS: MAX_MEMORY, resource.RLIMIT_FSIZE: 0}
    assert os.getsid(pid) == pid  # a signal to our group does not reach it
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_child_goes_with_its_parent(is_busy):
    code = """
        import os, signal, sys, threading, time
        from qwen3vl_disagg.media.decoding import MediaDecoder
        from tests.support.media_bytes import clip
        from tests.support.media_images import jpeg
        decoder = MediaDecoder()
        decoder.image(jpeg())
        (child,) = decoder._idle
        if sys.argv[1] == "True":
            frames = decoder.video_frames(clip(size=(640, 480), num_frames=30), range(30))
            next(frames)  # and the child waits for us to read more
        print(child.process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(is_busy)]
    out = subprocess.run(command, cwd=REPO, capture_output=True, timeout=60, check=False).stdout
    pid, end = int(out), time.monotonic() + 10
    while is_there(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_there(pid)


def test_a_child_whose_pipes_others_hold_sees_that_its_parent_is_gone():
    code = """
        import os
        from qwen3vl_disagg.media import child
        child._PARENT_CHECK_S = 0.01
        print(child.is_wanted(os.getpid(), read=[0]), end=" ", flush=True)  # nothing to read, and another parent
        print(child.is_wanted(os.getpid(), write=[1]))  # ready, so nobody asks
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read() == b"False True\n"
    process.communicate(timeout=60)


def test_a_child_is_there_before_the_first_job():
    decoder = MediaDecoder()
    try:
        decoder.warm_up()
        deadline = time.monotonic() + 20
        while not decoder._idle:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        [child] = decoder._idle
        decoder.image(jpeg())
        assert decoder._idle == [child]
    finally:
        decoder.close()


def test_warming_up_after_the_end_starts_nothing():
    decoder = MediaDecoder()
    decoder.close()
    decoder._start_child()
    assert not decoder._idle
    assert not decoder._busy
