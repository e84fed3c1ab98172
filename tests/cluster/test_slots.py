"""Slots and how they find each other: real processes, trivial bodies, a deadline on every wait."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3vl_disagg.cluster import rendezvous, slots
from qwen3vl_disagg.cluster.rendezvous import Layout, Meeting, World, find, meeting_path, publish
from qwen3vl_disagg.cluster.slots import Child, Slot, leave_process, run_loop
from qwen3vl_disagg.core.errors import InputError, UnavailableError
from tests.support.slot_scenarios import run_scenario


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    return rendezvous.parent_of(pid) is not None


fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload(["qwen3vl_disagg.cluster.slots"])  # torch too: imported once, not for each job


class Job:
    """One scenario."""

    def __init__(self, folder: Path, scenario: str, *, has_agent: bool = False) -> None:
        self.log, self.errors = folder / "log", folder / "errors"
        self.log.touch()
        self.process = fork_server.Process(target=run_scenario, args=(scenario, self.log, self.errors, has_agent))
        self.process.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of the job may be left."""
        self.process.kill()
        self.process.join(10)
        for pid in {int(line.split()[1]) for line in self.log.read_text().splitlines()}:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)

    def wait(self, seconds: float) -> int | None:
        """The slot's exit status; None if it still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def pids(self, name: str, event: str = "up") -> list[int]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [int(pid) for n, pid, e in lines if (n, e) == (name, event)]

    def wait_for(self, name: str, count: int = 1) -> int:
        """The pid of the `count`th incarnation."""
        until(lambda: len(self.pids(name)) >= count)
        return self.pids(name)[count - 1]

    def signal_group(self, number: int) -> None:
        """As torchrun does: slot and children at once."""
        os.killpg(self.wait_for("slot"), number)

    def said(self) -> str:
        return self.errors.read_text()


def test_a_killed_encode_rank_is_forked_again_at_once(tmp_path):
    with Job(tmp_path, "encode") as job:
        for count in (1, 2):
            pid = job.wait_for("encode", count)
            started = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            assert job.wait_for("encode", count + 1) != pid
            assert time.monotonic() - started < 2.0
        assert job.wait(0) is None


def test_what_keeps_dying_is_given_time(tmp_path):
    with Job(tmp_path, "crashing") as job:
        job.wait_for("encode", 5)  # 0, 0, 0.25, 0.5 s between them
        time.sleep(0.5)
        assert len(job.pids("encode")) <= 6
        assert "exit 5" in job.said()


def test_who_was_of_use_is_not_one_that_keeps_dying(tmp_path):
    with Job(tmp_path, "useful") as job:
        job.wait_for("encode", 8)
        pauses = [line.partition("starting it again")[2] for line in job.said().splitlines() if "again" in line]
        assert pauses[:7] == [""] * 6 + [" in 0.25 s"]  # four of use, two of none, and the third


def test_one_that_lived_is_started_again_whatever_it_says(tmp_path):
    with Job(tmp_path, "vanished") as job:
        last = job.wait_for("encode", 4)
        assert job.said().count("error: no checkpoint here") == 2
        time.sleep(0.3)
        assert is_running(last)


def test_one_that_does_not_get_on_is_started_again(tmp_path):
    with Job(tmp_path, "stuck") as job:
        first, second = (job.wait_for("frontend", number) for number in (1, 2))
        assert "does not get on" in job.said()
        assert not is_running(first)
        assert is_running(second)
        time.sleep(slots._IDLE_TICK_S + 1.0)
        assert is_running(second)  # it beats


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_language_rank_ends_the_job(tmp_path, number):
    with Job(tmp_path, "language") as job:
        os.kill(job.wait_for("language"), number)
        assert job.wait(5) == 1
        assert f"killed by {number.name}" in job.said()
        assert len(job.pids("language")) == 1


def test_a_dead_language_rank_takes_its_slot_s_frontend_along(tmp_path):
    with Job(tmp_path, "both") as job:
        frontend = job.wait_for("frontend")
        os.kill(job.wait_for("language"), signal.SIGKILL)
        assert job.wait(8) == 1
        assert job.pids("frontend", "left") == [frontend]  # it was asked, not killed


@pytest.mark.parametrize(
    ("scenario", "status", "words", "num_lost"),
    [("refused", 78, "dtype", 1), ("input", 2, "no such thing", 1), ("gone", 69, "no hub", 0), ("dismissed", 0, "", 0)],
)
def test_a_rank_that_cannot_fit_is_not_tried_again(tmp_path, scenario, status, words, num_lost):
    with Job(tmp_path, scenario) as job:
        assert job.wait(20) == status
        assert len(job.pids("encode")) == 1
        assert words in job.said()
        assert "Traceback" not in job.said()
        assert len(job.pids("slot", "lost")) == num_lost, "told where there is a hub to be told"


def test_a_rank_without_its_gpu_says_so_in_a_line_and_is_forked_again(tmp_path):
    with Job(tmp_path, "lost") as job:
        assert job.wait(20) == 0
        assert len(job.pids("encode")) == 2
        lines = [line for line in job.said().splitlines() if "encode" in line]
        assert len(lines) == 2, lines
        assert "the GPU is lost to this process: CUDA error" in lines[0]
        assert "exit 1; starting it again" in lines[1]
        assert "Traceback" not in job.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_lets_the_frontend_drain_before_the_ranks_leave(tmp_path, number):
    with Job(tmp_path, "first") as job:
        job.wait_for("frontend"), job.wait_for("encode")
        job.signal_group(number)
        assert job.wait(10) == 0
        events = [line.split()[0] for line in job.log.read_text().splitlines() if line.endswith("left")]
        assert events == ["frontend", "encode"]


def test_a_signal_to_the_slot_alone_is_enough(tmp_path):
    with Job(tmp_path, "first") as job:
        job.wait_for("frontend"), job.wait_for("encode")
        os.kill(job.wait_for("slot"), signal.SIGTERM)
        assert job.wait(10) == 0


@pytest.mark.parametrize(("scenario", "num_told"), [("told", 1), ("both", 0)])
def test_a_slot_says_when_its_frontend_left_without_a_signal(tmp_path, scenario, num_told):
    with Job(tmp_path, scenario) as job:
        job.wait_for("language")
        if not num_told:
            job.wait_for("frontend")
            job.signal_group(signal.SIGTERM)
        assert job.wait(10) == 0
        assert len(job.pids("slot", "told")) == num_told


def test_a_frontend_that_left_without_a_signal_is_followed_by_its_rank(tmp_path):
    with Job(tmp_path, "alone") as job:
        pid = job.wait_for("encode")
        assert job.wait(5) == 1  # the rank did not leave in time
        assert not is_running(pid)
        assert len(job.pids("frontend", "left")) == 1


def test_a_slot_says_when_it_begins_to_end(tmp_path):
    with Job(tmp_path, "far") as job:
        pid = job.wait_for("language")
        job.signal_group(signal.SIGTERM)
        assert job.wait(5) == 0
        assert job.pids("language", "left") == [pid]  # because it was told so, by way of `on_stop`


def test_a_dead_frontend_is_forked_again(tmp_path):
    with Job(tmp_path, "first") as job:
        encode = job.wait_for("encode")
        os.kill(job.wait_for("frontend"), signal.SIGKILL)
        job.wait_for("frontend", 2)
        job.signal_group(signal.SIGTERM)
        assert job.wait(10) == 0
        assert job.pids("encode") == [encode]


def test_a_rank_that_does_not_leave_is_killed(tmp_path):
    with Job(tmp_path, "stubborn") as job:
        pid = job.wait_for("language")
        job.signal_group(signal.SIGTERM)
        time.sleep(0.2)
        assert is_running(pid)  # the signal itself does nothing to a rank
        assert job.wait(5) == 1
        assert not is_running(pid)


def test_without_a_hub_a_rank_is_not_waited_for_to_the_end(tmp_path):
    with Job(tmp_path, "orphan") as job:
        job.wait_for("language")
        job.signal_group(signal.SIGTERM)
        time.sleep(1.0)
        assert job.wait(0) is None
        Path(f"{job.log}.gone").touch()
        assert job.wait(5) == 1


@pytest.mark.parametrize("victim", ["slot", "agent"])
def test_no_child_outlives_its_slot_and_no_slot_its_agent(tmp_path, victim):
    with Job(tmp_path, "encode", has_agent=True) as job:
        pids = {job.wait_for("encode"), job.wait_for("slot")}
        os.kill(job.wait_for(victim), signal.SIGKILL)
        until(lambda: not any(map(is_running, pids)), 5.0)


# ---- the end of a process ----


def left(body: Callable[[], object], deadline_s: float = 5.0) -> tuple[int, str, float]:
    """Exit status, stdout, and how long it took, of a process that runs `body` and then should not come back."""
    out, inner = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        atexit._clear()  # the tests' own
        os.dup2(inner, 1)
        sys.stdout = os.fdopen(os.dup(1), "w")  # with a buffer of its own
        try:
            body()
        finally:
            os._exit(99)
    os.close(inner)
    with os.fdopen(out) as reader:
        said = reader.read()
    assert time.monotonic() - started < deadline_s
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said, time.monotonic() - started


def test_a_process_leaves_with_what_it_printed_and_what_it_had_to_tidy_up(tmp_path):
    file = tmp_path / "tidied"

    def body() -> None:
        atexit.register(file.touch)
        threading.Thread(target=time.sleep, args=(60,)).start()  # Python would wait for it
        print("bye")
        leave_process(3)

    assert left(body)[:2] == (3, "bye\n")
    assert file.exists()


def test_a_process_leaves_whatever_its_end_meets():
    def fail() -> None:
        raise RuntimeError("no")

    def body() -> None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        atexit.register(fail)
        sys.stdout = os.fdopen(os.dup(1), "w")
        print("nobody reads this")
        os.close(sys.stdout.fileno())  # as a pipe whose reader has gone: it cannot be flushed
        leave_process(4)

    assert left(body)[0] == 4


def test_a_child_whose_output_nobody_reads_does_not_become_a_second_slot():
    def body() -> None:
        def child() -> int:
            print("nobody reads this")
            os.close(sys.stdout.fileno())
            return 5

        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        os._exit(Slot([Child("encode", child, is_vital=True)]).run())

    assert left(body)[0] == 5


def test_nothing_that_a_child_started_is_left():
    def body() -> None:
        def child() -> int:
            command = [sys.executable, "-c", "import time; time.sleep(60)"]
            made = []
            thread = threading.Thread(target=lambda: made.append(subprocess.Popen(command, start_new_session=True)))
            thread.start()
            thread.join()
            print(made[0].pid)
            return 0

        os._exit(Slot([Child("encode", child, is_vital=True)]).run())

    status, said, _ = left(body)
    assert status == 0
    until(lambda: not is_running(int(said)), 5.0)


def test_a_loop_that_has_ended_waits_for_no_thread():
    async def main() -> int:
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
        task = asyncio.ensure_future(asyncio.sleep(60))
        await asyncio.sleep(0)
        assert not task.done()
        return 7

    def body() -> None:
        leave_process(run_loop(main()))

    assert left(body)[:2] == (7, "")


# ---- who is who ----


@pytest.mark.parametrize(
    ("world", "num", "encode", "language"),
    [
        (8, None, [0, 1], [2, 3, 4, 5, 6, 7]),
        (4, None, [0], [1, 2, 3]),
        (2, None, [0], [1]),
        (1, None, [0], [0]),
        (4, 3, [0, 1, 2], [3]),
    ],
)
def test_roles(world, num, encode, language):
    layout = Layout.of(world, num)
    assert (list(layout.encode_ranks), list(layout.language_ranks)) == (encode, language)


@pytest.mark.parametrize(("world", "num"), [(4, 0), (4, 4), (4, -1), (1, 0), (1, 2), (2, 2)])
def test_a_split_without_one_of_the_roles_is_refused(world, num):
    with pytest.raises(InputError) as caught:
        Layout.of(world, num)
    assert str(num) in caught.value.message


def test_world_of_torchrun_and_of_none():
    env = {"TORCHELASTIC_RUN_ID": "a", "RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
    env |= {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}
    world, alone = World.from_env(env), World.from_env({"RANK": "3", "WORLD_SIZE": "8"})
    assert min(world.free_bytes, alone.free_bytes) > 0
    expected = World(6, 8, local_rank=2, num_local_ranks=4, node=1, num_nodes=2, has_agent=True)
    assert replace(world, free_bytes=0) == expected
    assert replace(alone, free_bytes=0) == World(0, 1)


# ---- rendezvous ----


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(rendezvous.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


ENV = {"TORCHELASTIC_RUN_ID": "../run", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0"}


def meeting(pid: int) -> Meeting:
    return Meeting(hub_address=("127.0.0.1", 1), token="secret", pid=pid)


def test_the_file_is_the_user_s_own_and_its_name_is_the_job_s(place):
    path = meeting_path(ENV)
    assert path.parent.parent == place
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert len({meeting_path({**ENV, key: "9"}) for key in ENV} | {path}) == 4
    publish(path, meeting(os.getpid()))
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_slot_waits_for_the_file_and_reads_it(place):
    path = meeting_path(ENV)
    timer = threading.Timer(0.3, publish, (path, meeting(os.getpid())))
    timer.start()
    assert find(path, Meeting, 10.0) == meeting(os.getpid())
    timer.join()


def test_a_file_of_a_dead_slot_or_another_agent_s_is_not_believed(place):
    path = meeting_path(ENV)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        publish(path, meeting(child.pid))  # lives, but its parent is not ours
        with pytest.raises(UnavailableError):
            find(path, Meeting, 0.2)
    finally:
        child.kill()
        child.wait()
    publish(path, meeting(child.pid))
    with pytest.raises(UnavailableError):
        find(path, Meeting, 0.2)
    path.write_bytes(b"not json")
    with pytest.raises(UnavailableError):
        find(path, Meeting, 0.2)


def test_a_directory_that_others_can_use_a_file_and_a_link_are_refused(place):
    folder = place / f"qwen3vl-disagg-{os.getuid()}"
    folder.mkdir(mode=0o755)
    with pytest.raises(InputError, match="only its owner"):
        meeting_path(ENV)
    folder.rmdir()
    (place / "elsewhere").mkdir(mode=0o700)
    folder.touch(mode=0o600)
    with pytest.raises(InputError, match="only its owner"):
        meeting_path(ENV)
    folder.unlink()
    folder.symlink_to(place / "elsewhere")
    with pytest.raises(InputError, match="only its owner"):
        meeting_path(ENV)


def test_without_a_folder_for_temporary_files_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(rendezvous.tempfile, "gettempdir", lambda: str(tmp_path / "not there"))
    with pytest.raises(InputError, match=r"TMPDIR.*No such file"):
        meeting_path({})

    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(rendezvous.tempfile, "gettempdir", none)
    with pytest.raises(InputError, match="No usable temporary directory"):
        meeting_path({})


def test_a_meeting_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*No such file"):
        publish(tmp_path / "gone" / "meeting.json", Meeting(hub_address=("127.0.0.1", 1), token="t", pid=1))
