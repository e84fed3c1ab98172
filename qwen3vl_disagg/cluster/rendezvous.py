"""Who is who in a job, and how slots find slot 0: on its host, by a file that only this user can read. Linux only.

Slot 0 writes the address of its hub and a random token; the others poll for it. The file's name is made of what all
workers of one torchrun agent share and no other job does: the agent's pid, the run id, the master port, the restart
count. Slots on other hosts are told address and token by their command lines. Nothing of ours goes into torchrun's own
store, which listens on all interfaces without authentication.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from qwen3vl_disagg.cluster.job_memory import Use
from qwen3vl_disagg.core.errors import InputError, UnavailableError
from qwen3vl_disagg.core.host import available_bytes, process_started
from qwen3vl_disagg.core.progress import SILENT, Progress
from qwen3vl_disagg.options import ServeOptions
from qwen3vl_disagg.transport.tls import Tls

_POLL_S = 0.05


@dataclass(frozen=True)
class World:
    """The workers of the job, as torchrun's environment says; without torchrun, one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    num_local_ranks: int = 1
    """Workers on this host, which share its cores and its GPUs."""
    node: int = 0
    num_nodes: int = 1
    free_bytes: int = 0
    """Of this host's memory, before any rank has loaded anything; 0: not known."""
    has_agent: bool = False
    """Whether the parent process is torchrun's agent."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> World:
        if "TORCHELASTIC_RUN_ID" not in env:
            return cls(free_bytes=available_bytes())
        return cls(
            rank=int(env["RANK"]),
            size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            num_local_ranks=int(env["LOCAL_WORLD_SIZE"]),
            node=int(env["GROUP_RANK"]),
            num_nodes=int(env["GROUP_WORLD_SIZE"]),
            free_bytes=available_bytes(),
            has_agent=True,
        )

    def progress(self, *, is_heard: bool = True) -> Progress:
        """Of a start, counted from when the command was given."""
        return Progress(process_started(os.getppid() if self.has_agent else os.getpid()), is_heard)


@dataclass(frozen=True)
class Layout:
    """Which ranks do what: 0 .. E-1 encode, the others generate; a world of one does both."""

    world_size: int
    num_encode_ranks: int

    @classmethod
    def of(cls, world_size: int, num_encode_ranks: int | None = None) -> Layout:
        """Default: a quarter encodes, at least one. InputError for a split without one of the roles."""
        num = max(1, world_size // 4) if num_encode_ranks is None else num_encode_ranks
        most = max(1, world_size - 1)
        if not 1 <= num <= most:
            raise InputError(
                f"{num} encode ranks of {world_size} ranks: must be 1 to {most}, so that both roles have a rank",
                param="encode-ranks",
            )
        return cls(world_size, num)

    @property
    def encode_ranks(self) -> range:
        return range(self.num_encode_ranks)

    @property
    def language_ranks(self) -> range:
        return range(0 if self.world_size == 1 else self.num_encode_ranks, self.world_size)


@dataclass(frozen=True)
class RankContext:
    """All that a rank's body is told. `host` is the address its own listeners bind to.

    `is_joining`: an encode rank from outside of the world, which gets its number from the hub; `rank` and `layout` say
    nothing then, nor do most of the options.
    """

    rank: int
    layout: Layout
    hub_address: tuple[str, int]
    token: str
    options: ServeOptions
    world: World
    host: str = "127.0.0.1"
    is_joining: bool = False
    cores_file: Path | None = None
    """Where this host's ranks say who computes; None: each keeps to its share of the cores."""
    progress: Progress = SILENT
    use: Use = field(default_factory=Use)
    """Of an encode rank: marked when it has sent rows."""
    tls: Tls | None = None
    """For control connections, both ways."""

    @property
    def is_first_language_rank(self) -> bool:
        """This one hosts the store in which ranks that share experts meet."""
        return self.rank == self.layout.language_ranks[0]

    @property
    def is_first_language_rank_of_host(self) -> bool:
        """This one speaks of what may be different on another host, as its memory."""
        first_of_host = self.rank - self.world.local_rank
        return self.rank == max(first_of_host, self.layout.language_ranks[0])


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker of a host tells the others by a file; `pid` is its own."""

    pid: int


class Meeting(Published, frozen=True, kw_only=True):
    """What slot 0 tells."""

    hub_address: tuple[str, int]
    token: str


Notice = TypeVar("Notice", bound=Published)


def private_folder() -> Path:
    """The user's own directory for what processes of a host tell one another; made if it is not there. InputError if
    others could have made it, or nobody can."""
    try:
        folder = Path(tempfile.gettempdir()) / f"qwen3vl-disagg-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        info = folder.lstat()
    except OSError as error:
        raise InputError(f"no folder for temporary files (TMPDIR): {error.strerror or error}") from None
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise InputError(f"{folder} must be a directory that only its owner, uid {os.getuid()}, can use")
    return folder


def meeting_path(env: Mapping[str, str] = os.environ) -> Path:
    """The same for all slots of a job. InputError as of `private_folder`."""
    folder = private_folder()
    if "TORCHELASTIC_RUN_ID" not in env:
        return folder / f"alone-{os.getpid()}.json"
    parts = [env.get(f"{name}", "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    return folder / (re.sub(r"[^A-Za-z0-9-]", "_", "-".join([str(os.getppid()), *parts])) + ".json")


def publish(path: Path, notice: Published) -> None:
    """Put the file there at once, whole. InputError where there is no room for it."""
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(notice))
        os.replace(draft, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def find(path: Path, kind: type[Notice], deadline_s: float = math.inf) -> Notice:
    """Wait for what a worker of the same agent has published and still lives. UnavailableError after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while True:
        notice = _read(path, kind)
        if notice is not None and parent_of(notice.pid) == os.getppid():
            return notice
        if time.monotonic() >= end:
            raise UnavailableError(f"slot 0 did not show up within {deadline_s:g} s")
        time.sleep(_POLL_S)


def _read(path: Path, kind: type[Notice]) -> Notice | None:
    """None if there is nothing, or a file that is not this user's."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        if os.fstat(fd).st_uid != os.getuid():
            return None
        try:
            return msgspec.json.decode(file.read(), type=kind)
        except msgspec.DecodeError:
            return None


def host_id() -> str:
    """Where a process id means something: this boot of this kernel, and the namespace of its process ids."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def parent_of(pid: int) -> int | None:
    """The parent of a living process; None if it is gone or only waits to be reaped."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)
