"""`qwen3vl-disagg trace`: what a running server's ranks did lately, fetched and written to a file."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from qwen3vl_disagg.core.environment import API_KEY
from qwen3vl_disagg.core.errors import InputError, UnavailableError
from qwen3vl_disagg.options import TraceOptions

TIMEOUT_S = 30.0
MAX_BYTES = 256 * 2**20


def run_trace(options: TraceOptions) -> int:
    """Run the command. InputError for what cannot be asked for or written, UnavailableError without an answer."""
    if not 0 < options.seconds <= 600:
        raise InputError(f"--seconds {options.seconds:g}: must be more than 0, and 600 at most", param="seconds")
    body = _fetch(options)
    try:
        trace = json.loads(body)
        events, notes = trace["traceEvents"], trace.get("otherData", {})
        ranks = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnavailableError(f"what {options.url} answered is no trace") from None
    try:
        options.out.write_bytes(body)
    except OSError as error:
        raise InputError(f"--out {options.out}: {error.strerror}", param="out") from None
    num = sum(event["ph"] == "X" for event in events)
    print(f"{options.out}: {num} spans of {', '.join(ranks) or 'no rank'}, the last {options.seconds:g} s")
    for name, note in notes.items():
        if isinstance(note, str):
            print(f"{name}: {note}")
    print("Open it at https://ui.perfetto.dev (Open trace file; it stays in the browser) or in chrome://tracing.")
    return 0


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
        raise InputError(f"--url {options.url}: must be the server's, as in http://127.0.0.1:8000", param="url")
    if not (key.isascii() and key.isprintable()):
        raise InputError("--api-key: keys are visible ASCII characters", param="api-key")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            body = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise _refused(options, error) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UnavailableError(f"no answer from {url}: {getattr(reason, 'strerror', None) or reason}") from None
    if len(body) > MAX_BYTES:
        raise UnavailableError(f"the trace is larger than {MAX_BYTES} bytes: ask for less with --seconds")
    return body


def _refused(options: TraceOptions, error: urllib.error.HTTPError) -> Exception:
    if error.code == 401:
        return InputError(f"{options.url} needs a valid --api-key, or {API_KEY}", param="api-key")
    try:
        said: Any = json.loads(error.read(MAX_BYTES))["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        said = "no server of this kind, or an older one" if error.code == 404 else error.reason
    return UnavailableError(f"{options.url} answered {error.code}: {said}")
