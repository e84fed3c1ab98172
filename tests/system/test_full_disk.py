"""Disks and /dev/shm that are full: the job starts or says in a line why not, a running one goes on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Server

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems of its own"),
]
FILL = 'dd if=/dev/zero of="{0}/full" bs=4096 2>/dev/null || true; '
NO_SPACE = "No space left on device"


def mounted(folders: dict[Path | str, str], full: list[Path | str], rest: str = "") -> list[str]:
    """What stands before a command that runs with small file systems there; those in `full` have no room."""
    script = "".join(
        f'mkdir -p "{folder}" && mount -t tmpfs -o size={size} none "{folder}" && ' for folder, size in folders.items()
    )
    script += "true; " + "".join(FILL.format(folder) for folder in full) + f'exec "$@" {rest}'
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"]


def fill(server: Server, folder: Path) -> None:
    """Its last bytes, as the job sees it."""
    with contextlib.suppress(OSError), Path(f"/proc/{server.process.pid}/root{folder}/full").open("ab", 0) as file:
        while True:
            file.write(bytes(4096))


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[tuple[Asked, list[int]]]:
    entries = ask_scenes(tmp_path_factory.mktemp("scenes"), seed=21, count=4)
    llm = LLM()
    answers = llm.chat([entry.messages() for entry in entries], SamplingParams(max_new_tokens=16, ignore_eos=True))
    return [(entry, answer.token_ids) for entry, answer in zip(entries, answers, strict=True)]


def check(server: Server, asked: list[tuple[Asked, list[int]]], rounds: int = 1) -> None:
    for _ in range(rounds):
        for entry, expected in asked:
            status, body = server.chat(entry.content(), max_tokens=16, ignore_eos=True)
            assert (status, body["choices"][0].get("token_ids")) == (200, expected)


def test_cache_spans_temporary_files_and_shared_memory_without_room(tmp_path, asked):
    cache, spans, tmp = tmp_path / "cache", tmp_path / "spans", tmp_path / "tmp"
    prefix = mounted({cache: "16k", spans: "64k", tmp: "32m", "/dev/shm": "16k"}, [cache, "/dev/shm"])
    env = {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(tmp)}
    with Server(2, "--encode-ranks", "1", "--spans", str(spans), prefix=prefix, env=env, ready_s=240) as server:
        check(server, asked)
        fill(server, tmp)
        fill(server, spans)
        check(server, asked, rounds=3)
        log = server.output()
        server.remember_pids()
    print("\n".join(line for line in log.splitlines() if "request" not in line and "busy" not in line))
    assert 1 <= log.count(f"no more spans: {NO_SPACE}") <= 3, "once for each process"
    assert "Traceback" not in log
    assert not server.alive()


def test_a_log_that_takes_nothing(asked, tmp_path):
    with Server(2, "--encode-ranks", "1", prefix=mounted({}, [], "2>/dev/full"), ready_s=240) as server:
        check(server, asked, rounds=2)
        server.remember_pids()
    assert not server.alive()


def test_a_start_whose_folder_for_temporary_files_is_full_takes_another(tmp_path, asked):
    tmp = tmp_path / "tmp"
    prefix = mounted({tmp: "16k"}, [tmp])
    with Server(1, prefix=prefix, env={"TMPDIR": str(tmp)}, ready_s=240) as server:
        check(server, asked)
        server.remember_pids()
    assert not server.alive()
