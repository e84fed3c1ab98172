"""API keys: which open the server, and that what is cached for one is not there for another."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from starlette.datastructures import Headers

from qwen3vl_disagg.core.environment import API_KEY
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import HttpOptions

OPEN_PATHS = ("/health", "/ready", "/ui", "/ui/live")
"""Answered without a key. A browser that opens a page has no way to show one; what the page asks for needs it."""
_KEY = re.compile(r"[!-~]{1,512}")
_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_MAX_FILE_BYTES = 2**20


class ApiKeys:
    """The server's keys, of which only digests are kept. Each has a random salt for the life of this process."""

    def __init__(self, keys: Iterable[str]) -> None:
        """InputError for what cannot be a key; it is not shown."""
        keys = list(dict.fromkeys(keys))
        if not all(_KEY.fullmatch(key) for key in keys):
            raise InputError("an API key must be 1 to 512 visible ASCII characters", param="api-key")
        self._digests = [_digest(key) for key in keys]
        self._salts = [secrets.token_hex(16) for _ in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def given(cls, options: HttpOptions, environ: Mapping[str, str]) -> ApiKeys:
        """All that the command line, its file and the environment name; none is no key at all. InputError for a source
        that was given and has none: it would open the server to everybody."""
        keys = [*options.api_key]
        sources = {API_KEY: environ.get(API_KEY)}
        if options.api_key_file is not None:
            sources["--api-key-file"] = _read(options.api_key_file)
        for name, text in sources.items():
            if text is not None and not text.split():
                raise InputError(f"{name} has no key", param=name.removeprefix("--"))
            keys += [] if text is None else text.split()
        return cls(keys)

    def number_of(self, salt: str) -> int:
        """Which key a salt is of, from 1, in the order in which they were given; 0 for none."""
        return self._salts.index(salt) + 1 if salt in self._salts else 0

    def salt_of(self, headers: Headers) -> str:
        """Of the key that a request shows; empty where the server has none. InputError 401 for another, or none.

        All keys are compared, in a time that says nothing of how far one agrees.
        """
        if not self:
            return ""
        salt = ""
        for shown in _shown(headers):
            digest = _digest(shown)
            for known, own_salt in zip(self._digests, self._salts, strict=True):
                if hmac.compare_digest(digest, known):
                    salt = own_salt
        if not salt:
            raise InputError("this server needs a valid API key", status=401, code="invalid_api_key")
        return salt


def _shown(headers: Headers) -> Iterator[str]:
    """As OpenAI's clients show a key, and as Anthropic's do."""
    for value in headers.getlist("authorization"):
        if found := _BEARER.fullmatch(value):
            yield found[1]
    yield from headers.getlist("x-api-key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise InputError(f"--api-key-file {path}: is larger than {_MAX_FILE_BYTES} bytes", param="api-key-file")
        return data.decode("ascii")
    except OSError as error:
        raise InputError(f"--api-key-file {path}: {error.strerror}", param="api-key-file") from None
    except UnicodeDecodeError:
        raise InputError(f"--api-key-file {path}: keys are visible ASCII characters", param="api-key-file") from None
