"""Time to the first token of a request with several images, with and without prefill while later images are encoded."""

from __future__ import annotations

import base64
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from tools.bench_load import body
from tools.bench_machine import machine_facts
from tools.bench_served import REPO, Served

MODEL_SIZES = {
    "text.hidden-size": 512,
    "text.num-hidden-layers": 9,
    "text.num-attention-heads": 8,
    "text.num-key-value-heads": 2,
    "text.head-dim": 64,
    "text.mrope-section": "12 10 10",
    "text.moe-intermediate-size": 320,
    "text.max-position-embeddings": 16384,
    "vision.out-hidden-size": 512,
    "vision.hidden-size": 256,
    "vision.intermediate-size": 768,
    "max-pixels": 1 << 21,
}


def make_model(folder: Path, vision_depth: int) -> None:
    """A random checkpoint whose tower and decoder take about equally long."""
    command = [sys.executable, "tools/make_checkpoint.py", "--out", str(folder), "--std", "0.02"]
    sizes = {**MODEL_SIZES, "vision.depth": vision_depth}
    options = [part for name, value in sizes.items() for part in (f"--{name}", *str(value).split())]
    subprocess.run([*command, *options], cwd=REPO, check=True, timeout=300, stdout=subprocess.DEVNULL)


class Serve(Served):
    """1 encode rank + 1 language rank, one thread each."""

    def __init__(self, model: Path, overlap: str, spans: Path) -> None:
        self.spans = spans
        super().__init__(2, ["--model", str(model), "--overlap", overlap, "--spans", str(spans)])

    def first_token(self, body: bytes) -> tuple[float, dict[str, Any], tuple[float, float]]:
        """(seconds from the request to its only token, timings, the window on the monotonic clock)."""
        started = time.monotonic()
        answer = self.post(body)
        stopped = time.monotonic()
        return stopped - started, answer["timings"], (started, stopped)

    def read_spans(self, window: tuple[float, float]) -> list[dict[str, Any]]:
        """What the ranks did in that window; times from its start."""
        found = []
        for path in sorted(self.spans.glob("rank-*.jsonl")):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if entry["start"] >= window[0] and entry["stop"] <= window[1]:
                    found.append({**entry, "start": entry["start"] - window[0], "stop": entry["stop"] - window[0]})
        return found


def request_body(num_images: int, side: int) -> bytes:
    images = []
    for number in range(num_images):
        out = io.BytesIO()
        Image.effect_noise((side, side), 40 + 10 * number).convert("RGB").save(out, "JPEG", quality=85)
        images.append("data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode())
    return body("a", images, 1, stream=False)


def draw(path: Path, runs: dict[str, tuple[float, list[dict[str, Any]]]]) -> None:
    """Both timelines under one another, on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"encode": "#4c78a8", "receive": "#e45756", "prefill": "#72b7b2", "decode": "#b279a2"}
    lanes = ["prefill", "receive", "encode"]
    figure, axes = plt.subplots(len(runs), 1, sharex=True, figsize=(9, 2.1 * len(runs) + 0.6))
    for axis, (name, (seconds, spans)) in zip(axes, runs.items(), strict=True):
        for entry in spans:
            if entry["name"] in lanes:
                lane, width = lanes.index(entry["name"]), entry["stop"] - entry["start"]
                # Transfers take milliseconds: drawn no thinner than can be seen.
                edge = colours["receive"] if entry["name"] == "receive" else "white"
                axis.barh(lane, width, left=entry["start"], height=0.7, color=colours[entry["name"]], edgecolor=edge)
        axis.axvline(seconds, color="black", linestyle="--", linewidth=1)
        axis.text(seconds, len(lanes) - 0.45, f" first token {seconds:.2f} s", ha="right", va="bottom", fontsize=9)
        axis.set_yticks(
            range(len(lanes)), [f"{lane} ({'encode' if lane == 'encode' else 'language'} rank)" for lane in lanes]
        )
        axis.set_title(f"overlap {name}", loc="left", fontsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1].set_xlabel("seconds since the request")
    axes[-1].set_xlim(left=0)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def overlap(
    rounds: int = 5, images: int = 6, side: int = 768, vision_depth: int = 4, picture: Path | None = None
) -> None:
    """Time to first token of one request with several large images on 1 encode + 1 language rank of one thread each,
    overlap on and off in turns; both timelines as a picture."""
    machine = machine_facts()
    print(f"{machine}\n{images} images of {side} x {side}, random weights, float32")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, vision_depth)
        servers = {name: Serve(model, name, Path(folder) / f"spans-{name}") for name in ("on", "off")}
        try:
            for server in servers.values():
                server.wait_ready()
            request = request_body(images, side)
            seconds: dict[str, list[float]] = {name: [] for name in servers}
            stages: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
            windows: dict[str, tuple[float, float]] = {}
            for server in servers.values():
                server.first_token(request)  # warm
            for number in range(rounds):
                for name in ("on", "off") if number % 2 else ("off", "on"):
                    taken, timings, windows[name] = servers[name].first_token(request)
                    seconds[name].append(taken)
                    stages[name].append((timings["encode"] / 1e3, timings["prefill"] / 1e3))
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            for name, values in seconds.items():
                encode, prefill = (statistics.median(column) for column in zip(*stages[name], strict=True))
                print(
                    f"overlap {name:3}: first token {medians[name]:.2f} s (of {min(values):.2f} to {max(values):.2f}), "
                    f"encode {encode:.2f} s, prefill {prefill:.2f} s"
                )
            ratio = medians["on"] / medians["off"]
            encode, prefill = (statistics.median(column) for column in zip(*stages["off"], strict=True))
            ideal = (max(encode, prefill) + min(encode, prefill) / images) / (encode + prefill)
            print(f"ratio {ratio:.3f}; with nothing lost it would be {ideal:.3f}")
            if picture is not None:
                last = {name: (seconds[name][-1], servers[name].read_spans(windows[name])) for name in servers}
                draw(picture, last)
        finally:
            for server in servers.values():
                server.close()
    print(json.dumps({"machine": machine, "seconds": seconds, "ratio": ratio, "ideal_ratio": ideal}))
