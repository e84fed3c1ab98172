"""The bench of splits: what it asks, what it records, and one short run of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3vl_disagg.plan.fit import read_measurements
from tools import bench_split
from tools.bench_split import Contents, Load, Records, Seen, parse_split, splits

ROOT = Path(__file__).parent.parent.parent


def test_splits_by_name():
    assert parse_split("2+6") == (2, 6)
    for given in ("26", "0+3", "2+0", "2+6+1", "-1+3", "a+b", "2 + 6", ""):
        with pytest.raises(SystemExit, match="must be like 1\\+3"):
            parse_split(given)


def test_nothing_is_asked_twice():
    first, second = Contents(1), Contents(2)
    numbers = [*(first() for _ in range(1000)), *(second() for _ in range(1000))]
    assert len(set(numbers)) == 2000


def test_requests_at_once_follow_the_language_ranks():
    load = Load((8,), (), 8, 8, (2, 4))
    assert load.concurrencies(1) == [1, 2, 4]
    assert load.concurrencies(3) == [1, 2, 3, 4, 6]


def test_a_split_is_the_medians_of_its_rounds():
    records = Records(1, 3, other_cores=[0.1, 0.4])
    decode = records.decode[3] = Seen({"concurrency": 3, "prompt_tokens": 30, "new_tokens": 48})
    first = records.first_token["words", 8] = Seen({"images": 0, "visual_tokens": 0, "text_tokens": 30})
    for value in (9.0, 1.0, 2.0):
        decode.add(token_ms=value, tokens_s=10 * value)
        first.add(ms=100 * value)
    split = records.measured()
    assert (split.name, split.other_cores) == ("1+3", 0.4)
    assert (split.decode[0].token_ms, split.decode[0].tokens_s, split.first_token[0].ms) == (2.0, 20.0, 200.0)
    assert split.first_token[0].encode_ms == 0


def test_a_disturbed_round_is_done_again(monkeypatch):
    seen = iter([1.5, 0.9, 0.1, 2.0, 2.0, 2.0, 2.0, 2.0])

    def run_split(turn: Records, *_: object) -> float:
        others = next(seen)
        turn.other_cores.append(others)
        turn.decode[1] = Seen({"concurrency": 1, "prompt_tokens": 9, "new_tokens": 8})
        turn.decode[1].add(token_ms=others, tokens_s=1.0)
        return others

    monkeypatch.setattr(bench_split, "run_split", run_split)
    records, load = Records(1, 1), Load((8,), (), 8, 8, ())
    bench_split.run_turn(records, [], load, Contents(1), most_others=0.2)
    assert (records.other_cores, records.decode[1].values["token_ms"]) == ([0.1], [0.1])
    bench_split.run_turn(records, [], load, Contents(1), most_others=0.2)  # never quiet: the last one counts
    assert records.decode[1].values["token_ms"] == [0.1, 2.0]
    assert next(seen, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ("1+1", "1+x")}, "--splits 1\\+x: must be like 1\\+3"),
        ({"splits": ("1+1",)}, "a fit needs two of the splits 1\\+1"),
        ({"fit_on": ("1+1", "5+5")}, "got 1\\+1, 5\\+5"),
        ({"fit_on": ("1+1",)}, "got 1\\+1"),
        ({"rounds": 0}, "at least one round"),
        ({"words": (0,)}, "at least one round"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(SystemExit, match=message):
        splits(**options)


@pytest.mark.slow
def test_two_splits_are_measured_and_fitted(tmp_path):
    out = tmp_path / "measured.json"
    args = ["--splits", "1+1", "1+2", "--rounds", 1, "--new-tokens", 12, "--words", 8, 48, "--concurrency", 2]
    args += ["--image-sides", 128, "--out", out, "--json"]
    command = [sys.executable, str(ROOT / "recipes" / "bench.py"), "splits", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bench"] == "splits"
    assert {"cpu", "cores", "torch", "date", "load"} <= set(result["machine"])
    measured, config = read_measurements(out)
    assert [split.name for split in measured.splits] == ["1+1", "1+2"]
    assert config.text.num_experts == 12
    for split in measured.splits:
        assert {one.concurrency for one in split.decode} == {1, 2, split.language, 2 * split.language}
        text, longer, image = split.first_token
        assert (text.images, longer.images, image.images) == (0, 0, 1)
        assert longer.text_tokens > text.text_tokens
        assert (text.encode_ms, image.visual_tokens) == (0, 16)
        assert image.encode_ms > 0
        assert image.ms > image.preprocess_ms + image.encode_ms + image.transfer_ms
