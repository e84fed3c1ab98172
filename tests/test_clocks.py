"""Nothing of the package waits, or decides what is late, by a clock that somebody may set: an hour forth or back
changes what is written into answers and logs, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WALL = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.strftime"}
WALL |= {f"datetime.datetime.{name}" for name in ("now", "utcnow", "today", "fromtimestamp")} | {"datetime.date.today"}
WALL |= {"time.CLOCK_REALTIME", "time.CLOCK_TAI"}
ALLOWED = {
    "core/logs.py": "the time of a line",
    "processing/template.py": "`strftime_now` of templates",
    "serving/app.py": "`created` of the model",
    "serving/chat.py": "`created`",
    "serving/completions.py": "`created`",
    "serving/pooling.py": "`created`",
    "serving/responses.py": "`created_at`, `completed_at`",
    "serving/stream.py": "`created`",
    "train_tiny.py": "the date of a training",
    "serving/trace.py": "the date at which a trace begins",
    "transport/tls.py": "a warning that a certificate ends soon",
}
"""File -> what the date is for."""


def wall_clocks(source: str) -> list[tuple[int, str]]:
    """(line, name) of each use, called or not."""
    tree, found, names = ast.parse(source), list[tuple[int, str]](), dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            first, *rest = ast.unparse(node).split(".")
            name = ".".join([names.get(first, "?"), *rest])
            found += [(node.lineno, name)] if name in WALL else []
    return found


def files() -> dict[str, Path]:
    folders = [ROOT / "qwen3vl_disagg", ROOT / "recipes"]
    return {path.relative_to(folder).as_posix(): path for folder in folders for path in sorted(folder.rglob("*.py"))}


def test_dates_are_for_people_alone():
    used = {name: wall_clocks(path.read_text()) for name, path in files().items()}
    others = {name: found for name, found in used.items() if found and name not in ALLOWED}
    assert others == {}, "time.monotonic() does not jump"
    assert [name for name in ALLOWED if not used.get(name)] == []


def test_a_date_is_only_written_down():
    """Where it is allowed, it goes into a field or a text: it is compared with nothing, and nothing is added to it."""
    for name in ALLOWED:
        tree = ast.parse(files()[name].read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Compare, ast.While, ast.If)):
                tests = [node] if isinstance(node, ast.Compare) else [node.test]
                for test in tests:
                    assert not wall_clocks("import time\nfrom datetime import datetime\n" + ast.unparse(test)), name


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time\nend = time.time() + 5", [(2, "time.time")]),
        ("import time as t\nt.time_ns()", [(2, "time.time_ns")]),
        ("from time import time\nf(default=time)", [(2, "time.time")]),
        ("from datetime import datetime\ndatetime.now()", [(2, "datetime.datetime.now")]),
        ("import datetime\ndatetime.datetime.utcnow()", [(2, "datetime.datetime.utcnow")]),
        ("import time\ntime.monotonic(); time.sleep(1); time.perf_counter()", []),
        ("import torch\ntorch.time.time()", []),
    ],
)
def test_uses_are_found(source, found):
    assert wall_clocks(source) == found
