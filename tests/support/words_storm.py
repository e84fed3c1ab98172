"""A writer that is killed at any moment, also in the middle of a write, and the keeper of its last words.

    python -m tests.support.words_storm 40

For each life the writer sends pieces of 100 bytes as fast as it can, each with other last words prepared, which name
it. Prints how many lives ended with the words that fit behind what had been written, and what else was seen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections import Counter

from qwen3vl_disagg.cluster.last_words import LastWords, keep_words, words_door

PIECE = b"." * 100
WORDS = b"<%08d>"


def write(sock: socket.socket, door: socket.socket) -> None:
    held = LastWords(door).hold(sock)
    number = 0
    while True:
        number += 1
        held.prepare(WORDS % number)
        while not held._number:  # the keeper is behind: a server would go on without words
            time.sleep(1e-4)
            held.prepare(WORDS % number)
        held.will_write(len(PIECE))
        time.sleep(1e-4 * (number % 2))  # so that it also dies there
        sock.sendall(PIECE)


def life(listener: socket.socket, door: socket.socket, rng: random.Random) -> str:
    client = socket.create_connection(listener.getsockname(), timeout=20)
    accepted, _ = listener.accept()
    pid = os.fork()
    if pid == 0:
        client.close()
        write(accepted, door)
    accepted.close()
    kill_at = time.monotonic() + 0.01 + 0.03 * rng.random()
    data = bytearray()
    is_alive = True
    while chunk := client.recv(1 << 16):
        data += chunk
        if is_alive and time.monotonic() >= kill_at:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            is_alive = False
    count, rest = len(data) // len(PIECE), bytes(data[len(data) // len(PIECE) * len(PIECE) :])
    if rest == WORDS % count:
        return "right"
    return f"nothing behind {count}" if not rest else f"{rest!r} behind {count}"


def main() -> None:
    door, keepers_end = words_door()
    keeper = os.fork()
    if keeper == 0:
        door.close()
        os._exit(keep_words(keepers_end))
    listener = socket.create_server(("127.0.0.1", 0))
    rng = random.Random(0)
    ends = Counter(life(listener, door, rng) for _ in range(int(sys.argv[1])))
    os.kill(keeper, signal.SIGTERM)
    _, status = os.waitpid(keeper, 0)
    print(json.dumps({"ends": ends, "keeper": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    main()
