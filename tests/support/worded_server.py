"""The real application over scripted answers in a child, and the keeper of its last words in another one.

    python -m tests.support.worded_server

prints `ready: PORT KEEPER_PID PID`; for each line on its stdin it starts the server again, or where it says so the
`keeper`, and prints the new PID. Ends with its stdin. Answers have 200 tokens and take 10 s; where the question says
`wait`, nothing comes, where it says `flood`, all of it at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

from qwen3vl_disagg.cluster.backend import AllDecoded
from qwen3vl_disagg.cluster.last_words import LastWords, keep_words, words_door
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing import Prompt
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.http_server import HttpServer
from tests.support.fake_backend import FakeBackend, Step, answer_of, tiny_processor


def script(prompt: Prompt, sampling: SamplingParams) -> list[Step]:
    question = tiny_processor().tokenizer.decode(prompt.token_ids)
    if "wait" in question:
        return [AllDecoded(), 60.0]
    first, *rest = answer_of([tiny_processor().tokenizer.encode("red")[0]] * 200, sampling)
    return [first, *(step for event in rest for step in (event, 0.0 if "flood" in question else 0.05))]


def serve(sock: socket.socket, words: socket.socket) -> None:
    app = create_app(FakeBackend(script), tiny_processor(), model_name="tiny")
    asyncio.run(HttpServer(app, words=LastWords(words)).serve(sock))


def fork(body: object) -> int:
    pid = os.fork()
    if pid == 0:
        body()
        os._exit(0)
    return pid


def main() -> None:
    tiny_processor()
    words, keepers_end = words_door()
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 2**10)  # of what it accepts: soon full
    keeper = fork(lambda: keep_words(keepers_end))
    server = fork(lambda: serve(sock, words))
    print(f"ready: {sock.getsockname()[1]} {keeper} {server}", flush=True)
    for line in sys.stdin:
        if line.strip() == "keeper":
            os.waitpid(keeper, 0)
            keeper = fork(lambda: keep_words(keepers_end))
            print(keeper, flush=True)
            continue
        os.waitpid(server, 0)
        server = fork(lambda: serve(sock, words))
        print(server, flush=True)
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    os.kill(keeper, signal.SIGTERM)
    _, status = os.waitpid(keeper, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
