"""The kernels' library: what is loaded, what is kept, and that every failure leaves something that runs."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import pwd
import subprocess
import time
from pathlib import Path

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.kernels import build
from qwen3vl_disagg.kernels.library_cache import LibraryCache, cache_folder, open_library

pytestmark = pytest.mark.skipif(build.load() is None, reason="no AVX-512 BF16 or no C++ compiler")

OWN = Path(pwd.getpwuid(os.getuid()).pw_dir)
ANSWER = 'extern "C" void q3_answer(long *out) { *out = 42; }\n'
PLANTED = """
#include <stdio.h>
__attribute__((constructor)) static void run() { fclose(fopen("%s", "w")); }
extern "C" void q3_answer(long *out) { *out = 666; }
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A small library in place of the kernels, and a cache of its own, which is not made yet."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.cpp").write_text(ANSWER)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "SIGNATURES", {"q3_answer": [ctypes.c_void_p]})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "g++")
    return cache_folder()


def load() -> int | None:
    """What a start gets: the library's answer, or None."""
    library = build.load.__wrapped__()
    if library is None:
        return None
    out = ctypes.c_long()
    library.q3_answer(ctypes.addressof(out))
    return out.value


def kept(place: Path) -> Path:
    [path] = place.glob("*.so")
    return path


def no_compiler(monkeypatch) -> None:
    """From now on nothing can be built, while the library keeps its name."""
    monkeypatch.setattr(build, "compile_kernels", lambda compiler: pytest.fail("it was built again"))


def plant(path: Path, mark: Path) -> bytes:
    """A library that makes `mark` when it is loaded."""
    source = mark.with_suffix(".cpp")
    source.write_text(PLANTED % mark)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path.read_bytes()


def test_it_is_made_once_and_again_for_other_sources(place, monkeypatch, caplog):
    assert load() == 42
    first = kept(place)
    assert place.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}
    assert (place / f"{first.name}.sha256").read_text() == hashlib.sha256(first.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        no_compiler(patch)
        assert load() == 42
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert load() == 42
    assert len(list(place.glob("*.so"))) == 2
    assert caplog.messages == []


def cut(path: Path, mark: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, mark: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path, mark: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def exchange(path: Path, mark: Path) -> None:
    plant(path, mark)


def lose_digest(path: Path, mark: Path) -> None:
    plant(path, mark)
    path.with_name(f"{path.name}.sha256").unlink()


def write_for_others(path: Path, mark: Path) -> None:
    content = plant(path, mark)
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(content).hexdigest())
    path.chmod(0o666)


def link(path: Path, mark: Path) -> None:
    content = plant(mark.with_suffix(".so"), mark)
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(content).hexdigest())
    path.unlink()
    path.symlink_to(mark.with_suffix(".so"))


def pipe(path: Path, mark: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def other_symbols(path: Path, mark: Path) -> None:
    """Whole and the user's own, but not what it should be."""
    source = mark.with_suffix(".cpp")
    source.write_text("int nothing() { return 1; }")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def no_library(path: Path, mark: Path) -> None:
    path.write_bytes(b"\x7fELF and nothing more")
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


DAMAGES = [cut, empty, noise, exchange, lose_digest, write_for_others, link, pipe, other_symbols, no_library]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_planted_is_made_again_and_never_run(place, tmp_path, caplog, damage, monkeypatch):
    assert load() == 42
    mark = tmp_path / "it-ran"
    damage(kept(place), mark)
    assert load() == 42
    assert not mark.exists()
    no_compiler(monkeypatch)
    assert load() == 42  # what was made is kept
    assert caplog.messages == []


def test_a_library_that_is_cut_while_it_is_loaded_goes_on(place):
    assert load() == 42
    library = build.load.__wrapped__()
    os.truncate(kept(place), 0)
    out = ctypes.c_long()
    library.q3_answer(ctypes.addressof(out))
    assert out.value == 42


def world_writable(place: Path) -> None:
    place.chmod(0o777)


def group_writable(place: Path) -> None:
    place.chmod(0o770)


def foreign(place: Path) -> None:
    os.chown(place, 1234, -1)


def linked(place: Path) -> None:
    place.rename(place.with_name("elsewhere"))
    place.symlink_to(place.with_name("elsewhere"))


def a_file(place: Path) -> None:
    place.rename(place.with_name("elsewhere"))
    place.write_text("")


@pytest.mark.parametrize("change", [world_writable, group_writable, foreign, linked, a_file])
def test_a_folder_that_is_not_the_user_s_own_is_not_used(place, tmp_path, caplog, change):
    if change is foreign and os.geteuid() != 0:  # chown is refused to all others
        pytest.skip("only root can give a folder away")
    assert load() == 42
    mark, path = tmp_path / "it-ran", kept(place)
    content = plant(path, mark)
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(content).hexdigest())
    change(place)
    before = sorted(os.listdir(place)) if place.is_dir() else None
    assert load() == 42
    assert not mark.exists()
    assert before is None or sorted(os.listdir(place)) == before
    [line] = caplog.messages
    assert "no cache" in line


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"XDG_CACHE_HOME": None, "HOME": "/home/a"}, Path("/home/a/.cache/qwen3vl-disagg/kernels")),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/a"}, Path("/home/a/.cache/qwen3vl-disagg/kernels")),
        ({"XDG_CACHE_HOME": "here", "HOME": "/home/a"}, Path("/home/a/.cache/qwen3vl-disagg/kernels")),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/home/a"}, Path("/c/qwen3vl-disagg/kernels")),
        ({"XDG_CACHE_HOME": None, "HOME": None}, OWN / ".cache/qwen3vl-disagg/kernels"),
        ({"XDG_CACHE_HOME": None, "HOME": ""}, OWN / ".cache/qwen3vl-disagg/kernels"),
        ({"XDG_CACHE_HOME": None, "HOME": "here"}, None),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, folder):
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    if folder is not None:
        assert cache_folder() == folder
        return
    with pytest.raises(FileNotFoundError):
        cache_folder()


