"""What stands in `deploy/`: its documents, and the commands in them as a shell would see them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.server import REPO

DEPLOY = REPO / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, name) -> each object of Kubernetes. ValueError for two of the same name."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in MANIFESTS:
        for entry in yaml.safe_load_all(path.read_text()):
            key = entry["kind"], entry["metadata"]["name"]
            if key in found:
                raise ValueError(f"{key} is there twice")
            found[key] = entry
    return found


def container(entry: dict[str, Any]) -> dict[str, Any]:
    """The one container of a workload's pods."""
    [one] = entry["spec"]["template"]["spec"]["containers"]
    return one


def shell_line(entry: dict[str, Any]) -> str:
    """What bash runs in a workload's pods."""
    bash, option, line = container(entry)["args"]
    if (bash, option) != ("bash", "-c"):
        raise ValueError(f"{entry['metadata']['name']} runs {bash} {option}")
    return line


def values_of(entry: dict[str, Any]) -> dict[str, str]:
    """Variables whose values stand in the manifest."""
    return {one["name"]: one["value"] for one in container(entry)["env"] if "value" in one}


def agent_and_script(command: str, env: Mapping[str, str]) -> tuple[list[str], str, list[str]]:
    """Of `.. torchrun OPTIONS recipes/SCRIPT OPTIONS`: torchrun's options, the script, its options, as bash expands
    them. ValueError for a variable that `env` does not have."""
    line = "set -u; printf '%s\\0' " + command[command.index("torchrun") :]
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=10, env=dict(env))
    if done.returncode:
        raise ValueError(done.stderr)
    words = done.stdout.removesuffix("\0").split("\0")
    [at] = [number for number, word in enumerate(words) if word.startswith("recipes/")]
    return words[1:at], words[at], words[at + 1 :]


def batch_command(path: Path) -> str:
    """What srun runs on each node."""
    found = re.search(r"bash -c '(exec torchrun.*?)'", path.read_text(), re.DOTALL)
    if found is None:
        raise ValueError(f"{path} runs no torchrun")
    return found[1]
