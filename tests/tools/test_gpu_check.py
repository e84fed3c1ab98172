"""The GPU check: its plan, what becomes of steps that fail or hang, the report; whole, rehearsed on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tools import gpu_check
from tools.gpu_steps import machine, runner
from tools.gpu_steps.plan import STEPS, TOTAL_S, Step, chosen
from tools.gpu_steps.runner import NEEDS_GPU, run, table
from tools.gpu_steps.step import Check, main

ROOT = Path(__file__).parent.parent.parent


def test_all_steps_together_take_ten_minutes_at_most():
    assert TOTAL_S <= 600
    assert sum(step.limit_s for step in STEPS) <= TOTAL_S
    assert all(step.limit_s > 0 for step in STEPS)
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_each_step_is_a_function():
    for step in STEPS:
        module, _, function = step.work.partition(":")
        source = (ROOT / "tools" / "gpu_steps" / f"{module}.py").read_text()
        assert f"\ndef {function}(check: Check) -> None:" in source, step


def test_the_command_needs_nothing_but_the_standard_library():
    """What it installs is not there yet."""
    code = "import sys; sys.path.insert(0, '.'); import tools.gpu_check; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    assert not tops & {"torch", "tyro", "numpy", "qwen3vl_disagg"}


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """A folder whose `tools.gpu_steps.planted` has steps of their own kinds."""
    package = tmp_path / "tree" / "planted_steps"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "kinds.py").write_text(
        "import subprocess, sys, time\n"
        "def good(check):\n    check.say(speed=1.5)\n    check.needs_gpu('graph')\n"
        "def partly(check):\n"
        "    with check.part('first'):\n        raise ValueError('no such kernel')\n"
        "    check.say(second=2)\n"
        "def hangs(check):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    check.say(child=child.pid)\n    time.sleep(60)\n"
        "def dies(check):\n    check.say(before=1)\n    import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "tree"))
    return lambda name, limit_s=30.0: Step(name, f"planted_steps.kinds:{name}", limit_s, "a test")


def test_a_report_of_steps_that_pass_fail_hang_and_die(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "END_S", 1.0)
    plan = [steps("good"), steps("partly"), steps("hangs", 4.0), steps("dies")]
    outcomes = run(plan, tmp_path / "out", ["--dry-run"], {"host": "here"})
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "timed out", "failed"]
    good, partly, hangs, dies = outcomes
    assert good.found["speed"] == 1.5
    assert good.skipped == ["graph"]
    assert partly.errors == ["first: ValueError: no such kernel"]
    assert partly.found["second"] == 2, "a part that fails costs the step its success and nothing else"
    assert dies.found["before"] == 1, "what a step that died had found is there"
    assert hangs.seconds < 15
    assert not Path(f"/proc/{hangs.found['child']}").exists() or is_zombie(hangs.found["child"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["host"] == "here"
    assert [step["status"] for step in report["steps"]] == [outcome.status for outcome in outcomes]
    shown = table(outcomes)
    assert "4 steps: 1 passed, 2 failed, 1 timed out; 1 findings skipped: needs a GPU" in shown
    assert "no such kernel" in shown


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_report_is_complete_after_each_step(steps, tmp_path, monkeypatch):
    """A step that looks sees its predecessors in it."""
    seen = []
    write = runner.write_json

    def watched(path, value):
        seen.append([step["name"] for step in value["steps"]])
        write(path, value)

    monkeypatch.setattr(runner, "write_json", watched)
    run([steps("good"), steps("partly")], tmp_path / "out", ["--dry-run"], {})
    assert seen == [["good"], ["good", "partly"]]


def test_no_step_begins_when_the_time_is_over(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "TOTAL_S", 0.0)
    [outcome] = run([steps("good")], tmp_path / "out", ["--dry-run"], {})
    assert (outcome.status, outcome.found) == ("no time", {})


def test_a_step_says_what_it_was_given(tmp_path, monkeypatch):
    """On a GPU the part goes on."""
    result = tmp_path / "a.json"
    assert not Check(result, is_dry=True).needs_gpu("graph")
    assert json.loads(result.read_text()) == {"graph": NEEDS_GPU}
    check = Check(result, is_dry=False)
    assert check.needs_gpu("graph")
    assert check.device == "cuda"
    assert check.found == {}
    assert main(["no_such_module:work", "--result", str(result)]) == 1
    assert "ModuleNotFoundError" in json.loads(result.read_text())["step"]["error"]


def wheel(folder: Path, name: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "WORD = 'from the wheel'\n")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def test_only_what_the_machine_lacks_is_installed_and_where_steps_find_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "q3vl_never_there"), wheel(folder, "pytest")
    check = Check(tmp_path / "out" / "wheels.json", is_dry=True, wheels=folder)
    check.out.mkdir()
    machine.wheels(check)
    assert check.found["installed"] == ["q3vl_never_there-1.0-py3-none-any.whl"]
    code = "import q3vl_never_there as w; print(w.WORD)"
    env = {**os.environ, **runner.environment(check.out)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "from the wheel\n"


def test_a_machine_without_what_is_needed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(machine, "NEEDED", ("numpy", "q3vl_lacks"))
    with pytest.raises(RuntimeError, match="q3vl_lacks"):
        machine.wheels(Check(tmp_path / "wheels.json", is_dry=True))


def test_a_step_that_is_none_is_refused(capsys):
    with pytest.raises(ValueError, match="no step nothing"):
        chosen("machine,nothing")
    assert [step.name for step in chosen("tower,machine")] == ["machine", "tower"]
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nothing"])
    assert "no step nothing" in capsys.readouterr().err


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_the_rehearsal_passes(tmp_path):
    """From this tree, as on a machine with a GPU but for the device."""
    importlib.import_module("transformers")
    started = time.monotonic()
    command = [sys.executable, "tools/gpu_check.py", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=700, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert time.monotonic() - started < 600
    report = json.loads((tmp_path / "report.json").read_text())
    assert [step["name"] for step in report["steps"]] == [step.name for step in STEPS]
    assert {step["status"] for step in report["steps"]} == {"passed"}
    skipped = {name for step in report["steps"] for name, value in step["found"].items() if value == NEEDS_GPU}
    [capture] = [step["found"] for step in report["steps"] if step["name"] == "capture"]
    assert capture["graph_4"].keys() == {"rows", "step ms", "replay ms", "difference"}
    assert {"ipc", "float8_grouped", "kernels_1", "triton_1"} <= skipped
