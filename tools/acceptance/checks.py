"""What a client's script is made of: a check for each feature, run one by one, each result a line for `run.py`.

A check that returns something true is a `y`. One that raises is the HTTP status and code of what was raised, else its
class's name. Runs in the client's own environment, with the standard library alone.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT, SCRIPTED = os.environ["ACCEPTANCE_ROOT"], os.environ["ACCEPTANCE_SCRIPTED"]
"""The server, and the one whose backend plays a script; without /v1."""
URL, SCRIPTED_URL = f"{ROOT}/v1", f"{SCRIPTED}/v1"
VECTORS_URL = os.environ["ACCEPTANCE_VECTORS"] + "/v1"
"""Of the server that was started with --task embed."""
KEY, MODEL = os.environ["OPENAI_API_KEY"], os.environ["ACCEPTANCE_MODEL"]
IMAGE, CLIP = Path(os.environ["ACCEPTANCE_IMAGE"]), Path(os.environ["ACCEPTANCE_CLIP"])
IMAGE_URL = os.environ["ACCEPTANCE_IMAGE_URL"]
FOLDER = os.environ["ACCEPTANCE_FOLDER"]
"""Of the checkpoint, with its tokenizer."""
VARIANT = sys.argv[1] if len(sys.argv) > 1 else ""
LIMIT_S = 300

IMAGE_DATA = base64.b64encode(IMAGE.read_bytes()).decode()
DATA_URI = f"data:image/png;base64,{IMAGE_DATA}"
CLIP_URI = f"data:video/mp4;base64,{base64.b64encode(CLIP.read_bytes()).decode()}"
QUESTION, SEEN = "What is at the top left?", "red circle"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather of a city", "parameters": CITY}
TOOL = {"type": "function", "function": FUNCTION}
RESPONSES_TOOL = {"type": "function", **FUNCTION, "strict": True}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}

Check = Callable[[], Any]


def refused(expect: str, check: Check) -> tuple[Check, str]:
    """A check whose cell must be this refusal, such as `400 unsupported_url`."""
    return check, expect


def user(content: Any = QUESTION) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def look(url: str, kind: str = "image_url") -> list[dict[str, Any]]:
    return user([{"type": kind, kind: {"url": url}}, {"type": "text", "text": QUESTION}])


def look_by_response(url: str) -> list[dict[str, Any]]:
    return user([{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": QUESTION}])


def city(found: Any) -> bool:
    """Whether it has the form of CITY: an object, its JSON, or a model of it."""
    value = json.loads(found) if isinstance(found, str) else found
    if not isinstance(value, dict):
        value = {name: one for name, one in vars(value).items() if not name.startswith("_")}
    return set(value) == {"city", "warm"} and value["city"] in ("Paris", "Rome") and isinstance(value["warm"], bool)


def unit(vector: Any) -> bool:
    """Whether it has length 1."""
    return abs(sum(value * value for value in vector) - 1) < 1e-3


def raised(kind: type[BaseException], check: Check) -> Any:
    """What the check raises. AssertionError if it does not."""
    try:
        check()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those it came from."""
    seen, todo = set[int](), [error]
    while todo:
        one = todo.pop(0)
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [found for found in (one.__cause__, one.__context__) if found is not None]


def cell(error: BaseException) -> str:
    """`400 some_code` where an answer of the server is behind the error."""
    for one in chain(error):
        status, body = getattr(one, "status_code", None), getattr(one, "body", None)
        if isinstance(status, int):
            told = body.get("error", body).get("code") if isinstance(body, dict) else None
            said = re.search(r"""["']code["']: ?["'](\w+)["']""", str(one))
            code = told or (said and said[1])
            return f"{status} {code}" if code else str(status)
    return type(error).__name__


def _late(*_: object) -> None:
    raise TimeoutError(f"not done after {LIMIT_S} s")


def run(checks: Mapping[str, Check | tuple[Check, str]]) -> None:
    """Run all checks, or those whose feature has what ACCEPTANCE_ONLY says."""
    signal.signal(signal.SIGALRM, _late)
    chosen = {name: one for name, one in checks.items() if os.environ.get("ACCEPTANCE_ONLY", "") in name}
    print(f"\nCHECKS {len(chosen)}", flush=True)
    for feature, one in chosen.items():
        check, expect = one if isinstance(one, tuple) else (one, "y")
        result, detail = "y", ""
        signal.alarm(LIMIT_S)
        try:
            value = check()
            value = asyncio.run(value) if inspect.iscoroutine(value) else value
            if not value:
                result, detail = "wrong", repr(value)
        except Exception as error:
            result, detail = cell(error), "".join(traceback.format_exception(error))[-3000:]
        finally:
            signal.alarm(0)
        print("\nCELL " + json.dumps([feature, result, expect, detail]), flush=True)
