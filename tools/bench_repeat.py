"""What the caches are worth: the first token of a prompt whose image was seen before, over HTTP on two ranks."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import tyro

from tools.bench_engine import folder_to_serve
from tools.bench_load import Stream, body, picture, send, text
from tools.bench_machine import conclude, machine_facts, machine_line, spread, table
from tools.bench_served import Served

WORDS = 24


def prompts(number: int, side: int) -> dict[str, bytes]:
    """Requests of round `number`, in the order in which they are sent."""
    seen, other = picture(side, 2 * number + 1), picture(side, 2 * number + 2)

    def ask(question: int, images: list[str], before: str = "") -> bytes:
        return body(text(WORDS, 10 * number + question), images, 2, before=before)

    return {
        "new image": ask(0, [seen]),
        "same prompt": ask(0, [seen]),
        "same image, other question": ask(1, [seen]),
        "same image behind other text": ask(2, [seen], before=text(WORDS, 10 * number + 5)),
        "same image and a new one": ask(3, [seen, other]),
    }


def facts(record: Stream) -> dict[str, Any]:
    """What one answer took."""
    items = record.timings["items"]
    return {
        "first_token_ms": record.first_token_s * 1e3,
        "encoded": sum(item["encode"] > 0 for item in items),
        "transfer_bytes": record.timings["transfer_bytes"],
        "cached_tokens": record.timings["cached_tokens"],
    }


def run_round(port: int, number: int, side: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name, request in prompts(number, side).items():
        record = Stream(time.perf_counter())
        asyncio.run(send(port, request, record))
        found[name] = facts(record)
    return found


def report(result: dict[str, Any]) -> str:
    """Markdown for people."""
    machine, prompts_ = result["machine"], result["prompts"]
    first = prompts_["new image"]["first_token_ms"]["median"]
    rows = [
        [
            name,
            f"{entry['first_token_ms']['median']:.0f}",
            f"{entry['first_token_ms']['min']:.0f} to {entry['first_token_ms']['max']:.0f}",
            f"{first / entry['first_token_ms']['median']:.1f}",
            *(f"{entry[key]:,.0f}" for key in ("encoded", "transfer_bytes", "cached_tokens")),
        ]
        for name, entry in prompts_.items()
    ]
    head = ["prompt", "first token ms", "least to greatest", "times earlier"]
    head += ["images encoded", "bytes transferred", "tokens from the prefix cache"]
    title = (
        f"{machine_line(machine)}; {result['model']}, 1 encode + 1 language rank, images of {result['image_side']} x "
        f"{result['image_side']}, medians of {result['rounds']} rounds"
    )
    return f"{title}\n\n{table(head, rows)}"


def repeat(
    rounds: int = 7,
    preset: str = "mid",
    model: Path | None = None,
    image_side: int = 448,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Time to the first token when an image was seen before; docs/benchmarks.md.

    Args:
        rounds: Rounds that count, each with images of its own; one more before them warms up.
        preset: Random weights of tools/make_checkpoint.py.
        model: A checkpoint folder instead.
        image_side: Height and width of the images in pixels.
        as_json: Print the JSON line only.
    """
    if rounds < 1:
        raise SystemExit("need at least one round")
    machine = machine_facts()
    with ExitStack() as stack:
        if model is None:
            model = folder_to_serve(stack, preset)
        server = stack.enter_context(Served(2, ["--model", str(model), "--encode-ranks", "1"]))
        found = []
        for number in range(rounds + 1):
            found.append(run_round(server.port, number, image_side))
            print(f"round {number} of {rounds}", file=sys.stderr)
    counted = found[1:]
    result = {
        "bench": "repeat",
        "machine": machine,
        "model": preset if model.name == preset else model.name,
        "image_side": image_side,
        "rounds": rounds,
        "prompts": {
            name: {
                "first_token_ms": spread([one[name]["first_token_ms"] for one in counted]),
                **{
                    key: statistics.median(one[name][key] for one in counted)
                    for key in ("encoded", "transfer_bytes", "cached_tokens")
                },
            }
            for name in counted[0]
        },
    }
    conclude(result, report(result), as_json)
