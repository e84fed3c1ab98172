"""The command `llm`, told of the server as its documentation says: in extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from tools.acceptance.checks import CITY, IMAGE, IMAGE_URL, KEY, MODEL, QUESTION, SCRIPTED_URL, SEEN, URL, city, run

HOME, SCHEMA = Path("home").resolve(), json.dumps(CITY)
ABLE = ("vision: true", "supports_schema: true", "supports_tools: true")
IMAGE_TOKENS = 18
"""Of 128 x 128 pixels, with start and end."""
FUNCTION = 'def weather(city: str, warm: bool) -> str:\n    "The weather"\n    return "sunny"\n'


def entry(name: str, url: str, *more: str) -> str:
    lines = [f"- model_id: {name}", f"model_name: {MODEL}", f"api_base: {url}", "api_key_name: here", *more]
    return "\n  ".join(lines) + "\n"


def llm(model: str, *args: str, stream: str = "stdout") -> str:
    env = os.environ | {"LLM_USER_PATH": str(HOME)}
    done = subprocess.run(["llm", "-m", model, *args], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return getattr(done, stream).strip()


def looked(model: str) -> bool:
    """Whether a picture takes its rows in the prompt. What it shows is not asked: it comes behind the text here, and
    the small model has learned the other order."""

    def count(*args: str) -> int:
        return int(re.findall(r"(\d+) input", llm(model, *args, "-u", QUESTION, stream="stderr"))[-1])

    return count("-a", str(IMAGE)) == count() + IMAGE_TOKENS


HOME.mkdir()
entries = [entry("here", URL, *ABLE), entry("script", SCRIPTED_URL, *ABLE)]
entries += [entry("old", URL, "completion: true"), entry("new", URL, "responses: true", *ABLE)]
(HOME / "keys.json").write_text(json.dumps({"here": KEY}))
(HOME / "extra-openai-models.yaml").write_text("".join(entries))
run(
    {
        "quick start": lambda: llm("here", "Ten fun names for a pet pelican"),
        "chat": lambda: llm("here", "--no-stream", "-s", "Be brief.", QUESTION),
        "chat, streamed": lambda: llm("here", QUESTION) == llm("here", "--no-stream", QUESTION),
        "usage in a stream": lambda: re.search(r"[1-9]\d* input, [1-9]", llm("here", "-u", QUESTION, stream="stderr")),
        "image sent along": lambda: looked("here"),
        "image by http: URL (s)": lambda: llm("script", "--at", IMAGE_URL, "image/png", QUESTION) == SEEN,
        "tools offered": lambda: llm("here", "-T", "llm_version", QUESTION),
        "tool loop (s)": lambda: llm("script", "--functions", FUNCTION, QUESTION) == SEEN,
        "json_object (s)": lambda: city(llm("script", "-o", "json_object", "1", "JSON, please")),
        "json_schema": lambda: city(llm("here", "--schema", SCHEMA, QUESTION)),
        "sampling options": lambda: llm(
            "here", "-o", "seed", "3", "-o", "temperature", "0.5", "-o", "max_tokens", "9", QUESTION
        ),
        "completions": lambda: llm("old", "-o", "max_tokens", "4", "a red"),
        "responses": lambda: llm("new", "--no-stream", QUESTION),
        "responses, streamed": lambda: llm("new", QUESTION) and looked("new"),
        "responses: typed answer": lambda: city(llm("new", "--schema", SCHEMA, QUESTION)),
    }
)
