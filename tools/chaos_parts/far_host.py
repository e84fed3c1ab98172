"""Another host on this machine: a network namespace behind a link that can be taken away."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from typing import Self


class FarHost:
    """`near` is the address of this side, `far` of the other. Where namespaces cannot be made both are loopback, and
    `reason` says why."""

    def __init__(self) -> None:
        token = f"{os.getpid() % 10000:04d}{random.randrange(100):02d}"
        self._space, self._near_end, self._far_end = f"q3vl-chaos-{token}", f"qcn{token}", f"qcf{token}"
        self._net = f"198.19.{random.randrange(256)}"  # RFC 2544: for tests between networks
        self.near = self.far = "127.0.0.1"
        self.reason = ""

    def __enter__(self) -> Self:
        if shutil.which("ip") is None:
            self.reason = "no `ip` command: there are no network namespaces"
            return self
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.reason = f"no network namespace: {error.stderr.strip()}"
            self._remove()
        except BaseException:
            self._remove()
            raise
        else:
            self.near, self.far = f"{self._net}.1", f"{self._net}.2"
        return self

    def _make(self) -> None:
        _ip("netns", "add", self._space)
        _ip("-n", self._space, "link", "set", "lo", "up")
        _ip("link", "add", self._near_end, "type", "veth", "peer", "name", self._far_end)
        _ip("link", "set", self._far_end, "netns", self._space)
        _ip("addr", "add", f"{self._net}.1/30", "dev", self._near_end)
        _ip("link", "set", self._near_end, "up")
        _ip("-n", self._space, "addr", "add", f"{self._net}.2/30", "dev", self._far_end)
        _ip("-n", self._space, "link", "set", self._far_end, "up")

    @property
    def prefix(self) -> list[str]:
        """What stands before a command that runs there."""
        return [] if self.reason else ["ip", "netns", "exec", self._space]

    def cut(self) -> None:
        _ip("-n", self._space, "link", "set", self._far_end, "down")

    def heal(self) -> None:
        _ip("-n", self._space, "link", "set", self._far_end, "up")

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for command in (["link", "del", self._near_end], ["netns", "del", self._space]):
            subprocess.run(["ip", *command], capture_output=True, check=False, timeout=20)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], capture_output=True, text=True, check=True, timeout=20)
