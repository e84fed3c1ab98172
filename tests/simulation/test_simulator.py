"""The simulator: clean on the code as it is, deterministic, and not blind to any of the planted bugs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from random import Random

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.protocol.encode_sessions import EncodeSessions
from qwen3vl_disagg.protocol.router import Router
from tools.simulation.mutants import INVARIANTS, MUTANTS, Mutant, planted, swap
from tools.simulation.runner import (
    Result,
    fault_table,
    mutant_names,
    simulate,
    states_hit_by,
)
from tools.simulation.schedule import run_schedule
from tools.simulation.tables import read_table, static_rows, write_states
from tools.simulation.world import FAULTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "simulation.md"
BUG_TABLES = ("bugs", "bugs of the simulator")
NIGHTLY = bool(os.environ.get("Q3VL_ACCEPTANCE"))


def cli(*args: str) -> tuple[int, str, str]:
    command = [sys.executable, "tools/simulate.py", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_a_bar_where_somebody_looks_on_and_nothing_elsewhere():
    args = [sys.executable, "tools/simulate.py", "--schedules", "3", "--seed", "1"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        done = subprocess.run(args, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120, cwd=ROOT)
        os.close(theirs)
        shown = terminal.read(65536).decode()
    assert "3/3" in shown
    assert "schedule" in shown
    assert cli(*args[2:])[::2] == (0, "")
    assert done.stdout.startswith("3 schedules, ")


@pytest.mark.parametrize("seed", range(2))
def test_no_schedule_breaks_an_invariant(seed):
    result = simulate(300, seed)
    assert result.violation is None, f"{result.violation}\n{result.replay}"
    assert result.events > 100 * result.schedules
    assert result.answered > 1.5 * result.failed


@pytest.mark.parametrize("seed", [5, 17])
def test_a_seed_decides_everything(seed):
    assert run_schedule(Random(seed)) == run_schedule(Random(seed))


@pytest.mark.parametrize("name", mutant_names())
def test_every_planted_bug_breaks_the_invariant_that_it_names(name):
    # Where the docs say that it was found, else anywhere within 1,000 schedules.
    counts = {row[0]: row[-1] for table in BUG_TABLES for row in read_table(DOCS.read_text(), table)}
    first = int(counts[name].split(",")[0]) - 1 if name in counts else 0
    result = simulate(1, 0, name, first=first)
    if result.violation is None:
        result = simulate(1000, 0, name)
    assert result.violation is not None, f"only {dict(result.others)}"
    assert result.violation.invariant == MUTANTS[name].fires


def test_what_else_a_bug_breaks_does_not_count(monkeypatch):
    monkeypatch.setitem(MUTANTS, "two-results", dataclasses.replace(MUTANTS["two-results"], fires="I7"))
    result = simulate(5, 0, "two-results")
    assert (result.violation, set(result.others)) == (None, {"I14"})


def test_an_exception_counts_only_where_a_bug_says_so(monkeypatch):
    def raises():
        with swap(Router, "_tick", lambda self, now: [][0]):
            yield

    for fires, is_found in (("I11", False), ("raised", True)):
        monkeypatch.setitem(MUTANTS, "raises", Mutant("raises", fires, "", raises))
        assert (simulate(3, 0, "raises").violation is not None) == is_found


def test_the_planted_bugs_break_every_invariant_and_stand_for_every_failure_of_others():
    real = [mutant for mutant in MUTANTS.values() if not mutant.is_of_simulator]
    assert {mutant.fires for mutant in real} == set(INVARIANTS)
    assert {mutant.stands_for for mutant in real} == {"", *(f"F{n}" for n in range(1, 14))}


def functions():
    """Every function of the package's modules that run in a schedule: (module, place) -> what is there."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(("qwen3vl_disagg.", "tools.simulation.")):
            owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
            for owner in owners:
                for key, value in vars(owner).items():
                    if inspect.isfunction(value) or isinstance(value, property):
                        found[getattr(owner, "__module__", owner.__name__), owner.__name__, key] = value
    return found


@pytest.fixture(scope="module")
def before():
    return functions()


