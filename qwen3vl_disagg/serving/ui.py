"""`/ui`, to ask, and `/ui/live`, to see what ranks do: pages of one file each. A page may run what is in it, ask this
server, and show what its user gives it."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

UI_PATH, LIVE_PATH = "/ui", "/ui/live"
_FILES = {UI_PATH: "ui.html", LIVE_PATH: "live.html"}


def _policy(page: str) -> str:
    """Content-Security-Policy: of scripts and styles those that stand in the page, named by their digests."""

    def digests(element: str) -> str:
        found = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {digests('script')}",
            f"style-src {digests('style')}",
            "img-src data:",
            "media-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


@functools.cache
def _page(path: str) -> tuple[bytes, dict[str, str]]:
    text = Path(__file__).with_name(_FILES[path]).read_text("utf-8")
    return text.encode(), {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": _policy(text),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


async def ui(request: Request) -> Response:
    """The page of the path. It says nothing of the server: whoever uses it needs a key where there are keys."""
    body, headers = _page(request.url.path)
    return Response(body, headers=headers)
