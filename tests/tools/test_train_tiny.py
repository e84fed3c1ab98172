"""The recipe: a short run goes through all stages, goes on after it was ended, and touches only its own folder."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen3vl_disagg.assets import tiny_folder
from recipes.train_tiny import STAGES, Settings, main, make_optimizer, stage_steps, train
from tools.training import evaluate
from tools.training.saved import Saved, load_run, save_run

ROOT = Path(__file__).parents[2]
SMALL = ("--steps", "36", "--num-scenes", "2", "--evaluation-count", "6", "--save-every", "5", "--threads", "1")
START_S = 90.0


@pytest.fixture
def run(monkeypatch, capsys):
    """The recipe in this process: its lines on stderr. Of a wrong answer one token is generated, not all."""
    monkeypatch.setattr(evaluate, "MARGIN", -1000)
    threads = torch.get_num_threads()

    def call(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["train_tiny.py", *SMALL, *words])
        capsys.readouterr()
        main()
        return capsys.readouterr().err.splitlines()

    yield call
    torch.set_num_threads(threads)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_once_saved(state, *words):
    """Run the recipe until it has saved its state, at the end of the first stage or before, and kill it."""
    command = [sys.executable, str(ROOT / "recipes" / "train_tiny.py"), *SMALL, *words]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, cwd=state.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        end = time.monotonic() + START_S
        while not state.is_file():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


def test_a_run_that_is_killed_goes_on(tmp_path, run):
    packaged = contents(tiny_folder())
    out, state = tmp_path / "out", tmp_path / "state"
    words = ("--out", str(out), "--state", str(state))
    killed_once_saved(state, *words)
    first, *lines = run(*words)
    assert first.startswith(f"the run of {state} goes on with stage ")
    assert [line.partition(",")[0] for line in lines][-2:] == ["step 29/36", "step 36/36"]
    assert all(f"{form} " in lines[-1] for form in ("image first", "text first", "json"))
    assert "steps/s, 0 min left" in lines[-1]
    record = json.loads((out / "training.json").read_text())
    assert (record["steps"], record["resumed"]) == (36, 1)
    assert record["evaluation"]["count"] == 6
    forms = record["evaluation"]["forms"]
    assert [forms[name]["count"] for name in ("json", "json, key named")] == [6, 6]
    assert sum(form["count"] for name, form in forms.items() if "json" not in name) == 6
    assert set(record["evaluation"]["text_first"]) == {"all", *record["evaluation"]["kinds"]}
    assert set(contents(out)) == set(packaged)
    assert contents(tiny_folder()) == packaged

    given = Settings(out=tmp_path / "other", state=state, steps=36, num_scenes=2, threads=1)
    over = train(given)
    assert (over.stage, over.resumed) == (len(STAGES), 2)
    assert (given.out / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"'seed': 0.*'seed': 1"):
        train(replace(given, seed=1))


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
    assert [stage_steps(Settings(), number) for number in range(4)] == [3000, 2800, 1400, 1800]
    assert sum(stage_steps(Settings(steps=36), number) for number in range(4)) == 36
