"""The road's figures from hand-made times; commands of other servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3vl_disagg.core.errors import InputError
from tools.bench_load import Stream, take
from tools.bench_road import command_of, report, road, summary

CLOSED = {"requests_s": 2.0, "first_token_ms": [10.0, 30.0, 20.0], "gaps_ms": [1.0, 9.0]}


def test_rates_are_medians_of_rounds_and_times_percentiles_of_all():
    found = summary([CLOSED, {**CLOSED, "requests_s": 4.0, "first_token_ms": [40.0]}, {**CLOSED, "requests_s": 9.0}])
    assert found["requests_s"] == 4.0
    assert found["first_token_p50_ms"] == 20.0
    assert found["first_token_max_ms"] == 40.0
    assert found["gaps_p99_ms"] == 9.0


def test_a_report_has_a_table_for_each_part_and_a_row_for_each_server():
    servers = {"split": {"closed 4": summary([CLOSED])}, "other": {"closed 4": summary([{**CLOSED, "gaps_ms": []}])}}
    machine = {"cpu": "c", "cores": 2, "torch": "t", "date": "d", "load": [0.0]}
    left_out = {"llama.cpp": "no build"}
    text = report({"machine": machine, "model": "mid", "rounds": 1, "servers": servers, "left_out": left_out})
    assert "| split | 2.00 | 20 | 1 | 9 | 9 |" in text
    assert "| other | 2.00 | 20 | nan | nan | nan |" in text
    assert text.endswith("Left out: llama.cpp: no build")


def test_another_server_s_command_gets_port_and_model():
    assert command_of("v", {"v": "serve '{model}' --port {port}"}, 81, Path("/a b")) == [
        "serve",
        "/a b",
        "--port",
        "81",
    ]
    assert command_of("split", {}, 81, Path("m"))[-2:] == ["--port=81", "--model=m"]


def test_servers_that_know_no_token_ids_are_counted_by_pieces_of_text():
    stream = Stream(0.0)
    for event in (b'{"delta": {"role": "assistant"}}', b'{"delta": {"content": "a b"}}', b'{"delta": {"content": ""}}'):
        take(b'{"choices": [' + event + b"]}", stream)
    assert len(stream.stamps) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"contestants": ("both",)},
        {"other": ("vllm",)},
        {"other": ("split=serve",)},
        {"other": ("llama.cpp=serve",)},
        {"rounds": 0},
        {"rate": 0.0},
        {"seconds": 0.01},
    ],
)
def test_what_cannot_be_measured_is_said(options):
    with pytest.raises(InputError):
        road(**options)
