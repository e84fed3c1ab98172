"""`qwen3vl-disagg plan`: what it prints and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import msgspec
import pytest

from qwen3vl_disagg.plan.hardware import BUILT_IN
from qwen3vl_disagg.plan.presets import PRESETS
from qwen3vl_disagg.plan.sizing import Workload, best, plan
from tests.plan.test_sizing_fit import TRUE, made_up
from tests.support.command import run_command


def run(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `qwen3vl-disagg plan *args`, in this process."""
    return run_command(monkeypatch, capsys, "plan", *args)


@pytest.fixture
def fitted(tmp_path):
    path = tmp_path / "measured.json"
    path.write_bytes(msgspec.json.encode(made_up(TRUE)))
    return path


def test_json_holds_every_split_and_the_terms_of_the_best(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "--preset", "30b-a3b", "--gpus", 8, "--json")
    assert status == 0
    found = json.loads(out)
    splits = plan(PRESETS["30b-a3b"], BUILT_IN["h200"], Workload(), 8)
    assert [one["split"] for one in found["splits"]] == [one.name for one in splits]
    assert found["shown"] == best(splits, Workload()).name
    for one, expected in zip(found["splits"], splits, strict=True):
        assert one["token_s"] == expected.token_s
        assert one["language_memory"] == expected.language_memory
        assert one["limited_by"] == expected.limited_by
    (shown,) = [one for one in found["splits"] if one["split"] == found["shown"]]
    assert sum(term["seconds"] for term in found["formulas"]["token"]) == pytest.approx(shown["token_s"])
    stages = found["formulas"]["first_token"]
    total = sum(term["seconds"] for terms in stages.values() for term in terms)
    assert total == pytest.approx(shown["first_token_s"])
    assert set(stages) == {"request", "images", "prefill"}


def test_the_answer_comes_first_and_is_short(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "--preset", "30b-a3b", "--gpus", 8)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 120
    splits = plan(PRESETS["30b-a3b"], BUILT_IN["h200"], Workload(), 8)
    chosen = best(splits, Workload())
    assert lines[0] == "30b-a3b, bfloat16, 8 ranks on h200: fits"
    assert lines[1] == f"{chosen.encode} encode rank + {chosen.language} language ranks: the best of 7 splits"
    assert (
        f"after {chosen.loaded_first_token_s * 1e3:.0f} ms, then one every {chosen.loaded_token_s * 1e3:.2f} ms" in out
    )
    assert f"{chosen.requests_s:.1f} requests/s, {chosen.tokens_s:,.0f} tokens/s" in out
    assert "not measured; --details" in lines[-1]


def test_what_does_not_fit_is_said_and_nothing_is_promised(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "--preset", "235b-a22b", "--gpus", 2)
    assert "2 ranks on h200: does not fit" in out
    assert "no split of so many ranks fits" in out
    [missing] = re.findall(r"of 131 GiB each; (\d+) GiB missing$", out, re.MULTILINE)
    [split] = json.loads(run(monkeypatch, capsys, "--preset", "235b-a22b", "--gpus", 2, "--json")[1])["splits"]
    assert float(missing) == pytest.approx(split["missing_bytes"] / 2**30, abs=1)
    assert "requests/s" not in out


def test_a_split_that_was_asked_for_beside_the_best_one(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "--preset", "30b-a3b", "--split", "6+2", "--requests-s", 50)
    assert "6 encode ranks + 2 language ranks: as asked for; the best of 7 splits is " in out
    assert "more requests arrive than that" in out
    assert "language ranks are the limit" in out


def test_ranks_that_share_a_machine_share_its_memory(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "--gpus", 4, "--hardware", "cpu")
    assert f"of {BUILT_IN['cpu'].memory_bytes * 2 / 2**30:.1f} GiB for all" in out


def test_details_show_each_split_and_the_formulas_with_their_values(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "--preset", "30b-a3b", "--split", "2+6", "--details")
    assert (status, err) == (0, "")
    for name in ("1+7", "*2+6", "7+1"):
        assert any(line.startswith(name) for line in out.splitlines()), name
    assert "not measured" in out
    experts = [line for line in out.splitlines() if "E_l (1 - (1 - K / E)^tokens)" in line]
    assert len(experts) == 2  # of the prefill and of a token
    for line in experts:
        assert re.search(r" \d+\.\d+ GB +3,096 GB/s of memory +\d+\.\d+$", line), line
    assert "experts of a layer on each language rank: 22, 22, 22, 22, 22, 18" in out
    for part in ("first token, loaded =", "longest gap =", "requests/s: encode =", "(2 x MoE layers + 1)"):
        assert part in out


def test_64_gpus_and_one_system_on_each_host(monkeypatch, capsys):
    many = ["--preset", "30b-a3b", "--gpus", 64, "--concurrency", 512]
    assert "One system on each host instead (--replicas 8)" in run(monkeypatch, capsys, *many)[1]
    _, out, _ = run(monkeypatch, capsys, *many, "--details")
    assert "One system on each host instead (--replicas 8)" in out
    assert "splits between these left out" in out
    rows = [line for line in out.splitlines() if "+" in line.split(" ")[0]]
    assert 8 < len(rows) < 20
    (hint,) = [line for line in out.splitlines() if "--replicas 8" in line]
    _, out, _ = run(monkeypatch, capsys, *many, "--replicas", 8, "--details")
    assert "8 such systems" in out
    assert "64 at once for each system" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("*")][:1]
    assert row[0].lstrip("*") in hint
    assert f"{row[-2]} requests/s" in hint


