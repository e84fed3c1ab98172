"""Ask a running server: `python tools/http_client.py --image picture.png --prompt "What is this?" [--stream]`.

In a terminal the answer is followed by its waterfall: which stage took how long, one after another. Standard library
only, so that it runs anywhere and reads as an example of the protocol.
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

STAGES = ("queue", "preprocess", "encode", "transfer", "prefill", "decode")
"""Of `timings`, in the order in which a request goes through them; `preprocess` is an image's decoding and cutting."""
WIDTH = 79
CELLS = {(False, False): " ", (True, False): "▌", (False, True): "▐", (True, True): "█"}
"""Which halves of a column a bar covers."""


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


def waterfall(timings: dict[str, Any], width: int = WIDTH) -> str:
    """Lines `stage |bar| ms detail` of the stages one after another, none longer than `width`, to half a column."""
    milliseconds = [float(timings.get(stage) or 0.0) for stage in STAGES]
    details = _details(timings)
    names, numbers = max(map(len, STAGES)), [f"{ms:,.1f} ms" for ms in milliseconds]
    right = max(map(len, numbers))
    columns = max(10, width - names - right - max(map(len, details.values()), default=0) - 7)
    scale = 2 * columns / (sum(milliseconds) or 1.0)
    lines, begun = [], 0.0
    for stage, ms, number in zip(STAGES, milliseconds, numbers, strict=True):
        bar = _bar(round(begun * scale), round((begun + ms) * scale), columns, is_there=ms > 0)
        lines.append(f"{stage:>{names}} |{bar}| {number:>{right}}  {details.get(stage, '')}".rstrip()[:width])
        begun += ms
    return "\n".join(lines)


def _details(timings: dict[str, Any]) -> dict[str, str]:
    """What there is to say of a stage beside its time."""
    items = timings.get("items") or []
    found = {"prefill": f"language rank {timings.get('language_rank', 0)}"}
    if timings.get("cached_tokens"):
        found["prefill"] += f", {timings['cached_tokens']} cached"
    if items:
        ranks = ", ".join(map(str, timings.get("encode_ranks") or []))
        found["preprocess"] = f"{len(items)} item(s){', encode rank ' if ranks else ''}{ranks}"[:30]
        found["encode"] = f"{sum(item.get('rows', 0) for item in items)} rows"
        found["transfer"] = f"{timings.get('transfer_bytes', 0) / 1e3:,.1f} kB"
    return found


def _bar(start: int, stop: int, columns: int, *, is_there: bool) -> str:
    """From one half column to another; what took time at all is seen."""
    start = min(start, 2 * columns - 1)
    stop = min(max(stop, start + is_there), 2 * columns)
    return "".join(CELLS[start <= half < stop, start <= half + 1 < stop] for half in range(0, 2 * columns, 2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    base_url = "as other clients of OpenAI's form take it, with or without /v1 (default: %(default)s)"
    parser.add_argument("--base-url", "--url", default="http://127.0.0.1:8000/v1", metavar="URL", help=base_url)
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--video", type=Path, action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--timings", action="store_true", help="print `timings` as JSON to stderr, no waterfall")
    parser.add_argument(
        "--waterfall", action=argparse.BooleanOptionalAction, help="draw it on stderr (default: if that is a terminal)"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="longest silence (default: 120)")
    args = parser.parse_args()
    try:
        fields = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
        body = build_body(args.prompt, args.image, args.video, **fields)
        timings = ask(args.base_url, body, stream=args.stream, timeout_s=args.timeout)
    except (ServerError, OSError, http.client.HTTPException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.timings:
        print(json.dumps(timings), file=sys.stderr)
    elif timings and (sys.stderr.isatty() if args.waterfall is None else args.waterfall):
        print(waterfall(timings), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
