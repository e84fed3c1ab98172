"""`qwen3vl-disagg trace`: what a running server's ranks did lately, fetched and written to a file."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.environment import API_KEY
from qwen3vl_disagg.core.errors import InputError, UnavailableError
from qwen3vl_disagg.options import TraceOptions

TIMEOUT_S = 30.0
MAX_BYTES = 256 * 2**20
MAX_SHOWN = 300
"""Characters of what another server says."""


direct = urllib.request.OpenerDirector()
"""Asks the server that was named, and no other: it knows no proxies, and a redirect is an error like another. Either
would take the key to another host."""
for _handler in (
    urllib.request.HTTPHandler(),
    urllib.request.HTTPSHandler(),
    urllib.request.HTTPDefaultErrorHandler(),
    urllib.request.HTTPErrorProcessor(),
):
    direct.add_handler(_handler)


@dataclass(frozen=True)
class _Contents:
    """What there is to say of a trace."""

    num_spans: int
    ranks: Sequence[str]
    notes: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, body: bytes) -> _Contents:
        """An error of `json`, or of looking into it, for what is no trace."""
        trace = json.loads(body)
        events, notes = trace["traceEvents"], trace.get("otherData", {})
        if not isinstance(events, list):
            raise TypeError("no list of events")
        names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
        return cls(
            sum(event["ph"] == "X" for event in events),
            [str(name) for name in names],
            [(name, note) for name, note in notes.items() if isinstance(note, str)],
        )


def run_trace(options: TraceOptions) -> int:
    """Run the command. InputError for what cannot be asked for or written, UnavailableError without an answer."""
    if not 0 < options.seconds <= 600:
        raise InputError(f"--seconds {options.seconds:g}: must be more than 0, and 600 at most", param="seconds")
    if os.path.isfile(options.out) and not options.overwrite:
        raise InputError(f"--out {options.out}: the file is there; --overwrite would replace it", param="out")
    body = _fetch(options)
    try:
        contents = _Contents.of(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UnavailableError(f"what {options.url} answered is no trace") from None
    _write(options.out, body)
    ranks = _shown(", ".join(contents.ranks)) or "no rank"
    print(f"{options.out}: {contents.num_spans} spans of {ranks}, the last {options.seconds:g} s")
    for name, note in contents.notes:
        print(_shown(f"{name}: {note}"))
    print("Open it at https://ui.perfetto.dev (Open trace file; it stays in the browser) or in chrome://tracing.")
    return 0


def _write(path: Path, body: bytes) -> None:
    try:
        path.write_bytes(body)
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}", param="out") from None


def _shown(text: str) -> str:
    """Fit for a terminal: nothing in it moves the cursor, and it is one line."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[: MAX_SHOWN + 1])
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _fetch(options: TraceOptions) -> bytes:
    url = options.url.rstrip("/").removesuffix("/v1")
    key = options.api_key or next(iter(os.environ.get(API_KEY, "").split()), "")
    headers = {"x-api-key": key} if key else {}
    try:
        parts = urllib.parse.urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        request = urllib.request.Request(f"{url}/debug/trace?seconds={options.seconds:g}", headers=headers)
    except ValueError:
        is_url = False
    if not is_url or parts.query or parts.fragment:
        raise _no_url(options)
    if not (key.isascii() and key.isprintable()):
        raise InputError("--api-key: keys are visible ASCII characters", param="api-key")
    try:
        with direct.open(request, timeout=TIMEOUT_S) as response:
            body: bytes = response.read(MAX_BYTES + 1)
    except UnicodeError:
        raise _no_url(options) from None
    except urllib.error.HTTPError as error:
        raise _refused(options, error) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        why = _shown(str(getattr(reason, "strerror", None) or reason))
        raise UnavailableError(f"no answer from {url}: {why}") from None
    if len(body) > MAX_BYTES:
        raise UnavailableError(f"the trace is larger than {MAX_BYTES} bytes: ask for less with --seconds")
    return body


def _no_url(options: TraceOptions) -> InputError:
    return InputError(f"--url {options.url}: must be the server's, as in http://127.0.0.1:8000", param="url")


def _refused(options: TraceOptions, error: urllib.error.HTTPError) -> Exception:
    if error.code == 401:
        return InputError(f"{options.url} needs a valid --api-key, or {API_KEY}", param="api-key")
    try:
        said: Any = json.loads(error.read(MAX_BYTES))["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, http.client.HTTPException):
        said = "no server of this kind, or an older one" if error.code == 404 else error.reason
    return UnavailableError(f"{options.url} answered {error.code}: {_shown(str(said))}")
