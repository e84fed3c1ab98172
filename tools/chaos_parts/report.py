"""The end of a run: counts as a table and as JSON, and a picture of what processes held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench_stats import percentile
from tools.chaos_parts.growth import Growth, Sample, growth, lives, warm_up
from tools.chaos_parts.record import Record
from tools.chaos_parts.verdicts import MEANING, VERDICTS, Outcome, count, is_good, settle

CHILD = "child of"


def conclude(record: Record, seconds: float, calm_s: float = 0.0) -> dict[str, Any]:
    """All that is reported; `ok` decides the exit status. `calm_s`: before any event came."""
    outcomes = settle(record.happenings, record.outcomes)
    counts = count(outcomes)
    whole: dict[str, int] = {name: counts["all"][name] for name in ("asked", *VERDICTS)}
    return {
        "ok": is_good(outcomes) and not record.troubles,
        "seconds": round(seconds, 1),
        **whole,
        "near": {name: _given(row) for name, row in counts.items() if name != "all"},
        "kinds": {name: _given(row) for name, row in _by_kind(outcomes).items()},
        "codes": _given(Counter(f"{one.status} {one.code}" for one in outcomes if one.code)),
        "events": _given(Counter(one.kind for one in record.happenings)),
        "skipped": _given(Counter(f"{kind}: {reason}" for kind, reason in record.skipped)),
        "right_after_refusals": sum(one.verdict == "right" and one.attempt > 0 for one in outcomes),
        "seconds_to_answer": _latency(outcomes),
        "seconds_to_first_token": _first_tokens(outcomes, calm_s),
        "troubles": record.troubles,
        "bad": [f"{one.start:.1f} s, {one.name}: {one.verdict}: {one.note}"[:400] for one in outcomes if _is_bad(one)],
        "growth": [one.to_dict() for one in growth(record.samples, seconds)],
    }


def _is_bad(outcome: Outcome) -> bool:
    return not is_good([outcome])


def _given(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items()))


def _by_kind(outcomes: Sequence[Outcome]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for one in outcomes:
        found.setdefault(one.kind, Counter()).update([one.verdict, "asked"])
    return dict(sorted(found.items()))


def _latency(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Of right answers: of those with no event near, and of all."""
    found = {}
    right = [one for one in outcomes if one.verdict == "right" and one.kind != "bad input"]
    for name, some in (("none", [one for one in right if one.near == "none"]), ("all", right)):
        if some:
            took = [one.end - one.start for one in some]
            found[name] = {"p50": percentile(took, 50), "p99": percentile(took, 99), "max": max(took)}
    return {name: {key: round(value, 2) for key, value in row.items()} for name, row in found.items()}


def _first_tokens(outcomes: Sequence[Outcome], calm_s: float) -> dict[str, dict[str, float]]:
    """Of streams that were right: those that were over when the first event came, and those that began after it."""
    parts = {
        "before": [one for one in outcomes if one.end < calm_s],
        "after": [one for one in outcomes if one.start >= calm_s and one.near != "afterwards"],
    }
    found = {}
    for name, some in parts.items():
        took = [one.seconds_to_first for one in some if one.verdict == "right" and one.seconds_to_first is not None]
        if took:
            summary = {"count": len(took), "p50": percentile(took, 50), "p99": percentile(took, 99), "max": max(took)}
            found[name] = {key: round(value, 3) for key, value in summary.items()}
    return found


def table(result: dict[str, Any]) -> str:
    """For people, as Markdown."""
    lines = [f"| near | asked | {' | '.join(VERDICTS)} |", f"|---|---|{'---|' * len(VERDICTS)}"]
    for name, row in [*result["near"].items(), ("**all**", result)]:
        cells = [str(row.get(verdict, 0)) for verdict in ("asked", *VERDICTS)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"{verdict}: {MEANING[verdict]}" for verdict in VERDICTS), ""]
    lines.append("events: " + _listed(result["events"]))
    if result["skipped"]:
        lines.append("skipped: " + _listed(result["skipped"]))
    lines.append(f"errors by code: {_listed(result['codes'])}")
    lines.append(f"right after having been refused: {result['right_after_refusals']}")
    for name, row in result["seconds_to_answer"].items():
        lines.append(f"seconds to a right answer, near {name}: " + _listed(row))
    for name, row in result["seconds_to_first_token"].items():
        lines.append(f"seconds to a first token, {name} the first event: " + _listed(row))
    lines += ["", *_growth_table([Growth(**row) for row in result["growth"]], result["seconds"])]
    lines += [f"bad: {text}" for text in result["bad"][:50]]
    lines += [f"trouble: {text}" for text in result["troubles"]]
    return "\n".join(lines)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def _growth_table(rows: Sequence[Growth], seconds: float) -> list[str]:
    if not rows:
        return [f"no process was seen long enough after the first {warm_up(seconds):.0f} s for a slope", ""]
    lines = [
        f"What processes hold, and what comes to it in an hour, after the first {warm_up(seconds):.0f} s:",
        "",
        "| process | seconds | MiB | MiB/h | descriptors | /h | threads | /h |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.name.startswith(CHILD):
            continue  # many, and short-lived: they are in the JSON
        sizes = f"{row.mib:.1f} | {row.mib_per_hour:+.1f} | {row.descriptors} | {row.descriptors_per_hour:+.1f}"
        lines.append(f"| {row.name} | {row.seconds:.0f} | {sizes} | {row.threads} | {row.threads_per_hour:+.1f} |")
    return [*lines, ""]


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Memory above, descriptors below; a line for each life of each process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(10, 7))
    ours = [sample for sample in samples if not sample.name.startswith(CHILD)]
    names = sorted({sample.name for sample in ours})
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    labelled: set[str] = set()
    for (name, _, _), life in lives(ours).items():
        times = [sample.at / 60 for sample in life]
        style = {"color": colours[name], "linewidth": 1.0, "marker": "." if len(life) == 1 else None}
        label = None if name in labelled else name
        labelled.add(name)
        above.plot(times, [sample.anon / 2**20 for sample in life], label=label, **style)
        below.plot(times, [sample.descriptors for sample in life], **style)
    above.set(ylabel="private memory, MiB", ylim=(0, None))
    below.set(xlabel="minutes", ylabel="descriptors", ylim=(0, None))
    above.legend(fontsize="x-small", ncols=2)
    for axes in (above, below):
        axes.grid(True, linewidth=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
