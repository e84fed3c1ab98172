"""A job whose control connections are encrypted, over IPv6 where there is any: answers, and who is turned away."""

from __future__ import annotations

import asyncio
import re
import signal
import socket

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.cluster.hub_client import enter_hub
from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.protocol.messages import RankHello
from qwen3vl_disagg.transport.addresses import parse_address
from tests.support.certificates import Authority
from tests.support.scenes import ask_scenes
from tests.support.server import Job, Server

TOKEN = {"Q3VL_TOKEN": "what ranks of this job show one another"}


def own_address() -> str:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return "127.0.0.1"
    return "::1"


def test_encrypted_ranks_answer_and_strangers_are_turned_away(tmp_path):
    """1 + 1, and an encode rank that joins."""
    authority, host = Authority(tmp_path), own_address()
    ours, theirs = authority.sign("ours"), Authority(tmp_path / "theirs").sign("theirs")
    asked = ask_scenes(tmp_path / "scenes", seed=616, count=8)
    hub = f"[{host}]:0" if ":" in host else f"{host}:0"
    with (
        Server(2, "--hub", hub, *ours.args, host=host, env=TOKEN) as server,
        Job("encode.py", 1, "--join", server.hub, *authority.sign("far").args, env=TOKEN) as job,
    ):
        expected = LLM().chat([entry.messages() for entry in asked], SamplingParams(max_new_tokens=64))
        job.wait_for("encode rank 2: joined")
        hello = RankHello(token=TOKEN["Q3VL_TOKEN"], role="encode", rank=None, pid=1, fingerprint={})
        for tls in (None, theirs.tls()):
            with pytest.raises(HandshakeError, match="TLS"):
                asyncio.run(enter_hub(parse_address(server.hub, "hub"), hello, deadline_s=10, tls=tls))
        used = set()
        for _ in range(2):
            for entry, mine in zip(asked, expected, strict=True):
                status, body = server.chat(entry.content())
                assert status == 200, body
                assert body["choices"][0]["token_ids"] == mine.token_ids
                used |= set(body["timings"]["encode_ranks"])
        assert used == {0, 2}
        assert {entry.get("address") for entry in server.processes()} == {None, host}
        job.process.send_signal(signal.SIGTERM)
        job.process.wait(40)
        output = server.output()
    assert len(re.findall(f"refused a peer at {re.escape(host)}", output)) == 1, output
    assert TOKEN["Q3VL_TOKEN"] not in output