@pytest.mark.parametrize("name", mutant_names())
def test_a_bug_changes_production_code_without_changing_a_signature_and_is_undone(name, before):
    with planted(name):
        during = functions()
    changed = {place for place, value in during.items() if before[place] is not value}
    assert changed
    assert functions() == before
    for place in changed:
        old, new = [value.fget if isinstance(value, property) else value for value in (before[place], during[place])]
        expected, got = [
            [(p.name, p.kind, p.default) for p in inspect.signature(value).parameters.values()] for value in (old, new)
        ]
        assert got == expected, place
    is_of_simulator = {".simulation." in module for module, _, _ in changed}
    assert is_of_simulator == {MUTANTS[name].is_of_simulator}


def test_another_signature_is_refused():
    wrong = swap(EncodeSessions, "_fail", lambda self, item, kind, reason: None)
    with pytest.raises(TypeError, match=r"_fail takes .* what replaces it takes"), wrong:
        raise AssertionError("it was planted")


@pytest.mark.parametrize("table", BUG_TABLES)
def test_the_tables_of_planted_bugs_in_the_docs_are_not_stale(table):
    rows = read_table(DOCS.read_text(), table)
    assert [row[:-1] for row in rows] == static_rows(table), "write them anew: see the document"
    for *_, counts in rows:
        assert all(1 <= int(count) <= 1000 for count in counts.split(", "))


def test_the_tables_of_states_in_the_docs_are_not_stale():
    text = (ROOT / "docs" / "transfer.md").read_text()
    assert write_states(text) == text, "python -m tools.simulation.tables states docs/transfer.md"


def test_the_table_of_faults_in_the_docs_has_every_fault_and_state():
    def head_and_faults(text):
        lines = [re.split(r" *\| *", line) for line in text.splitlines() if line.startswith("| ")]
        start = next(index for index, cells in enumerate(lines) if cells[1] == "fault")
        return [lines[start], *(cells[1] for cells in lines[start + 1 : start + 1 + len(FAULTS)])]

    assert head_and_faults(DOCS.read_text()) == head_and_faults(fault_table(Result()))


def test_a_violation_prints_the_line_that_replays_it():
    status, out, err = cli("--schedules", "1000", "--seed", "3", "--mutant", "read-after-free", "--json")
    assert status == 1
    assert json.loads(out)["violations"] == 1
    [line] = re.findall(r"^replay: python tools/simulate.py (.*)$", err, re.MULTILINE)
    again = cli(*line.split(), "--json")
    assert again[0] == 1
    assert json.loads(again[1])["violation"] == json.loads(out)["violation"]


def test_the_command_counts_and_names():
    status, out, _ = cli("--schedules", "20", "--seed", "1", "--json")
    figures = json.loads(out)
    assert status == 0
    assert set(figures) == {"schedules", "events", "violations", "events_per_second"}
    assert (figures["schedules"], figures["violations"]) == (20, 0)
    status, out, _ = cli("--mutant", "list")
    assert (status, out.split()) == (0, mutant_names())
    assert cli("--mutant", "none-such")[0] == 2
    assert cli("--schedules", "0")[0] == 2


def test_an_unknown_bug_is_refused():
    with pytest.raises(InputError, match="no such bug"):
        simulate(1, 0, "none-such")


@pytest.mark.acceptance
@pytest.mark.skipif(not NIGHTLY, reason="set Q3VL_ACCEPTANCE to run the long ones")
@pytest.mark.parametrize("name", mutant_names())
def test_every_planted_bug_is_found_on_ten_seeds(name):
    assert all(simulate(1000, seed, name).violation is not None for seed in range(10))


@pytest.mark.acceptance
@pytest.mark.skipif(not NIGHTLY, reason="set Q3VL_ACCEPTANCE to run the long ones")
@pytest.mark.timeout(1800)
def test_every_fault_hits_every_state():
    result = simulate(60_000, 7)
    assert result.violation is None, result.replay
    for fault in FAULTS:
        for state in states_hit_by(fault):
            assert result.table[fault, state] > 0, (fault, state)
