"""Tables and the picture of `recipes/bench.py engine`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.bench_machine import table

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")
CEILING_COLOUR = "#dddddd"


def unit(measurement: str) -> str:
    """Head of a column."""
    if measurement == "image":
        return "image ms"
    kind, _, batch = measurement.partition(" ")
    return f"{kind} tokens/s" + (f", batch {batch}" if batch else "")


def report(result: Mapping[str, Any]) -> str:
    """Markdown for people: figures with their part of the ceiling, then what the run got of the machine."""
    contestants, measurements, machine = result["contestants"], list(result["ceiling"]), result["machine"]
    rates = result["rates"]

    def cell(entry: Mapping[str, Any], measurement: str) -> str:
        return f"{entry['median'][measurement]:.0f} ({entry['of_ceiling'][measurement]:.0%})"

    figures = [["ceiling", *(f"{result['ceiling'][name]:.0f}" for name in measurements)]]
    figures += [[name, *(cell(entry, m) for m in measurements)] for name, entry in contestants.items()]
    spreads = [
        [name, *(f"{min(entry['rounds'][m]):.0f} to {max(entry['rounds'][m]):.0f}" for m in measurements)]
        for name, entry in contestants.items()
    ]
    shares = [
        [
            name,
            *(f"{entry[key]:.2f}" for key in ("cores", "idle_cores", "other_cores")),
            *(f"{entry[key]:,.0f} MB" for key in ("private_mb", "peak_mb")),
        ]
        for name, entry in contestants.items()
    ]
    left_out = [f"Left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}, load {machine['load']}; "
            f"{result['model']}, {result['dtype']}, {result['threads']} threads ({result['wait']} wait), "
            f"{result['rounds']} rounds; prompts of {result['prompt_tokens']} tokens and {result['new_tokens']} new "
            f"ones, prefill of {result['prefill_tokens']}, image of {result['image_side']} x {result['image_side']}",
            f"Ceilings stand on {rates['read_gb_s']:.1f} GB/s read and {rates['matmul_gflop_s']:.0f} GFLOP/s.",
            "Median (part of the ceiling):",
            table(["", *map(unit, measurements)], figures),
            "Least to greatest:",
            table(["", *map(unit, measurements)], spreads),
            "Cores busy during a contestant's measurements, and its memory:",
            table(["", "its own", "idle contestants", "other programs", "private", "peak resident"], shares),
            *left_out,
        ]
    )


def draw(result: Mapping[str, Any], folder: Path) -> Path:
    """Tokens/s of each contestant and batch, in front of the ceiling. Returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contestants = result["contestants"]
    panels = [name for name in result["ceiling"] if name != "image"] + ["image"]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 3.8))
    for axis, measurement in zip(axes, panels, strict=True):
        ceiling = result["ceiling"][measurement]
        for x, (colour, entry) in enumerate(zip(COLOURS, contestants.values(), strict=False)):
            values = entry["rounds"][measurement]
            median = entry["median"][measurement]
            axis.bar(x, median, width=0.7, color=colour)
            axis.plot([x, x], [min(values), max(values)], color="#333333", linewidth=1.2)
            axis.text(x, max(values), f"{median:.0f}", ha="center", va="bottom", fontsize=8)
        axis.axhline(ceiling, color="#333333", linestyle="--", linewidth=1)
        place = "least" if measurement == "image" else "ceiling"
        axis.text(len(contestants) - 0.5, ceiling, f"{place} {ceiling:.0f}", ha="right", va="bottom", fontsize=8)
        axis.set_title(unit(measurement), fontsize=9)
        axis.set_xticks(range(len(contestants)), contestants, rotation=55, ha="right", fontsize=8)
        axis.margins(y=0.12)
        axis.set_ylim(bottom=0)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "engine.png"
    figure.savefig(path, dpi=130)
    return path
