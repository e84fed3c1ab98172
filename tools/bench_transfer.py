"""Speed of the Gloo link between an encode and a language rank, beside raw TCP, bare Gloo send/recv and memcpy.

This process is the encode rank, a spawned one the language rank, one thread each. All ways take turns, so that whatever
else the machine does hits them alike, and all buffers are touched before.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from typing import Annotated, Any

import torch
import tyro

from tools.bench_machine import busy_seconds, conclude, machine_facts, machine_line, spread, table
from tools.bench_pair import BYTE_ROWS, DEADLINE_S, HOST, ROW_BYTES, WAYS, EncodeEnd, Peer, Plan, run_language


def measure_size(end: EncodeEnd, rows: int, rounds: int) -> dict[str, Any]:
    """All ways take turns; the first round warms up."""
    end.prepare(rows)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            elapsed = end.measure(way)
            if number:
                seconds[way].append(elapsed)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "megabytes": rows * ROW_BYTES >> 20,
        "rows": rows,
        "bytes": end.size,
        "ms": {way: spread([1e3 * value for value in values]) for way, values in seconds.items()},
        "gb_s": {way: spread([end.size / value / 1e9 for value in values]) for way, values in seconds.items()},
        "link_of_gloo": median["gloo"] / median["link"],
        "scattered_of_gloo": median["gloo"] / median["link scattered"],
        "link_of_tcp": median["tcp"] / median["link"],
        "first_token_ms": 1e3 * median["link+handshake"],
    }


def run_encode(plan: Plan) -> dict[str, Any]:
    """Start the language rank, measure, end it."""
    listener = socket.create_server((HOST, 0))
    listener.settimeout(DEADLINE_S)
    spawn = multiprocessing.get_context("spawn")
    child = spawn.Process(target=run_language, args=(listener.getsockname(), plan), daemon=True)
    child.start()
    try:
        peer = Peer(listener.accept()[0])
        end = EncodeEnd(peer, peer.meet(0), plan)
        counts = [end.count_bytes(rows) for rows in BYTE_ROWS]
        wall, cpu, busy = time.perf_counter(), time.process_time(), busy_seconds()
        sizes = [measure_size(end, rows, plan.rounds) for rows in plan.rows]
        language_cpu = peer.read_count() / 1e9
        wall, cpu, busy = time.perf_counter() - wall, time.process_time() - cpu, busy_seconds() - busy
        child.join(DEADLINE_S)
    finally:
        if child.is_alive():
            child.kill()
            child.join(DEADLINE_S)
        listener.close()
    used = (cpu, language_cpu, max(0.0, busy - cpu - language_cpu))
    share = {name: seconds / wall for name, seconds in zip(("encode", "language", "others"), used, strict=True)}
    return {"sizes": sizes, "bytes": counts, "cpu_share": share, "seconds": wall}


def report(result: dict[str, Any]) -> str:
    """Tables for people."""

    def speed(size: dict[str, Any], way: str) -> str:
        one = size["gb_s"][way]
        return f"{one['median']:.2f} ({one['min']:.2f} to {one['max']:.2f})"

    sizes = result["sizes"]
    speeds = [[f"{size['megabytes']} MB", *(speed(size, way) for way in WAYS)] for size in sizes]
    ratios = [
        [
            f"{size['megabytes']} MB",
            f"{size['link_of_gloo']:.0%}",
            f"{size['scattered_of_gloo']:.0%}",
            f"{size['link_of_tcp']:.0%}",
            f"{size['first_token_ms']:.2f} ms",
        ]
        for size in sizes
    ]
    counts = [
        [*(f"{row[name]:,}" for name in ("rows", "payload_bytes", "least_bytes", "frame_bytes")), f"{row['ratio']:.4f}"]
        for row in result["bytes"]
    ]
    share, machine = result["cpu_share"], result["machine"]
    return "\n\n".join(
        [
            f"{machine_line(machine)}; {result['rounds']} rounds; cores used: encode {share['encode']:.2f}, "
            f"language {share['language']:.2f}, other processes {share['others']:.2f}",
            "GB/s, median (least to greatest):",
            table(["size", *WAYS], speeds),
            "Ratios of medians, and what the transfer adds to the time to the first token (0 with no copy):",
            table(["size", "link / gloo", "scattered / gloo", "link / tcp", "first token"], ratios),
            "Bytes of a request with one item:",
            table(["rows", "payload", "least", "frames beside it", "payload / least"], counts),
        ]
    )


def transfer(
    megabytes: tuple[int, ...] = (1, 4, 16, 64),
    rounds: int = 40,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Speed and bytes of the encode -> language link.

    Args:
        megabytes: Sizes of the items (MiB of rows: 64 rows each).
        rounds: Rounds for each size; in a round every way has one turn.
        as_json: Print the JSON line only.
    """
    if not megabytes or min(megabytes) < 1 or rounds < 1:
        raise SystemExit(f"need sizes and rounds of at least 1, got {megabytes} and {rounds}")
    torch.set_num_threads(1)
    machine = machine_facts()
    plan = Plan(tuple((size << 20) // ROW_BYTES for size in megabytes), rounds)
    result = {"bench": "transfer", "machine": machine, "rounds": rounds, **run_encode(plan)}
    conclude(result, report(result), as_json)