def test_without_a_home_the_library_is_made_for_this_process(place, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("qwen3vl_disagg.kernels.library_cache.os.getuid", lambda: 54321)
    assert load() == 42
    [line] = caplog.messages
    assert "no home directory" in line


@pytest.mark.parametrize("when", ["open", "write"])
def test_a_cache_that_cannot_be_written_is_told_in_one_line(place, monkeypatch, caplog, when):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if when == "open":
        monkeypatch.setattr(Path, "mkdir", full)
    else:
        monkeypatch.setattr(LibraryCache, "write", full)
    assert load() == 42
    [line] = caplog.messages
    assert "No space left" in line


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with LibraryCache.open(tmp_path / "cache") as cache:
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            cache.write("a.so", b"a")
        assert list((tmp_path / "cache").iterdir()) == []
        assert cache.read("a.so") is None


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("/nonexistent", "No such file"),
        ("false", "returned non-zero"),
        ("g++ --no-such-option", "no-such-option"),
        ('g++ "', "quotation"),
        ("true", "No such file"),  # it says nothing, and makes nothing
    ],
)
def test_a_compiler_that_fails_is_one_line(place, monkeypatch, caplog, compiler, words):
    monkeypatch.setenv("CXX", compiler)
    assert load() is None
    [line] = caplog.messages
    assert line.startswith("kernels not built, running without them: ")
    assert words in line.replace("No closing", "No closing ")


def test_a_compiler_may_have_arguments(place, tmp_path, monkeypatch):
    wrapper = tmp_path / "a wrapper"
    wrapper.write_text(f'#!/bin/sh\necho run >> "{tmp_path}/runs"\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{wrapper}' g++")
    assert load() == 42
    assert (tmp_path / "runs").read_text().count("run") == 2  # one source, one library
    monkeypatch.setenv("CXX", "  ")
    assert build.compiler_command()[0].endswith(("g++", "clang++"))


def test_processes_that_start_together_make_one(place, tmp_path, monkeypatch):
    wrapper = tmp_path / "slow"
    wrapper.write_text(f'#!/bin/sh\necho run >> "{tmp_path}/runs"\nsleep 0.3\nexec g++ "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if load() == 42 else 1)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert (tmp_path / "runs").read_text().count("run") == 2
    assert [path.name for path in place.glob("*.so.*")] == [f"{kept(place).name}.sha256"]


def test_a_lock_that_is_never_given_back_is_not_waited_for_to_the_end(place, monkeypatch):
    monkeypatch.setattr("qwen3vl_disagg.kernels.library_cache._LOCK_S", 0.3)
    with LibraryCache.open(place) as other, other.alone():
        started = time.monotonic()
        assert load() == 42
        assert time.monotonic() - started > 0.3


def test_what_is_no_library_is_an_os_error():
    with pytest.raises(OSError, match=r"file too short|invalid ELF"):
        open_library(b"not a library")


def test_one_descriptor_stays_open_for_each_library_that_is_loaded(place):
    gc.collect()  # what other tests have left is closed now, not in between
    before = len(os.listdir("/proc/self/fd"))
    assert load() == 42
    assert len(os.listdir("/proc/self/fd")) == before + 1
    no_library(kept(place), place)
    assert load() == 42
    assert len(os.listdir("/proc/self/fd")) == before + 2


@pytest.mark.parametrize("value", ["on", "off", ""])
def test_the_switch(place, monkeypatch, value):
    monkeypatch.setenv("Q3VL_KERNELS", value)
    assert load() == (None if value == "off" else 42)


@pytest.mark.parametrize("value", ["Off", "0", "no", "off "])
def test_a_switch_that_means_nothing_is_refused(place, monkeypatch, value):
    monkeypatch.setenv("Q3VL_KERNELS", value)
    with pytest.raises(InputError, match=r"Q3VL_KERNELS=.*must be on or off"):
        load()
