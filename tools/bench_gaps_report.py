"""What `recipes/bench.py gaps` says of its rounds: figures, tables, the picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.bench_machine import table
from tools.bench_stats import percentile

COLOURS = {"split": "#4c78a8", "colocated": "#e45756"}


def tail(values: Sequence[float]) -> dict[str, float]:
    """Half of the values are not above p50, 99 % not above p99."""
    found = {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values)} if values else {}
    return {**found, "count": len(values)}


def pool(rounds: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The values of all rounds."""
    return [value for one in rounds for value in one[key]]


def merge(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tails over the values of all rounds together, and of each round; means of what is one number a round."""

    def mean(key: str) -> float:
        return statistics.fmean(one[key] for one in rounds)

    lists = ("gaps_ms", "quiet_gaps_ms", "first_token_ms")
    return {
        **{key: tail(pool(rounds, key)) for key in lists},
        "requests": sum(one["requests"] for one in rounds),
        **{key: mean(key) for key in ("requests_s", "text_tokens_s", "machine_cores")},
        "cores": {name: statistics.fmean(one["cores"][name] for one in rounds) for name in rounds[0]["cores"]},
        "text_requests_ended": sum(one["text_requests_ended"] for one in rounds),
        "rounds": [{**{key: tail(one[key]) for key in lists}, "seconds": one["seconds"]} for one in rounds],
    }


def report(result: Mapping[str, Any]) -> str:
    """Markdown for people."""
    systems, machine, side = result["systems"], result["machine"], result["image_side"]

    def tails(entry: Mapping[str, Any]) -> list[str]:
        return [f"{entry[name]:.0f}" if name in entry else "-" for name in ("p50", "p99", "max")]

    rows = [
        [
            name,
            *tails(entry["gaps_ms"]),
            *tails(entry["quiet_gaps_ms"]),
            *tails(entry["first_token_ms"])[:2],
            f"{entry['requests_s']:.3f}",
            f"{entry['text_tokens_s']:.1f}",
        ]
        for name, entry in systems.items()
    ]
    shares = [
        [
            name,
            ", ".join(f"{rank} {cores:.2f}" for rank, cores in entry["cores"].items()),
            f"{entry['machine_cores']:.2f}",
        ]
        for name, entry in systems.items()
    ]
    ended = [
        f"{entry['text_requests_ended']} text requests of `{name}` ended before the load did: give them more tokens."
        for name, entry in systems.items()
        if entry["text_requests_ended"]
    ]
    head = ["", *(f"gap {name} ms" for name in ("p50", "p99", "max"))]
    head += [*(f"quiet {name} ms" for name in ("p50", "p99", "max")), "first token p50 ms", "p99 ms"]
    return "\n\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}, "
            f"load {machine['load']}; {result['model']}; {result['texts']} text requests; "
            f"{result['rate']:.3f} requests/s with {result['images']} images of {side} x {side} each for "
            f"{result['seconds']:.0f} s, {result['rounds']} rounds",
            "Gaps between tokens of the text requests, under load and before it (quiet); time to the first token of "
            "the requests with images:",
            table([*head, "requests/s", "text tokens/s"], rows),
            "Cores that the ranks and the whole machine used:",
            table(["", "ranks", "machine"], shares),
            *ended,
        ]
    )


def draw(gaps_ms: Mapping[str, Sequence[float]], folder: Path) -> Path:
    """Which part of the gaps is longer than x: the further left and down, the better. Returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, values in gaps_ms.items():
        points = sorted(values)
        parts = [1 - i / len(points) for i in range(len(points))]
        axis.step(points, parts, where="pre", label=name, color=COLOURS.get(name), linewidth=1.8)
        axis.plot(points[-1], parts[-1], "o", color=COLOURS.get(name), markersize=4)
    axis.axhline(0.01, color="#888888", linestyle=":", linewidth=1)
    axis.text(0.995, 0.0105, "1 in 100", ha="right", va="bottom", fontsize=8, transform=axis.get_yaxis_transform())
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left=1.0)  # below are tokens that a step of the server sent together
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("gap between tokens of running text requests, ms")
    axis.set_ylabel("part of the gaps that is longer")
    axis.set_title("while requests with images arrive", loc="left", fontsize=10)
    axis.grid(which="major", color="#eeeeee")
    axis.legend(frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gaps.png"
    figure.savefig(path, dpi=130)
    return path
