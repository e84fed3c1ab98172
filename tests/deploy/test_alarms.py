"""Rules for Prometheus, and what docs/operations.md says of them: metrics that exist; each rings when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.support.deploy import DEPLOY
from tests.support.fake_backend import FakeBackend, serve
from tests.support.server import REPO

RULES = DEPLOY / "prometheus-alarms.yml"
ALARMS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
PAGE = (REPO / "docs" / "operations.md").read_text()
METRIC = re.compile(r"\bq3vl_[a-z0-9_]+")
QUIET = {
    "q3vl_ready": "1x120",
    'q3vl_rank_up{role="encode", rank="0"}': "1x120",
    'q3vl_engine_steps_total{role="language", rank="1"}': "0+50x120",
    'q3vl_num_requests_running{role="language", rank="1"}': "3x120",
    'q3vl_http_requests_total{path="/v1/chat/completions", status="200"}': "0+600x120",
    'q3vl_request_success_total{finished_reason="stop"}': "0+600x120",
    'q3vl_num_preemptions_total{role="language", rank="1"}': "0+1x120",
    'q3vl_time_to_first_token_seconds_bucket{le="1.2"}': "0+600x120",
    'q3vl_time_to_first_token_seconds_bucket{le="+Inf"}': "0+600x120",
    'q3vl_encoder_queue_wait_seconds_bucket{encode_rank="0", le="0.3"}': "0+600x120",
    'q3vl_encoder_queue_wait_seconds_bucket{encode_rank="0", le="+Inf"}': "0+600x120",
    'q3vl_encoder_queue_wait_seconds_sum{encode_rank="0"}': "0+60x120",
    'q3vl_encoder_model_forward_seconds_sum{encode_rank="0"}': "0+60x120",
}
"""A job where all is well, a value each minute."""
WORSE: dict[str, dict[str, str]] = {
    "NoJobReady": {"q3vl_ready": "0x120"},
    "JobNotReady": {"q3vl_ready": "1x60 _x60"},
    "RankMissing": {'q3vl_rank_up{role="encode", rank="0"}': "0x120"},
    "LanguageRankStands": {'q3vl_engine_steps_total{role="language", rank="1"}': "500x120"},
    "OurFault": {'q3vl_http_requests_total{path="/v1/chat/completions", status="500"}': "_x85 1x35"},
    "Refusing": {'q3vl_http_requests_total{path="/v1/chat/completions", status="429"}': "0+30x120"},
    "Unavailable": {'q3vl_http_requests_total{path="/v1/chat/completions", status="503"}': "0+30x120"},
    "FirstTokenLate": {
        'q3vl_time_to_first_token_seconds_bucket{le="1.2"}': "0+300x120",
        'q3vl_time_to_first_token_seconds_bucket{le="20.0"}': "0+600x120",
    },
    "EncodersBehind": {
        'q3vl_encoder_queue_wait_seconds_bucket{encode_rank="0", le="0.3"}': "0+300x120",
        'q3vl_encoder_queue_wait_seconds_bucket{encode_rank="0", le="5.0"}': "0+600x120",
        'q3vl_encoder_queue_wait_seconds_sum{encode_rank="0"}': "0+900x120",
    },
    "PagesShort": {'q3vl_num_preemptions_total{role="language", rank="1"}': "0+200x120"},
}
AT_MINUTE = 90


def shown() -> set[str]:
    """Names on the page of a server, as samples have them."""
    families = re.findall(r"^# TYPE (\S+) (\S+)$", serve(FakeBackend()).get("/metrics").text, re.MULTILINE)
    return {
        name + suffix
        for name, kind in families
        for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }


def test_metrics_of_the_rules_and_of_the_page_exist():
    for text in (RULES.read_text(), PAGE):
        named = set(METRIC.findall(text))
        assert len(named) > 8
        assert {name for name in named if name not in shown() and f"{name}_sum" not in shown()} == set()


def test_the_page_argues_every_rule():
    told = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert told == [alarm["alert"] for alarm in ALARMS]
    assert list(WORSE) == told


def ringing(folder: Any, name: str, series: dict[str, str]) -> str:
    """What promtool says where the alarm does not ring, and nothing where it does, after AT_MINUTE minutes."""
    values = {f"{key[:-1]}, " if key.endswith("}") else f"{key}{{": values for key, values in series.items()}
    inputs = [{"series": key + 'instance="a:8000"}', "values": value} for key, value in values.items()]
    query = {"expr": f'sum(ALERTS{{alertname="{name}", alertstate="firing"}}) > bool 0', "eval_time": f"{AT_MINUTE}m"}
    wanted = {**query, "exp_samples": [{"labels": "{}", "value": 1}]}
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": [wanted]}
    file = folder / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "tests": [test]}))  # JSON is YAML
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    if done.returncode and "exp:" not in done.stdout + done.stderr:
        raise ValueError(done.stdout + done.stderr)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.parametrize("name", WORSE)
def test_an_alarm_rings_when_it_should_and_not_when_all_is_well(tmp_path, name):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    assert ringing(tmp_path, name, {**QUIET, **WORSE[name]}) == ""
    assert ringing(tmp_path, name, QUIET) != ""
