"""What `deploy/` says of the program holds: options, routes, ports, times, limits; and of itself, wherever it says a
thing twice. Tools that are installed look at it, too."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro
from torch.distributed.run import get_args_parser

from qwen3vl_disagg.cluster.slots import EXIT_INPUT, EXIT_REFUSED, KILL_S
from qwen3vl_disagg.core.settings import HttpOptions
from qwen3vl_disagg.launch.frontend import DRAINED_S
from qwen3vl_disagg.options import JoinOptions, ServeOptions
from qwen3vl_disagg.serving.limits import MAX_BODY_BYTES, Limits
from tests.support.deploy import (
    DEPLOY,
    agent_and_script,
    batch_command,
    container,
    manifests,
    shell_line,
    values_of,
)
from tests.support.fake_backend import FakeBackend, serve
from tests.support.gateway import NGINX as NGINX_PROGRAM
from tests.support.server import REPO

OBJECTS = manifests()
FIRST, OTHERS = OBJECTS["StatefulSet", "q3vl-a-first"], OBJECTS["StatefulSet", "q3vl-a-others"]
ENCODE = OBJECTS["Deployment", "q3vl-a-encode"]
WORKLOADS = [FIRST, OTHERS, ENCODE]
OF_SCRIPT: dict[str, Any] = {"recipes/serve.py": ServeOptions, "recipes/encode.py": JoinOptions}
OF_POD = {"POD_IP": "10.0.0.1", "HOSTNAME": "q3vl-a-others-0"}
BATCHES = sorted((DEPLOY / "slurm").glob("*.sbatch"))
UNIT = DEPLOY / "systemd" / "qwen3vl-disagg@.service"
NGINX = (DEPLOY / "nginx.conf").read_text()


def parsed(kind: Any, args: list[str]) -> Any:
    """The options, as the command itself reads them; a test fails where it would not."""
    try:
        return tyro.cli(kind, args=args)
    except SystemExit as refused:
        raise AssertionError(f"{args}: exit {refused.code}") from None


def directive(name: str) -> str:
    """The value of one that nginx's configuration has once."""
    [found] = re.findall(rf"^\s*{name} (.*?);", NGINX, re.MULTILINE)
    return found


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m|h)", text).groups()
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]


def test_all_that_manifests_run_can_be_read_by_what_they_run():
    for entry in WORKLOADS:
        agent, script, args = agent_and_script(shell_line(entry), values_of(entry) | OF_POD)
        options = parsed(OF_SCRIPT[script], args)
        launch = get_args_parser().parse_args([*agent, script])
        assert launch.nproc_per_node == values_of(entry)["RANKS"]
        if script == "recipes/serve.py":
            assert launch.nnodes == values_of(entry)["NODES"]
            assert launch.node_rank == (0 if entry is FIRST else 1)
            assert options.hub.endswith(":7007")
        else:
            assert options.join == "q3vl-a-hub:7007"


@pytest.mark.parametrize("path", BATCHES, ids=lambda path: path.name)
def test_all_that_batches_run_can_be_read_by_what_they_run(path):
    values = {
        "HEAD_ADDRESS": "10.0.0.1",
        "HUB": "10.0.0.1:7007",
        "RANKS": "8",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
    }
    agent, script, args = agent_and_script(batch_command(path), values)
    get_args_parser().parse_args([*agent, script])
    assert ":7007" in (getattr(parsed(OF_SCRIPT[script], args), "hub", None) or "10.0.0.1:7007")
    text = path.read_text()
    assert "--token" not in text, "others of the host could read it"
    assert "${Q3VL_TOKEN:?" in text


def test_unit_and_image_start_what_there_is():
    words = shlex.split(re.search(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)[1])
    assert Path(words[0]).name == "qwen3vl-disagg"
    given = [word.replace("%i", "8000") for word in words[2:] if word != "$OPTIONS"]
    example = re.search(r"OPTIONS=(.*)$", UNIT.read_text(), re.MULTILINE)[1].split()
    assert parsed(ServeOptions, [*given, *example]).http.port == 8000
    command = re.search(r"^CMD \[(.*)\]$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)[1]
    program, *args = [word.strip(' "') for word in command.split(",")]
    assert [program, args[0]] == ["qwen3vl-disagg", "serve"]
    parsed(ServeOptions, args[1:])
    for name in re.findall(r"^COPY (?!--)(.*) \S+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE):
        assert all((REPO / part).exists() for part in name.split())


def test_there_is_time_to_finish_requests_before_anything_is_killed():
    def pause(entry: dict[str, Any]) -> int:
        return int(container(entry).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [0, 0])[1])

    for entry in WORKLOADS:
        assert entry["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > pause(entry) + KILL_S
    assert pause(FIRST) == pause(OTHERS) > 0, "the ranks of one pod would leave while another's still serve"
    probe = container(FIRST)["readinessProbe"]
    assert pause(FIRST) > probe["periodSeconds"] * probe["failureThreshold"]
    unit = UNIT.read_text()
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1]) > KILL_S
    assert re.search(r"^KillMode=mixed$", unit, re.MULTILINE), "decoders would be signalled beside the frontend"
    never = re.search(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)[1]
    assert set(map(int, never.split())) == {EXIT_INPUT, EXIT_REFUSED}
    for path in BATCHES:
        assert int(re.search(r"^#SBATCH --signal=TERM@(\d+)$", path.read_text(), re.MULTILINE)[1]) > KILL_S


