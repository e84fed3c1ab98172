"""The trial of clients: what a script's checks become, and which scripts there are. No client is installed here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.scripted_server import CITY, answer
from tools.acceptance.catalogue import CLIENTS, FEATURES, Client
from tools.acceptance.run import Cell, run_script, table, try_client

HEAD = "from tools.acceptance.checks import refused, run\n"
FAILS = """
class Refusal(Exception):
    status_code, body = 404, {"error": {"code": "not_found"}}

def refusal():
    try:
        raise Refusal
    except Refusal as error:
        raise RuntimeError("wrapped") from error

def empty():
    return ""

async def later():
    return True

run({"chat": later, "completions": empty, "responses": refusal, "messages": refused("404 not_found", refusal)})
"""


@pytest.fixture
def told(tmp_path):
    """What scripts are told, of servers that are not there."""
    (tmp_path / "file").write_bytes(b"")
    paths = dict.fromkeys(("ACCEPTANCE_IMAGE", "ACCEPTANCE_CLIP"), str(tmp_path / "file"))
    names = ("ROOT", "SCRIPTED", "VECTORS", "MODEL", "IMAGE_URL", "FOLDER")
    return paths | {f"ACCEPTANCE_{name}": "none" for name in names} | {"OPENAI_API_KEY": "k"}


def environment(folder: Path) -> Path:
    """One that has this interpreter."""
    (folder / "bin").mkdir(parents=True)
    os.symlink(sys.executable, folder / "bin" / "python")
    return folder


@pytest.fixture
def script(tmp_path, monkeypatch):
    def write(text: str) -> Client:
        (tmp_path / "clients").mkdir(exist_ok=True)
        (tmp_path / "clients" / "a.py").write_text(HEAD + text)
        monkeypatch.setattr("tools.acceptance.run.HERE", tmp_path)
        return Client("a", "a.py", ("a",), limit_s=20)

    return write


def test_cells(tmp_path, script, told):
    cells = run_script(script(FAILS), "", environment(tmp_path / "env" / "a"), told)
    assert [cell[:3] for cell in cells] == [
        ("chat", "y", "y"),
        ("completions", "wrong", "y"),
        ("responses", "404 not_found", "y"),
        ("messages", "404 not_found", "404 not_found"),
    ]
    assert "wrapped" in cells[2].detail


def test_what_is_not_expected_is_wrong(tmp_path, script, told):
    environment(tmp_path / "env" / "a")
    cells, wrong = try_client(script(FAILS), tmp_path / "env", told)
    assert cells == {"chat": "y", "completions": "wrong", "responses": "404 not_found", "messages": "404 not_found"}
    assert [text.partition("\n")[0] for text in wrong] == [
        "a: completions: wrong, y expected",
        "a: responses: 404 not_found, y expected",
    ]
    for text, first in (("run({'dance': int})", "a: dance: wrong"), ("1 / 0", "a: (the script): exit 1")):
        _, wrong = try_client(script(text), tmp_path / "env", told)
        assert wrong[0].startswith(first)


def test_a_script_that_hangs_is_ended(tmp_path, script, told):
    client = Client(**{**script("import time\ntime.sleep(60)").__dict__, "limit_s": 1})
    [cell] = run_script(client, "", environment(tmp_path / "env" / "a"), told)
    assert cell == Cell("(the script)", "exit not done after 1 s", "exit 0", "")


def test_rows_are_features_in_their_order():
    columns = {"a": {"chat": "y"}, "b": {"quick start": "y / 404", "chat": "404"}}
    assert table(columns) == [["quick start", ".", "y / 404"], ["chat", "y", "404"]]


def test_each_script_is_some_client_s():
    folder = Path(__file__).parent.parent.parent / "tools" / "acceptance" / "clients"
    assert {path.name for path in folder.iterdir() if path.suffix in (".py", ".mjs")} == {c.script for c in CLIENTS}
    assert len({client.name for client in CLIENTS}) == len(CLIENTS)
    assert len(set(FEATURES)) == len(FEATURES)


def test_answers_of_the_script():
    properties = {"a": {"type": "integer"}, "b": {"type": "string"}}
    function = {"name": "add", "parameters": {"properties": properties, "required": ["a"]}}
    tools = f"<tools>\n{json.dumps({'type': 'function', 'function': function})}\n</tools>\n"
    assert answer("what?", None) == "red circle"
    assert answer("what?", "json") == answer(tools, "json") == '{"city": "Paris", "warm": true}'
    assert answer("as JSON", None).startswith("```json\n")
    assert answer("think", None).startswith("<think>")
    assert answer(tools + "both", "text").count('{"name": "add", "arguments": {"a": 21}}') == 2
    assert answer(tools + "<tool_response>", None) == "red circle"
    assert CITY == {"city": "Paris", "warm": True}
