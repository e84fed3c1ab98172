"""The trial of clients: what a script's checks become, and which scripts there are. No client is installed here."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from tests.support.scripted_server import CITY, answer
from tools.acceptance import run
from tools.acceptance.catalogue import CLIENTS, FEATURES, Client
from tools.acceptance.run import Cell, fits, main, prepare, run_script, scripted, table, try_client, version

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


@pytest.mark.parametrize("text", ["", "run({})", "run({'chat': lambda: os._exit(0), 'n = 2': int})"])
def test_a_script_without_its_cells_is_wrong(tmp_path, script, told, text):
    environment(tmp_path / "env" / "a")
    _, wrong = try_client(script("import os\n" + text), tmp_path / "env", told)
    assert wrong[0].startswith("a: (the script): 0 cells")


def test_a_script_of_whom_nothing_is_asked_has_no_cells(tmp_path, script, told):
    environment(tmp_path / "env" / "a")
    only = told | {"ACCEPTANCE_ONLY": "n = 2"}
    assert try_client(script("run({'chat': int})"), tmp_path / "env", only) == ({}, [])


def test_fits():
    assert fits("y", "y")
    assert fits("401 invalid_api_key", "401 invalid_api_key")
    assert fits("401", "401 invalid_api_key")
    for result in ("400", "401 other", "wrong", "", "y"):
        assert not fits(result, "401 invalid_api_key")
    assert not fits("401", "y")


def test_a_dead_environment_is_one_line(tmp_path, monkeypatch):
    client = Client("a", "a.py", ("a",))
    monkeypatch.setattr(run, "install", lambda *_: None)
    ready, [line] = prepare([client], tmp_path)
    assert ready == {}
    assert line.startswith(f"a: no environment at {tmp_path / 'a'}: ")
    assert "\n" not in line


def test_a_node_client_s_heading_has_what_was_asked_for_as_newest(tmp_path):
    for name, number in (("ai", "7.0.1"), ("@ai-sdk/openai", "4.0.2"), ("zod", "4.0.0"), ("node", "24.0.0")):
        (tmp_path / "node_modules" / name).mkdir(parents=True)
        (tmp_path / "node_modules" / name / "package.json").write_text(json.dumps({"version": number}))
    client = Client("ai-sdk", "ai.mjs", ("ai@latest", "@ai-sdk/openai@latest", "zod", "node@24"))
    assert version(client, tmp_path) == "ai-sdk 7.0.1, @ai-sdk/openai 4.0.2"


def test_environments_are_made_side_by_side_and_stay_in_order(tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=10)
    monkeypatch.setattr(run, "install", lambda *_: both.wait())
    monkeypatch.setattr(run, "version", lambda client, _: client.name)
    clients = [Client(name, "a.py", (name,)) for name in ("b", "a")]
    ready, wrong = prepare(clients, tmp_path)
    assert (list(ready), wrong) == (["b", "a"], [])


def test_a_scripted_server_that_dies_is_told(tmp_path, monkeypatch):
    for name in ("tests", "tests/support"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "tests" / "support" / "scripted_server.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(run, "REPO", tmp_path)
    with pytest.raises(RuntimeError, match=r"did not come up .*exit 3"), scripted(tmp_path):
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "dance"], "no feature has 'dance'"),
        (["--write", "x.md", "llm"], "--write puts the whole table"),
        (["--write", "x.md", "--only", "chat"], "--write puts the whole table"),
        (["--write", "not-there.md"], "--write: "),
    ],
)
def test_options_that_are_refused(options, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_page_has_the_features_in_their_order():
    page = (Path(__file__).parent.parent.parent / "docs" / "clients.md").read_text()
    rows = page.partition("<!-- table: clients -->")[2].partition("<!-- end -->")[0].strip().splitlines()[2:]
    assert tuple(row.split("|")[1].strip() for row in rows) == FEATURES


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
