"""Ask a running server: `python tools/http_client.py --image picture.png --prompt "What is this?" [--stream]`.

Standard library only, so that it runs anywhere and reads as an example of the protocol.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class ServerError(Exception):
    """The server answered with an error, or not at all."""


def build_body(prompt: str, images: list[Path], videos: list[Path], **fields: Any) -> dict[str, Any]:
    """A chat request with one user turn: the images in order, the videos, then the prompt. None fields are left out."""
    parts: list[dict[str, Any]] = []
    for kind, path in [("image_url", path) for path in images] + [("video_url", path) for path in videos]:
        data = base64.b64encode(path.read_bytes()).decode()
        # The server looks at the content, so the declared type need not be right.
        parts.append({"type": kind, kind: {"url": f"data:application/octet-stream;base64,{data}"}})
    parts.append({"type": "text", "text": prompt})
    given = {name: value for name, value in fields.items() if value is not None}
    return {"messages": [{"role": "user", "content": parts}], **given}


def post(url: str, body: dict[str, Any], timeout_s: float) -> http.client.HTTPResponse:
    """The response, headers read. ServerError for any status but 200, with the server's own message."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServerError(f"{url}: not an http URL")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout_s)
    path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"  # OpenAI's clients are told of /v1
    connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise ServerError(f"{response.status}: {error_message(response.read())}")
    return response


def error_message(raw: bytes) -> str:
    """The message of an error envelope, or what came instead of one."""
    try:
        error = json.loads(raw)["error"]
        return f"{error['param']}: {error['message']}" if error.get("param") else error["message"]
    except (ValueError, KeyError, TypeError):
        return raw[:200].decode(errors="replace")


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream, up to [DONE]. ServerError for an error event, or if the stream breaks off."""
    for line in response:
        if not line.startswith(b"data: "):
            continue  # blank lines end an event, comments keep the connection awake
        data = line[len(b"data: ") :].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ServerError(error_message(data))
        yield event
    raise ServerError("the stream broke off")


def ask(url: str, body: dict[str, Any], *, stream: bool, timeout_s: float) -> dict[str, Any]:
    """Print the answer to stdout, as it comes if streamed; returns the timings."""
    response = post(url, {**body, "stream": stream}, timeout_s)
    if not stream:
        answer = json.loads(response.read())
        print(answer["choices"][0]["message"]["content"])
        return answer.get("timings", {})
    timings: dict[str, Any] = {}
    for event in events(response):
        for choice in event["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
        timings = event.get("timings", timings)
    print()
    return timings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (default: %(default)s)")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--video", type=Path, action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--timings", action="store_true", help="print the stages' milliseconds to stderr")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="longest silence (default: 120)")
    args = parser.parse_args()
    try:
        fields = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
        body = build_body(args.prompt, args.image, args.video, **fields)
        timings = ask(args.url, body, stream=args.stream, timeout_s=args.timeout)
    except (ServerError, OSError, http.client.HTTPException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.timings:
        print(json.dumps(timings), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
