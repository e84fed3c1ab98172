"""Requests that no server may answer, each for another reason: all must be a typed 4xx."""

from __future__ import annotations

import base64
import io
import json
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Bad:
    name: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))


def bad_requests() -> list[Bad]:
    """All of them, in a fixed order."""
    made = [Bad(name, json.dumps(body).encode()) for name, body in _fields().items()]
    made += [Bad(name, body) for name, body in _bytes().items()]
    plain = json.dumps(_ask("?")).encode()
    return [*made, Bad("no Content-Type", plain, {}), Bad("form data", plain, {"Content-Type": "text/plain"})]


def _ask(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


def _image(url: str) -> dict[str, Any]:
    return _ask([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}])


def _data(data: bytes) -> dict[str, Any]:
    return _image(f"data:image/png;base64,{base64.b64encode(data).decode()}")


def _picture(kind: str, size: tuple[int, int] = (96, 96)) -> bytes:
    """Noise: what is cut off is missed."""
    out = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1])).save(out, kind)
    return out.getvalue()


def _huge_png() -> bytes:
    """A good header of 50,000 x 50,000 pixels."""
    head = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")


def _fields() -> dict[str, dict[str, Any]]:
    return {
        "an image of no bytes": _data(b""),
        "text as an image": _data(b"not an image"),
        "half a PNG": _data(_picture("PNG")[:9000]),
        "a JPEG cut off": _data(_picture("JPEG")[:2500]),
        "bad base64": _image("data:image/png;base64,!!!!"),
        "huge dimensions": _data(_huge_png()),
        "an aspect of 400": _data(_picture("PNG", (1600, 4))),
        "an SVG": _data(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "a file": _image("file:///etc/passwd"),
        "a private URL": _image("http://127.0.0.1/a.png"),
        "a URL with a backslash": _image("http://example.org\\@127.0.0.1/a.png"),
        "an image of the assistant's": {"messages": [{**_data(_picture("PNG"))["messages"][0], "role": "assistant"}]},
        "no messages": {"messages": []},
        "an unknown role": {"messages": [{"role": "pirate", "content": "?"}]},
        "longer than the context": _ask("word " * 5000),
        "no tokens": _ask("?", max_tokens=0),
        "too many tokens": _ask("?", max_tokens=10**9),
        "a negative temperature": _ask("?", temperature=-1),
        "top_p of 7": _ask("?", top_p=7, stream=True),
        "a thousand million answers": _ask("?", n=10**9),
        "a million logprobs": _ask("?", logprobs=True, top_logprobs=10**6),
        "a token outside the vocabulary": _ask("?", logit_bias={"1000000": 1}),
        "too many stop strings": _ask("?", stop=["a"] * 1000),
        "another model": _ask("?", model="no-such-model"),
        "a schema of nothing": _ask("?", guided_json={"not": {}}),
    }


def _bytes() -> dict[str, bytes]:
    return {
        "no body": b"",
        "not JSON": b"{",
        "NaN": b'{"messages": [{"role": "user", "content": "?"}], "temperature": NaN}',
        "infinity": b'{"messages": [{"role": "user", "content": "?"}], "temperature": 1e999}',
        "a key twice": b'{"messages": [], "messages": [{"role": "user", "content": "?"}]}',
        "a lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "NUL": b'{"messages": [{"role": "user", "content": "a\\u0000b"}]}',
        "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        "a thousand levels": b'{"messages": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    }
