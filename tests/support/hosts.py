"""Two hosts on one machine: network namespaces, joined by a link that can be cut."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from types import TracebackType
from typing import Self

import pytest


class TwoHosts:
    """`a` and `b` reach each other over one link only; `a` can also be reached from here, over another.

    `address["a"]` and `address["b"]` are on the link, `front` is that of `a` towards here. Skips the test, with the
    reason, where namespaces cannot be made.
    """

    def __init__(self) -> None:
        token = f"{os.getpid() % 10000:04d}{random.randrange(100):02d}"
        self._spaces = {"a": f"q3vl-a-{token}", "b": f"q3vl-b-{token}"}
        self._ends = {"a": f"qa{token}", "b": f"qb{token}"}
        self._outside, self._inside = f"qo{token}", f"qi{token}"
        net = f"198.18.{random.randrange(256)}"  # RFC 2544: for tests between networks
        self.address = {"a": f"{net}.1", "b": f"{net}.2"}
        self.front, self._here = f"{net}.129", f"{net}.130"

    def prefix(self, host: str) -> list[str]:
        """What stands before a command that runs on this host."""
        return ["ip", "netns", "exec", self._spaces[host]]

    def __enter__(self) -> Self:
        if shutil.which("ip") is None:
            pytest.skip("no `ip` command: network namespaces cannot be made")
        try:
            for space in self._spaces.values():
                _ip("netns", "add", space)
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            # Without the right to make one nothing can be tested; what fails later is a failure of the test.
            pytest.skip(f"no right to make network namespaces: {error.stderr.strip()}")
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            raise RuntimeError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        return self

    def _make(self) -> None:
        for space in self._spaces.values():
            _ip("-n", space, "link", "set", "lo", "up")
        self._join()
        _ip("link", "add", self._outside, "type", "veth", "peer", "name", self._inside)
        _ip("link", "set", self._inside, "netns", self._spaces["a"])
        for host, space in self._spaces.items():
            _ip("link", "set", self._ends[host], "netns", space)
            _ip("-n", space, "addr", "add", f"{self.address[host]}/25", "dev", self._ends[host])
            _ip("-n", space, "link", "set", self._ends[host], "up")
        _ip("-n", self._spaces["a"], "addr", "add", f"{self.front}/30", "dev", self._inside)
        _ip("-n", self._spaces["a"], "link", "set", self._inside, "up")
        _ip("addr", "add", f"{self._here}/30", "dev", self._outside)
        _ip("link", "set", self._outside, "up")

    def _join(self) -> None:
        """Make both ends of the link, still here."""
        _ip("link", "add", self._ends["a"], "type", "veth", "peer", "name", self._ends["b"])

    def cut(self, seconds: float) -> None:
        """Take the link away for so long."""
        self.set_link("down")
        time.sleep(seconds)
        self.set_link("up")

    def set_link(self, state: str) -> None:
        """`up` or `down`."""
        _ip("-n", self._spaces["b"], "link", "set", self._ends["b"], state)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A space takes its links with it."""
        for command in [["link", "del", self._ends["a"]], ["link", "del", self._outside]]:
            subprocess.run(["ip", *command], capture_output=True, check=False, timeout=20)
        for space in self._spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False, timeout=20)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], capture_output=True, text=True, check=True, timeout=20)
