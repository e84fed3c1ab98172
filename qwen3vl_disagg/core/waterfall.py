"""One request's stages as bars of text, for a terminal."""

from __future__ import annotations

from qwen3vl_disagg.core.requests import RequestTimings

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(start: float, length: float, total: float, width: int) -> str:
    """A bar from `start` over `length` of `total`, in `width` columns, drawn to an eighth of a column."""
    if total <= 0:
        return " " * width
    first = min(width, int(start / total * width))
    eighths = min(round(length / total * width * 8), (width - first) * 8)
    drawn = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    if not drawn and length > 0:
        drawn = "▏"
    return (" " * first + drawn).ljust(width)[:width]


def waterfall(timings: RequestTimings, *, width: int = 40) -> str:
    """Lines `stage |bar| ms detail` of the stages one after another."""
    if timings.encode_ranks:
        images = f"{len(timings.items)} item(s) on encode rank {', '.join(map(str, timings.encode_ranks))}"
    else:
        images = ""
    stages = [
        ("queue", timings.queue, ""),
        ("preprocess", timings.preprocess, images),
        ("encode", timings.encode, f"{sum(item.rows for item in timings.items)} rows" if images else ""),
        ("transfer", timings.transfer, f"{timings.transfer_bytes / 1e3:,.1f} kB" if images else ""),
        ("prefill", timings.prefill, f"language rank {timings.language_rank}"),
        ("decode", timings.decode, ""),
    ]
    total = sum(ms for _, ms, _ in stages)
    lines, start = [], 0.0
    for name, ms, detail in stages:
        lines.append(f"{name:>10} |{bar(start, ms, total, width)}| {ms:9.1f} ms  {detail}".rstrip())
        start += ms
    return "\n".join(lines)
