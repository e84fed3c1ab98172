"""nginx with the shipped configuration before servers on loopback, and what its log says of each request."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.http import request
from tests.support.server import REPO, free_port

CONFIG = REPO / "deploy" / "nginx.conf"
NGINX = Path(shutil.which("nginx") or "/usr/sbin/nginx")
"""Debian has it where not every PATH leads."""
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@dataclass(frozen=True)
class Passed:
    """A line of the log: a request's id, the ports of the jobs that were asked in turn, and what they said."""

    id: str
    status: int
    ports: list[int]
    statuses: list[str]

    @classmethod
    def of(cls, line: str) -> Passed:
        told = json.loads(line)
        ports = [int(address.rpartition(":")[2]) for address in told["jobs"].split(", ") if ":" in address]
        return cls(told["id"], int(told["status"]), ports, told["statuses"].split(", "))


class Gateway:
    """`nginx` before servers at `ports`, as a context manager. Only addresses, paths and the user are not the shipped
    ones."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._config = folder / "nginx.conf"
        self._config.write_text(self._substituted(CONFIG.read_text(), ports))

    def _substituted(self, text: str, ports: Sequence[int]) -> str:
        servers = re.findall(r"^ +server [\d.]+:8000 (.*;)$", text, re.MULTILINE)
        if len(servers) != 2 or len(set(servers)) != 1 or len(ports) != 2:
            raise ValueError(f"{len(servers)} servers in {CONFIG}, {len(ports)} ports")
        for address, port in zip(("10.0.0.11:8000", "10.0.0.12:8000"), ports, strict=True):
            text = text.replace(address, f"127.0.0.1:{port}")
        temporary = "\n".join(f"{name}_temp_path {self.folder}/{name};" for name in _TEMPORARY)
        for old, new in (
            ("user www-data;", f"user {getpass.getuser()};"),
            ("/run/nginx.pid", f"{self.folder}/pid"),
            ("/var/log/nginx", str(self.folder)),
            ("listen 8080;", f"listen 127.0.0.1:{self.port};"),
            ("default_type application/json;", f"default_type application/json;\n{temporary}"),
        ):
            if old not in text:
                raise ValueError(f"{CONFIG} has no {old!r}")
            text = text.replace(old, new)
        return text

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [str(NGINX), "-c", str(self._config), "-g", "daemon off;"],
            stderr=(self.folder / "stderr").open("w"),
        )
        end = time.monotonic() + 10
        while True:
            try:
                request(f"{self.url}/gateway", deadline_s=2)
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    raise
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)

    def passed(self, *, since: int = 0) -> list[Passed]:
        """The requests that are over, from the `since`-th on."""
        lines = (self.folder / "access.log").read_text().splitlines()
        return [Passed.of(line) for line in lines if '"path":"/gateway"' not in line][since:]