def test_probes_ask_what_there_is():
    client, one = serve(FakeBackend()), container(FIRST)
    asked = {name: one[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    for probe in asked.values():
        assert client.get(probe["path"]).status_code == 200
    assert {name: probe["path"] for name, probe in asked.items()} == {
        "startupProbe": "/ready",
        "readinessProbe": "/ready",
        "livenessProbe": "/health",
    }
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    options = parsed(ServeOptions, agent_and_script(shell_line(FIRST), values_of(FIRST) | OF_POD)[2])
    assert ports == {"http": options.http.port, "hub": int(options.hub.split(":")[1])}
    assert {probe["port"] for probe in asked.values()} == {"http"}


def test_pods_of_a_job_agree_and_tokens_are_secrets():
    first, others = values_of(FIRST), values_of(OTHERS)
    assert {name: first[name] for name in first} == {name: others[name] for name in first}
    assert FIRST["spec"]["updateStrategy"] == OTHERS["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert int(first["NODES"]) == FIRST["spec"]["replicas"] + OTHERS["spec"]["replicas"]
    assert others["FIRST"] == f"{FIRST['metadata']['name']}-0.{FIRST['spec']['serviceName']}"
    assert ("Service", FIRST["spec"]["serviceName"]) in OBJECTS
    assert len({container(entry)["image"] for entry in WORKLOADS}) == 1
    for entry in WORKLOADS:
        [token] = [one for one in container(entry)["env"] if one["name"] == "Q3VL_TOKEN"]
        assert set(token) == {"name", "valueFrom"}
        assert set(token["valueFrom"]) == {"secretKeyRef"}
        labels = entry["spec"]["template"]["metadata"]["labels"]
        assert entry["spec"]["selector"]["matchLabels"] == labels
        mounts = {one["name"]: one["mountPath"] for one in container(entry)["volumeMounts"]}
        assert {mounts[one["name"]] for one in entry["spec"]["template"]["spec"]["volumes"]} >= {"/dev/shm", "/tmp"}
        assert container(entry)["resources"].keys() == {"requests", "limits"}


def test_services_lead_to_the_first_pod():
    labels = FIRST["spec"]["template"]["metadata"]["labels"]
    for name in ("q3vl-a", "q3vl-a-hub"):
        selector = OBJECTS["Service", name]["spec"]["selector"].items()
        assert selector <= labels.items()
        assert not any(selector <= e["spec"]["template"]["metadata"]["labels"].items() for e in (OTHERS, ENCODE))
    assert "publishNotReadyAddresses" not in OBJECTS["Service", "q3vl-a"]["spec"]
    assert OBJECTS["Service", "q3vl-a-hub"]["spec"]["publishNotReadyAddresses"]


def test_nginx_waits_as_long_as_the_server_may_take_and_takes_what_it_takes():
    limits = Limits()
    assert directive("client_max_body_size") == f"{MAX_BODY_BYTES >> 20}m"
    assert seconds(directive("proxy_read_timeout")) > HttpOptions().request_timeout > limits.ping_s
    assert seconds(directive("proxy_next_upstream_timeout")) > DRAINED_S
    assert seconds(directive("worker_shutdown_timeout")) >= HttpOptions().request_timeout
    assert set(directive("proxy_next_upstream").split()) == {"error", "timeout", "http_503", "non_idempotent"}
    assert directive("proxy_buffering") == "off"
    assert directive("proxy_request_buffering") == "on", "a body that is sent as it comes cannot be sent again"
    client = serve(FakeBackend())
    for path in re.findall(r"location =? ?(/\S+) \{ return 404; \}", NGINX):
        assert client.get(path if path != "/debug/" else "/debug/trace").status_code == 200, path
    for form in re.findall(r"'(\{\"(?:error|type)\".*?\})';", NGINX):
        assert '"code":"unavailable"' in form or '"code":"request_too_large"' in form


def checked(*command: object) -> str:
    """What a tool says of a file that is wrong; nothing of one that is right. Skips where the tool is missing."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr + f"exit {done.returncode}"


def test_a_shell_reads_the_batches():
    for path in BATCHES:
        assert checked("bash", "-n", path) == ""


def test_shellcheck_finds_nothing():
    assert checked("shellcheck", *BATCHES) == ""


def test_systemd_reads_the_unit(tmp_path):
    text = UNIT.read_text()
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace("/opt/qwen3vl-disagg/bin/qwen3vl-disagg", "/bin/true"))
    assert checked("systemd-analyze", "verify", unit) == ""
    unit.write_text(text.replace("Type=exec", "Type=nonsense").replace("ExecStart=", "NoSuch="))
    assert checked("systemd-analyze", "verify", unit) != ""


def test_nginx_reads_its_configuration(tmp_path):
    config = tmp_path / "nginx.conf"
    text = NGINX.replace("/run/nginx.pid", f"{tmp_path}/pid").replace("/var/log/nginx", str(tmp_path))
    config.write_text(text)
    assert checked(NGINX_PROGRAM, "-t", "-c", config, "-e", tmp_path / "log") == ""
    config.write_text(text.replace("least_conn", "most_conn"))
    assert checked(NGINX_PROGRAM, "-t", "-c", config, "-e", tmp_path / "log") != ""
