"""The engine benchmark: what it plans, keeps and says, and one run with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench_ceilings import Rates
from tools.bench_contestants.client import Answer, ContestantError, Process
from tools.bench_contestants.worker import Setup
from tools.bench_engine import check, draw, environment, make_folder, report, weight_bytes
from tools.bench_engine_plan import Plan, Record, take
from tools.bench_machine import cpu_seconds, family, memory
from tools.checkpoints import RANDOM_PRESETS

ROOT = Path(__file__).parent.parent.parent
CONFIG = RANDOM_PRESETS["tiny-random"]
PLAN = Plan(batches=(1, 4), prompt_tokens=5, new_tokens=8, prefill_tokens=20, image_side=64, rounds=2)


def test_a_round_measures_everything_and_no_prompt_comes_twice():
    rounds = [list(PLAN.commands(CONFIG, number)) for number in (0, 1)]
    assert [name for name, _ in rounds[0]] == ["decode 1", "decode 4", "prefill", "image"]
    commands = dict(rounds[0])
    assert [len(of) for of in commands.values()] == [1, 1, 2, 2]
    assert [len(prompt) for prompt in commands["decode 4"][0]["prompts"]] == [5] * 4
    assert [len(one["prompt"]) for one in commands["prefill"]] == [20, 20]
    assert [one["grid"] for one in commands["image"]] == [(1, 4, 4)] * 2
    every = [one for of_round in rounds for _, of in of_round for one in of]
    prompts = [tuple(p) for one in every for p in one.get("prompts", [])]
    prompts += [tuple(one["prompt"]) for one in every if one["do"] == "prefill"]
    assert len(set(prompts)) == len(prompts) == 2 * (5 + 2)
    seeds = [one["seed"] for one in every if one["do"] == "vision"]
    assert len(set(seeds)) == 4
    assert all(token < CONFIG.vision_start_token_id - 9 for prompt in prompts for token in prompt)
    assert list(PLAN.commands(CONFIG, 1)) == rounds[1]


def test_figures_have_their_units():
    assert PLAN.figure("decode 4", 0.5) == 8
    assert PLAN.figure("prefill", 0.5) == 40
    assert PLAN.figure("image", 0.5) == 500
    assert PLAN.measured("decode 1", [[0.0, 0.5, 1.0]]) == 2


def test_a_ceiling_falls_with_the_rates_and_rises_with_smaller_weights():
    fast, slow = (PLAN.ceilings(CONFIG, 2, Rates(rate, rate)) for rate in (2e9, 1e9))
    assert fast["decode 1"] == pytest.approx(2 * slow["decode 1"])
    assert slow["image"] == pytest.approx(2 * fast["image"])
    small = PLAN.ceilings(CONFIG, 1, Rates(1e9, 1e15))
    assert small["decode 1"] > PLAN.ceilings(CONFIG, 2, Rates(1e9, 1e15))["decode 1"]


def test_rates_are_the_best_that_was_seen():
    record = Record({}, {"read a": [3.0, 4.0], "read b": [5.0, 1.0], "matmul float32": [7.0, 9.0]})
    assert record.best_rates("float32") == Rates(5e9, 9e9)


def some_result():
    records = {name: Record({"torch": "x"}) for name in ("this", "transformers")}
    for number in range(2):
        for name, record in records.items():
            step = (1 + number) * (0.1 if name == "this" else 0.2)
            for measurement in ("decode 1", "decode 4"):
                batch = int(measurement.split()[1])
                stamps = [[step * i for i in range(9)]] * batch
                take(PLAN, record, measurement, Answer(stamps, 2.0, 1.5, 0.25, 0.0))
            take(PLAN, record, "prefill", Answer(step, 1.0, 0.75, 0.25, 0.5))
            take(PLAN, record, "image", Answer(step, 1.0, 0.75, 0.25, 0.5))
            record.note_memory({"private": 10**6 * (number + 1), "peak": 3 * 10**6})
    ceilings = {"decode 1": 20.0, "decode 4": 80.0, "prefill": 400.0, "image": 50.0}
    return {
        "machine": {"cpu": "a CPU", "cores": 2, "date": "today", "torch": "2.13.0", "load": [0, 0, 0]},
        "model": "m",
        "dtype": "bfloat16",
        "threads": 2,
        "wait": "default",
        "rounds": 2,
        "prompt_tokens": 5,
        "new_tokens": 8,
        "prefill_tokens": 20,
        "image_side": 64,
        "rates": {"read_gb_s": 30.0, "matmul_gflop_s": 500.0},
        "ceiling": ceilings,
        "contestants": {name: record.summary(ceilings) for name, record in records.items()},
        "left_out": {"vllm": "not here"},
    }


def test_a_summary_has_medians_and_parts_of_the_ceiling():
    this = some_result()["contestants"]["this"]
    assert this["median"] == pytest.approx({"decode 1": 7.5, "decode 4": 30, "prefill": 150, "image": 150})
    assert this["of_ceiling"] == pytest.approx({"decode 1": 0.375, "decode 4": 0.375, "prefill": 0.375, "image": 1 / 3})
    assert (this["cores"], this["idle_cores"]) == (pytest.approx(1.25), 0.25)
    assert this["other_cores"] == pytest.approx(1 / 6)
    assert (this["private_mb"], this["peak_mb"]) == (2, 3)


def test_the_report_says_all(tmp_path):
    text = report(some_result())
    assert "| this | 8 (38%) | 30 (38%) | 150 (38%) | 150 (33%) |" in text
    assert "| ceiling | 20 | 80 | 400 | 50 |" in text
    assert "| this | 1.25 | 0.25 | 0.17 | 2 MB | 3 MB |" in text
    assert "Left out: vllm: not here" in text
    assert draw(some_result(), tmp_path / "new").stat().st_size > 10_000


def test_int8_has_a_ceiling_of_its_own():
    assert weight_bytes(RANDOM_PRESETS["mid"], {}) == 2
    assert weight_bytes(CONFIG, {"quantize": "none"}) == 4
    assert weight_bytes(CONFIG, {"quantize": "int8"}) == 1


@pytest.mark.parametrize(
    "change", [{"rounds": 0}, {"batches": ()}, {"batches": (0,)}, {"new_tokens": 2}, {"prompt_tokens": 0}]
)
def test_what_cannot_be_measured(change):
    plan = Plan(**{**PLAN.__dict__, **change})
    with pytest.raises(SystemExit):
        check(["this"], plan, None, "mid")


def test_presets_that_are_not_there():
    check(["this"], PLAN, None, "30b-a3b")
    with pytest.raises(SystemExit, match=r"--preset nope: one of tiny-random.*30b-a3b"):
        check(["this"], PLAN, None, "nope")


def test_a_published_shape_gets_a_folder_without_weights(tmp_path):
    assert make_folder("2b", tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert (tmp_path / "model.safetensors").stat().st_size < 1000


def test_what_a_contestant_finds_in_its_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    setup, python = Setup(folder="x", threads=1), tmp_path / "bin" / "python"
    env = environment("this", setup, python)
    assert env["OMP_NUM_THREADS"] == "1"
    assert not {"OMP_WAIT_POLICY", "LD_PRELOAD"} & set(env)
    assert environment("this", setup, python, "passive")["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert environment("this", setup, python, "passive")["OMP_WAIT_POLICY"] == "ACTIVE"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    assert environment("vllm-compiled", setup, python)["LD_PRELOAD"] == str(tmp_path / "lib" / "libiomp5.so")
    assert "LD_PRELOAD" not in environment("transformers", setup, python)
    assert len(environment("vllm", setup, python)["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == 1


TOY = """
import os, sys, time
from tools.bench_contestants.worker import serve