def test_the_small_checkpoint_bounds_its_images(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "--gpus", 4, "--hardware", "cpu", "--json")
    found = json.loads(out)
    assert (found["model"], found["dtype"]) == ("tiny", "float32")
    assert found["workload"]["visual_tokens"] <= 21  # at most 22,016 pixels, 1,024 for a token
    _, out, _ = run(monkeypatch, capsys, "--preset", "2b", "--image-size", "640x321", "--images", 2, "--json")
    assert json.loads(out)["workload"]["visual_tokens"] == 20 * 10
    _, out, _ = run(monkeypatch, capsys, "--preset", "2b", "--images", 0, "--json")
    assert json.loads(out)["splits"][0]["encode_requests_s"] is None  # no limit


def test_int8_and_a_machine_of_ones_own(monkeypatch, capsys, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**asdict(BUILT_IN["h200"]), "name": "mine", "bytes_s": 1e12}))
    args = ["--preset", "30b-a3b", "--json", "--hardware", path]
    plain = json.loads(run(monkeypatch, capsys, *args)[1])
    small = json.loads(run(monkeypatch, capsys, *args, "--quantize", "int8")[1])
    assert plain["hardware"]["name"] == "mine"
    experts = [one["splits"][1]["language_memory"]["experts"] for one in (plain, small)]
    assert experts[1] == pytest.approx(experts[0] / 2, rel=0.01)
    assert small["splits"][1]["token_s"] < plain["splits"][1]["token_s"]


def test_a_fit_predicts_what_it_has_not_seen(monkeypatch, capsys, fitted):
    status, out, _ = run(
        monkeypatch, capsys, "--fit", fitted, "--fit-on", "1+1", "--fit-on", "1+3", "--ranks", 6, "--json"
    )
    assert status == 0
    found = json.loads(out)
    assert (found["model"], found["dtype"]) == ("mid", "bfloat16")
    assert {one["split"] for one in found["compared"]} == {"2+4", "2+6"}
    assert all(0.99 < one["ratio"] < 1.01 for one in found["compared"])
    assert found["fitted_costs"]["exchange"] == pytest.approx(9e-4, rel=1e-3)
    _, out, _ = run(monkeypatch, capsys, "--fit", fitted, "--ranks", 6)
    assert "fitted on 1+1 and 1+3 and 2+4 and 2+6" in out
    assert "predicted" not in out  # nothing is left to compare with
    for flags in ([], ["--details"]):
        _, out, _ = run(
            monkeypatch, capsys, "--fit", fitted, "--fit-on", "1+1", "--fit-on", "1+3", "--ranks", 6, *flags
        )
        assert re.search(r"^2\+4 .* predicted|^split +predicted +measured +ratio$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpus", "1"], "1 ranks: must be 2"),
        (["--gpus", "many"], "many"),
        (["--preset", "7b"], "--preset 7b: must be one of 30b-a3b"),
        (["--preset", "2b", "--model", "x"], "--preset and --model: one of both"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--hardware", "abacus"], "--hardware abacus: one of h200, h100, cpu"),
        (["--hardware", "/no/such.json"], "No such file"),
        (["--image-size", "big"], "--image-size big: must be WxH"),
        (["--image-size", "0x10"], "must be WxH"),
        (["--preset", "2b", "--image-size", "10000x20"], "one side is more than 200 times the other"),
        (["--images", "-1"], "--images -1: must be at least 0"),
        (["--output-tokens", "0"], "--output-tokens 0"),
        (["--concurrency", "0"], "--concurrency 0"),
        (["--requests-s", "0"], "--requests-s 0.0"),
        (["--requests-s", "1", "--concurrency", "1"], "one of both"),
        (["--text-tokens", "9999"], "more than the context of 4096"),
        (["--split", "4+9"], "--split 4+9: must be E+L"),
        (["--replicas", "3"], "--replicas 3: must divide the 8 ranks"),
        (["--replicas", "8"], "1 ranks: must be 2"),
        (["--fit-on", "1+1"], "--fit-on goes with --fit"),
        (["--fit", "/no/such.json"], "No such file"),
        (["--quantize", "float8"], "float8"),
        (["--dispatch", "carrier-pigeon"], "carrier-pigeon"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_bad_arguments_exit_with_two_and_no_traceback(monkeypatch, capsys, args, message):
    status, out, err = run(monkeypatch, capsys, *args)
    assert status == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"name": "x", "colour": 1}', "no fields colour"),
        ('{"name": "x"}', "missing required field"),
        ('{"name": 1}', "Expected `str`"),
        ("[]", "Expected `object`"),
        (json.dumps({**asdict(BUILT_IN["h200"]), "bytes_s": 0}), "bytes_s is 0"),
        (json.dumps({**asdict(BUILT_IN["h200"]), "hop_s": -1}), "hop_s is -1"),
    ],
)
def test_a_bad_machine_file_is_said_by_name(monkeypatch, capsys, tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    status, out, err = run(monkeypatch, capsys, "--hardware", path)
    assert (status, out) == (2, "")
    assert message in err
    assert str(path) in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "2b"], "the model is that of --fit"),
        (["--dtype", "float32"], "--dtype and --quantize are those of --fit"),
        (["--hardware", "h200"], "not the kind of machine that was measured"),
        (["--fit-on", "1+1"], "at least two splits"),
        (["--fit-on", "1+1", "--fit-on", "3+3"], "no split 3+3 was measured"),
    ],
)
def test_what_does_not_go_with_a_fit(monkeypatch, capsys, fitted, args, message):
    status, out, err = run(monkeypatch, capsys, "--fit", fitted, *args)
    assert (status, out) == (2, "")
    assert message in err
