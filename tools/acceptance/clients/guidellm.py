"""guidellm, as its quick start runs it, but for a few requests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tools.acceptance.checks import FOLDER, KEY, MODEL, ROOT, run

COUNT = 12


def load(data: str) -> bool:
    """All requests were answered."""
    command = ["guidellm", "run", "--backend", f"kind=openai_http,target={ROOT},api_key={KEY},model={MODEL}"]
    command += ["--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={COUNT}"]
    command += ["--data", data, "--tokenizer", f"kind=hf_auto,model={FOLDER}", "--output", "kind=json,path=out.json"]
    done = subprocess.run([*command, "--disable-progress"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2500:])
    [benchmark] = json.loads(Path("out.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    return totals["successful"] >= COUNT and totals["errored"] == 0


run(
    {
        "load, text": lambda: load("kind=synthetic_text,prompt_tokens=256,output_tokens=128"),
        "load, images": lambda: load("kind=synthetic_image,width=256,height=256,output_tokens=32"),
    }
)
