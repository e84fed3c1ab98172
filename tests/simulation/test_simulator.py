"""The simulator: clean on the code as it is, deterministic, and not blind to any of the planted bugs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.disagg.simulation.mutants import MUTANTS
from qwen3vl_disagg.disagg.simulation.runner import ENCODE_STATES, LANGUAGE_STATES, mutant_names, simulate
from qwen3vl_disagg.disagg.simulation.schedule import run_schedule
from qwen3vl_disagg.disagg.simulation.world import FAULTS

NIGHTLY = bool(os.environ.get("Q3VL_ACCEPTANCE"))


def cli(*args: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "qwen3vl_disagg", "simulate", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("seed", range(3))
def test_no_schedule_breaks_an_invariant(seed):
    result = simulate(400, seed)
    assert result.violation is None, f"{result.violation}\n{result.replay}"
    assert result.events > 100 * result.schedules
    assert result.answered > 5 * result.failed


@pytest.mark.parametrize("seed", [5, 17])
def test_a_seed_decides_everything(seed):
    assert run_schedule(seed) == run_schedule(seed)


@pytest.mark.parametrize("name", mutant_names())
def test_every_planted_bug_is_noticed_and_undone(name):
    result = simulate(1000, 0, name)
    assert result.violation is not None
    assert simulate(20, 0).violation is None  # the bug is gone again


def test_the_planted_bugs_cover_every_invariant_and_every_failure_of_others():
    covered = {mark for mutant in MUTANTS.values() for mark in mutant.covers.split()}
    assert covered == {f"I{n}" for n in range(1, 17)} | {f"F{n}" for n in range(1, 14)}


def test_a_violation_prints_the_line_that_replays_it():
    status, out, err = cli("--schedules", "1000", "--seed", "3", "--mutant", "read-after-free", "--json")
    assert status == 1
    assert json.loads(out)["violations"] == 1
    [line] = re.findall(r"^replay: qwen3vl-disagg simulate (.*)$", err, re.MULTILINE)
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
def test_every_planted_bug_is_noticed_on_ten_seeds(name):
    assert all(simulate(1000, seed, name).violation is not None for seed in range(10))


@pytest.mark.acceptance
@pytest.mark.skipif(not NIGHTLY, reason="set Q3VL_ACCEPTANCE to run the long ones")
@pytest.mark.timeout(1800)
def test_every_fault_hits_every_state():
    result = simulate(60_000, 7)
    assert result.violation is None, result.replay
    for fault in FAULTS:
        states = ENCODE_STATES if fault == "kill-encode" else LANGUAGE_STATES if fault == "kill-language" else ()
        for state in states or (*LANGUAGE_STATES, *ENCODE_STATES):
            assert result.table[fault, state] > 0, (fault, state)
