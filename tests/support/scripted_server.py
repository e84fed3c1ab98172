"""The real application, at a loopback port until its stdin is closed, over a backend whose answers follow from the
question: what a small model does not write of its own accord.

    python -m tests.support.scripted_server KEY PICTURE

prints `ready: URL` and `picture: URL`: the picture's file at a host from which media may be fetched.

Where there are tools, a call of the first one, or two where it says `both`; `red circle` when their results are there.
Else an object where one is demanded or JSON is spoken of; thoughts where it says `think`; `red circle`.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from pathlib import Path

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing import Prompt
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.http_server import HttpServer
from tests.support.fake_backend import FakeBackend, Step, answer_steps, tiny_processor
from tests.support.media_origin import fetcher, head, origin

CITY = {"city": "Paris", "warm": True}
NAMES = ("gpt-4o-mini",)
VALUES = {"string": "Paris", "number": 21.5, "integer": 21, "boolean": True}


def filled(tool: str) -> str:
    """A call of a tool, as the prompt shows it, with its required arguments."""
    function = json.loads(tool)["function"]
    parameters = function["parameters"]
    given = {name: VALUES[parameters["properties"][name]["type"]] for name in parameters.get("required", ())}
    return "<tool_call>\n" + json.dumps({"name": function["name"], "arguments": given}) + "\n</tool_call>"


def answer(question: str, kind: str | None) -> str:
    """The text of an answer. `kind`: of the grammar that it is held to."""
    tool = re.search(r"<tools>\n(.*)", question)
    if tool and kind != "json":
        if "<tool_response>" in question:
            return "red circle"
        return "\n".join([filled(tool[1])] * (2 if "both" in question else 1))
    if kind == "json":
        return json.dumps(CITY)
    if "json" in question.lower():
        return f"```json\n{json.dumps(CITY)}\n```"
    return "<think>\nI look.\n</think>\n\nred circle" if "think" in question else "red circle"


def script(prompt: Prompt, sampling: SamplingParams) -> list[Step]:
    question = tiny_processor().tokenizer.decode(prompt.token_ids)
    return answer_steps(answer(question, sampling.grammar and sampling.grammar.kind), sampling)


async def main(key: str, picture: Path) -> None:
    data = picture.read_bytes()
    async with origin({"/picture.png": head(Content_Length=str(len(data))) + data}) as site, fetcher() as one:
        names = {"model_name": "tiny", "more_names": NAMES}
        app = create_app(FakeBackend(script), tiny_processor(), keys=ApiKeys([key]), fetcher=one, **names)
        server, sock = HttpServer(app, graceful_s=5), socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sock))
        print(f"ready: http://127.0.0.1:{sock.getsockname()[1]}\npicture: {site.url('/picture.png')}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        server.shutdown()
        await serving


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
