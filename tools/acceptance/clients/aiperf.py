"""aiperf, streaming, with texts and with images that it makes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tools.acceptance.checks import FOLDER, KEY, MODEL, ROOT, run

COUNT = 12
IMAGES = ("--image-width-mean", "128", "--image-height-mean", "128")


def load(folder: str, *options: str) -> bool:
    """All requests were answered."""
    command = ["aiperf", "profile", "--model", MODEL, "--url", ROOT, "--endpoint-type", "chat", "--streaming"]
    command += ["--api-key", KEY, "--tokenizer", FOLDER, "--concurrency", "4", "--request-count", str(COUNT)]
    command += ["--artifact-dir", folder, "--ui", "none", "--prompt-input-tokens-mean", "100"]
    command += ["--prompt-output-tokens-mean", "32", "--extra-inputs", "ignore_eos:true", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2500:])
    [file] = Path(folder).rglob("profile_export_aiperf.json")
    told = json.loads(file.read_text())
    if told["request_count"]["avg"] != COUNT or told.get("error_summary"):
        raise RuntimeError(f"{told['request_count']} {told.get('error_summary')}")
    return True


run({"load, text": lambda: load("text"), "load, images": lambda: load("images", *IMAGES)})