class Toy:
    def __init__(self, setup):
        self.setup = setup
        if setup.compile == "on":
            raise RuntimeError("no compiler")
        print("noise on stdout")
        os.system("echo noise of a child")

    def facts(self):
        return {"folder": self.setup.folder}

    def add(self, x, y):
        return x + y

    def end(self):
        sys.exit(3)

serve(Toy)
"""


def toy(**changes):
    return Process("toy", [sys.executable, "-c", TOY], Setup(folder="f", **changes), dict(os.environ))


def test_a_contestant_answers_whatever_its_libraries_print():
    process = toy()
    try:
        facts = process.wait_loaded(20)
        assert (facts["folder"], set(facts)) == ("f", {"folder", "load_s"})
        assert process.ask(20, do="add", x=2, y=3) == 5
        with pytest.raises(ContestantError, match="toy: TypeError"):
            process.ask(20, do="add", x=2, y=None)
        assert process.ask(20, do="add", x=1, y=1) == 2
        assert "noise of a child" in process.last_words()
        assert process.process.pid in family(process.process.pid)
        assert process.memory()["private"] > 1e6
        with pytest.raises(ContestantError, match="toy: ended with status 3"):
            process.ask(20, do="end")
    finally:
        process.close()
    assert process.process.poll() is not None


def test_a_contestant_that_does_not_load():
    process = toy(compile="on")
    try:
        with pytest.raises(ContestantError, match="toy: RuntimeError: no compiler"):
            process.wait_loaded(20)
    finally:
        process.close()


def test_processes_that_are_gone_use_nothing():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait(20)
    assert cpu_seconds({child.pid}) == 0
    assert memory({child.pid}) == {"private": 0, "peak": 0}


@pytest.mark.slow
def test_a_run_with_a_tiny_model():
    command = [sys.executable, str(ROOT / "recipes" / "bench.py"), "engine", "--json", "--preset", "tiny-random"]
    command += ["--rounds", "1", "--contestants", "this", "vllm", "llama.cpp", "--batches", "1", "2", "--threads", "1"]
    command += ["--prompt-tokens", "8", "--new-tokens", "4", "--prefill-tokens", "16", "--image-side", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert set(result["contestants"]) == {"this"}
    assert "--vllm-python" in result["left_out"]["vllm"]
    assert "--llama-cpp" in result["left_out"]["llama.cpp"]
    this = result["contestants"]["this"]
    assert set(this["median"]) == set(result["ceiling"]) == {"decode 1", "decode 2", "prefill", "image"}
    assert all(value > 0 for value in this["median"].values())
    assert 0 < result["rates"]["read_gb_s"] < 1e5
    assert this["private_mb"] > 10
