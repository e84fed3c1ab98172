"""The recipe: a short run goes through all stages, goes on after it was ended, and touches only its own folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen3vl_disagg.assets import tiny_folder
from recipes.train_tiny import STAGES, Settings, make_optimizer, stage_steps
from tools.training.saved import Saved, load_run, save_run

ROOT = Path(__file__).parents[2]
SMALL = ("--steps", "36", "--num-scenes", "4", "--evaluation-count", "6", "--save-every", "5", "--threads", "1")


def command(*words):
    return [sys.executable, str(ROOT / "recipes" / "train_tiny.py"), *SMALL, *words]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_is_killed_goes_on(tmp_path):
    packaged = contents(tiny_folder())
    out, state = tmp_path / "out", tmp_path / "state"
    words = ("--out", str(out), "--state", str(state))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    for line in first.stderr:  # the line of a stage's end, which is saved behind it
        if line.startswith("step 15/36, stage 1, "):
            break
    else:
        pytest.fail("no line at the end of the first stage")
    while not state.is_file():
        assert first.poll() is None
    first.kill()
    first.communicate()
    again = subprocess.run(command(*words), capture_output=True, text=True, cwd=tmp_path, env=env, timeout=200)
    assert again.returncode == 0, again.stderr
    assert "goes on with stage " in again.stderr
    lines = [line for line in again.stderr.splitlines() if line.startswith("step ")]
    assert [line.partition(",")[0] for line in lines][-2:] == ["step 29/36", "step 36/36"]
    assert all(f"{form} " in lines[-1] for form in ("image first", "text first", "json"))
    assert "steps/s, 0 min left" in lines[-1]
    record = json.loads((out / "training.json").read_text())
    assert (record["steps"], record["resumed"]) == (36, 1)
    assert record["evaluation"]["count"] == 6
    forms = record["evaluation"]["forms"]
    assert [forms[name]["count"] for name in ("json", "json, key named")] == [6, 6]
    assert sum(form["count"] for name, form in forms.items() if "json" not in name) == 12
    assert set(record["evaluation"]["text_first"]) == {"all", *record["evaluation"]["kinds"]}
    assert set(contents(out)) == set(packaged)
    assert contents(tiny_folder()) == packaged
    other = subprocess.run(command(*words, "--seed", "1"), capture_output=True, text=True, env=env, timeout=100)
    assert other.returncode == 1
    assert "'seed': 0" in other.stderr
    assert "'seed': 1" in other.stderr


def test_what_is_saved_is_what_is_loaded(tmp_path):
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, fresh = make_optimizer(model, Settings()), make_optimizer(other, Settings())
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    run = Saved({"steps": 9}, stage=1, step=3, losses=[1.0, 0.5], form_losses={"json": 0.1})
    save_run(tmp_path / "state", model, optimizer, run)
    found = load_run(tmp_path / "state", other, fresh, {"steps": 9})
    assert (found.stage, found.step, found.losses, found.form_losses) == (1, 3, [1.0, 0.5], {"json": 0.1})
    assert found.resumed == 1
    for each, trained in ((model, optimizer), (other, fresh)):
        trained.zero_grad()
        each(torch.ones(1, 3)).sum().backward()
        trained.step()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)
    with pytest.raises(SystemExit, match="is of a run with"):
        load_run(tmp_path / "state", other, fresh, {"steps": 8})
    (tmp_path / "state").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="is no state"):
        load_run(tmp_path / "state", other, fresh, {"steps": 9})


@pytest.mark.parametrize("stage", STAGES)
def test_the_learning_rate_rises_and_falls(stage):
    rates = [stage.learning_rate(step, 1000) for step in range(1000)]
    top = max(range(1000), key=rates.__getitem__)
    assert rates[top] == pytest.approx(stage.peak, rel=1e-3)
    assert top == pytest.approx(100 / stage.cycle, abs=1)
    assert rates[0] == pytest.approx(stage.peak / 25, rel=1e-2)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < (1e-4 if stage.cycle == 1 else 0.6) * stage.peak


def test_stages_share_all_steps():
    assert [stage_steps(Settings(), number) for number in range(3)] == [3000, 2800, 1400]
    assert sum(stage_steps(Settings(steps=36), number) for number in range(3)) == 36
