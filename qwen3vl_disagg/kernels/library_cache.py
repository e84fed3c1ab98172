"""Libraries kept between starts, in a folder that nobody else could have written to.

What is loaded from here runs as whoever starts the program. So the folder and each file must be the user's own and
writable by nobody else, links are not followed, and a digest beside each library says that it is whole. A library is
read into memory and loaded from there: a file that is cut while it is mapped would kill the process (SIGBUS).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import pwd
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_LOCK = "lock"
_LOCK_S = 120.0
"""Longest wait for another process that builds; then this one builds, too."""
_POLL_S = 0.1


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME` or `~/.cache`, then `qwen3vl-disagg/kernels`. OSError where there is no such place."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # the XDG specification: a relative one is to be ignored
        return given / "qwen3vl-disagg" / "kernels"
    try:
        home = Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError as error:
        raise FileNotFoundError("no home directory") from error
    if not home.is_absolute():
        raise FileNotFoundError(f"no home directory: HOME is {str(home)!r}, no absolute path")
    return home / ".cache" / "qwen3vl-disagg" / "kernels"


class LibraryCache:
    """An open folder. Everything goes by its descriptor: who exchanges the path later changes nothing here."""

    def __init__(self, folder_fd: int) -> None:
        self._fd = folder_fd

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[LibraryCache]:
        """Made if it is not there. OSError if it cannot be, or if others could write to it."""
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not _is_own(os.fstat(fd)):
                raise PermissionError(f"{folder} belongs to others, or they may write to it")
            yield cls(fd)
        finally:
            os.close(fd)

    def read(self, name: str) -> bytes | None:
        """The library, if it is there and whole."""
        library, digest = self._read_own(name), self._read_own(f"{name}.sha256")
        is_whole = library is not None and digest == hashlib.sha256(library).hexdigest().encode()
        return library if is_whole else None

    def write(self, name: str, library: bytes) -> None:
        """Put it there, whole, in place of what was there. OSError if that does not work."""
        self._write(name, library)
        self._write(f"{name}.sha256", hashlib.sha256(library).hexdigest().encode())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Of several processes one goes on; the others wait, though not for ever. The lock ends with its holder."""
        fd = os.open(_LOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        try:
            end = time.monotonic() + _LOCK_S
            while time.monotonic() < end:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(fd)

    def _read_own(self, name: str) -> bytes | None:
        try:  # O_NONBLOCK: a pipe in its place must not hold us up
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
            with os.fdopen(fd, "rb") as file:
                info = os.fstat(fd)
                return file.read() if stat.S_ISREG(info.st_mode) and _is_own(info) else None
        except OSError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        draft = f"{name}.{os.getpid()}"
        fd = os.open(
            draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd
        )
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
            os.replace(draft, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(draft, dir_fd=self._fd)
            raise


def open_library(content: bytes) -> ctypes.CDLL:
    """Load a library from memory. OSError if the system does not take it for one.

    The descriptor stays open as long as the library is loaded: the loader knows libraries by their paths, so its number
    must not come again.
    """
    fd = os.memfd_create("q3vl-kernels")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        return ctypes.CDLL(f"/proc/self/fd/{fd}")
    except BaseException:
        os.close(fd)
        raise


def _is_own(info: os.stat_result) -> bool:
    return info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
