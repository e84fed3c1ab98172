"""A hub on loopback for the real client: the few endpoints it asks, and what can go wrong there.

Weights are kept elsewhere, as the real hub does: `resolve` redirects to another host name, with the linked file's tag.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good_token"


@dataclass
class Repository:
    """Files of one commit. `refs` name it; `needs` is None, `token` or `access` (gated: the token's owner has none)."""

    files: Mapping[str, bytes]
    refs: tuple[str, ...] = ("main",)
    needs: str | None = None
    promised: dict[str, int] = field(default_factory=dict)
    """File -> the size that the hub states in place of the true one."""
    cuts: dict[str, int] = field(default_factory=dict)
    """File -> after so many bytes the connection breaks, once."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps(sorted((k, len(v)) for k, v in self.files.items())).encode()).hexdigest()


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    range: str | None
    has_token: bool


class HubServer:
    """Serves while the block lasts. `asked` is every request, in order; `is_down` answers 503 to all of them.

    `on_asked` is called with each request before it is answered.
    """

    def __init__(self, repositories: Mapping[str, Repository | list[Repository]]) -> None:
        self.repositories = {
            name: commits if isinstance(commits, list) else [commits] for name, commits in repositories.items()
        }
        self.asked: list[Asked] = []
        self.is_down = False
        self.on_asked: Callable[[Asked], None] = lambda asked: None
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for, in order."""
        names = [re.fullmatch(r"/(?:cdn/)?[^/]+/[^/]+/(?:resolve/)?[^/]+/(.+)", a.path) for a in self.asked]
        gets = zip(self.asked, names, strict=True)
        return [name[1] for asked, name in gets if asked.method == "GET" and name and "/api/" not in asked.path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart, and the client would wait 40 ms between
    server_of: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `asked` is the log."""

    def _answer(self) -> None:
        hub, path = self.server_of, urlsplit(self.path).path
        token = self.headers.get("Authorization")
        hub.asked.append(Asked(self.command, path, self.headers.get("Range"), token is not None))
        hub.on_asked(hub.asked[-1])
        if hub.is_down:
            return self._send(503, b"down")
        if token not in (None, f"Bearer {TOKEN}"):
            return self._fail(401, None, "Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            return self._file(_commit(hub.repositories["/".join(parts[1:3])], parts[3]), "/".join(parts[4:]), "cdn")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        commits = hub.repositories.get("/".join(parts[:2]))
        if commits is None or (commits[0].needs == "token" and token is None):
            return self._fail(401 if token is None else 404, "RepoNotFound", "Repository not found")
        kind, revision, rest = parts[2], unquote(parts[3]), "/".join(parts[4:])
        repository = _commit(commits, revision)
        if repository is None:
            return self._fail(404, "RevisionNotFound", "Invalid rev id")
        if is_api:
            return self._send(200, json.dumps(_listing("/".join(parts[:2]), repository, kind)).encode())
        if repository.needs == "access":
            return self._fail(403, "GatedRepo", "Access to this model is restricted")
        if rest not in repository.files:
            return self._fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repository.commit})
        if rest.endswith(".safetensors"):
            data = repository.files[rest]
            return self._send(
                302,
                b"",
                {
                    "Location": f"http://localhost:{hub.port}/cdn/{'/'.join(parts[:2])}/{repository.commit}/{rest}",
                    "X-Repo-Commit": repository.commit,
                    "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "X-Linked-Size": str(repository.promised.get(rest, len(data))),
                },
            )
        return self._file(repository, rest, "hub")

    def _file(self, repository: Repository, name: str, where: str) -> None:
        data = repository.files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if where == "hub":
            headers["X-Repo-Commit"] = repository.commit
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(found[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = repository.cuts.pop(name, None) if self.command == "GET" else None
        self._send(status, data[start:], headers, stop)

    def _fail(self, status: int, code: str | None, message: str, headers: Mapping[str, str] = {}) -> None:
        named = {"X-Error-Message": message} | ({} if code is None else {"X-Error-Code": code})
        self._send(status, json.dumps({"error": message}).encode(), {**headers, **named})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}, stop: int | None = None) -> None:
        """`stop`: break the connection after so many bytes of the body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body[:stop])
            if stop is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
        except OSError:
            self.close_connection = True  # the client is gone


def _commit(commits: list[Repository], revision: str) -> Any:
    """None for a revision that there is not."""
    return next((commit for commit in commits if revision in (*commit.refs, commit.commit)), None)


def _listing(repo: str, repository: Repository, kind: str) -> Any:
    if kind == "revision":
        siblings = [{"rfilename": name} for name in repository.files]
        return {"id": repo, "sha": repository.commit, "siblings": siblings, "private": False, "tags": []}
    return [
        {
            "type": "file",
            "path": name,
            "size": repository.promised.get(name, len(data)),
            "oid": hashlib.sha1(data).hexdigest(),
        }
        for name, data in repository.files.items()
    ]
