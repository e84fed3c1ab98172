"""Draw one transfer with resumes, from the frames that the sessions of both sides exchange.

python tools/draw_transfer.py --out docs/transfer.png
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.encode_sessions import EncodeSessions
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import Ack, Assign, Frame, Grant, Header, HeaderOk, Resume
from qwen3vl_disagg.protocol.session_events import (
    Consumed,
    Encoded,
    Expect,
    FrameIn,
    LinkUp,
    PayloadEnd,
    PayloadSent,
    RowsReady,
    SendFrame,
    SendHeader,
    SendPayload,
    StartEncode,
)

ROWS, BLOCK, BLOCKS = 10, 2, 2


@dataclass(frozen=True)
class Step:
    """One line of the picture: from a side to a side (or to itself), and what."""

    source: str
    target: str
    text: str
    is_payload: bool = False


def describe(body: Any) -> str:
    match body:
        case Grant() | Resume():
            name = "RESUME" if isinstance(body, Resume) else "GRANT"
            has_deepstack = body.deepstack_stop > body.deepstack_start
            deepstack = f", DeepStack [{body.deepstack_start}, {body.deepstack_stop})" if has_deepstack else ""
            return f"{name} rows [{body.row_start}, {body.row_stop}){deepstack}"
        case Header():
            return f"HEADER rows [{body.row_start}, {body.row_stop}) of {body.total_rows}, digests"
        case HeaderOk():
            return "HEADER OK: receives are posted"
        case Ack():
            return f"ACK received {body.received}"
    return type(body).__name__


def run() -> list[Step]:
    """An item of 10 rows through 2 blocks of 2 rows."""
    language = LanguageSessions(
        BlockAllocator(num_blocks=BLOCKS, num_deepstack_blocks=8, num_slots=1), BLOCK, RowSizes(4, 4, 12, 64, 4)
    )
    encode = EncodeSessions()
    visual = VisualItem(
        modality="image", digest="", num_bytes=1, grid=(1, 2, 2 * ROWS), num_rows=ROWS, offset=0, param=""
    )
    steps: list[Step] = []
    events: deque[tuple[Any, Any]] = deque(
        [
            (encode, LinkUp(1, 1)),
            (language, LinkUp(0, 1)),
            (language, Expect("r", [visual], [0], 60.0)),
            (language, Assign(request_id="r", item=0, attempt=1, encode_rank=0)),
        ]
    )
    while events:
        machine, event = events.popleft()
        for action in machine.handle(event, 0.0):
            match action:
                case SendFrame() if machine is language:
                    steps.append(Step("language", "encode", describe(action.frame.body)))
                    events.append((encode, FrameIn(1, action.frame)))
                case SendHeader():
                    grant = action.grant
                    header = Header(
                        request_id="r",
                        item=0,
                        attempt=1,
                        total_rows=ROWS,
                        row_start=grant.row_start,
                        row_stop=grant.row_stop,
                        deepstack_start=grant.deepstack_start,
                        deepstack_stop=grant.deepstack_stop,
                        grid=visual.grid,
                        row_digests=[0] * len(grant.row_runs),
                        deepstack_digests=[0] * len(grant.deepstack_runs),
                    )
                    steps.append(Step("encode", "language", describe(header)))
                    events.append((language, FrameIn(0, Frame(epoch=1, seq=action.seq, body=header))))
                case StartEncode():
                    steps.append(Step("encode", "encode", "pull, decode, vision tower"))
                    events.append((encode, Encoded(action.attempt)))
                case SendPayload():
                    grant = action.grant
                    parts = [] if isinstance(grant, Resume) else ["aux", "DeepStack of all rows"]
                    parts.append(f"rows {grant.row_start}..{grant.row_stop - 1}")
                    steps.append(Step("encode", "language", " + ".join(parts), is_payload=True))
                    events.append((encode, PayloadSent(1, 1, ("r", 0, 1))))
                    events.append((language, PayloadEnd("r", 0, 1, 0, 1)))
                case RowsReady():
                    text = f"prefill rows {action.start}..{action.stop - 1}; then their blocks are free again"
                    steps.append(Step("language", "language", text))
                    events.append((language, Consumed("r", 0, 1, action.stop)))
    return steps


def draw(steps: list[Step], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    left, right = {"language": 0.0, "encode": 1.0}, 1.0
    figure, axis = plt.subplots(figsize=(8.5, 0.42 * len(steps) + 0.8))
    for x, name in ((0.0, "language rank"), (right, "encode rank")):
        axis.plot([x, x], [0, -len(steps) - 0.5], color="#888888", linewidth=1)
        axis.text(x, 0.4, name, ha="center", va="bottom", fontsize=11, fontweight="bold")
    for number, step in enumerate(steps):
        y = -number - 0.7
        if step.source == step.target:
            x = left[step.source]
            axis.text(
                x + (0.02 if x == 0 else -0.02),
                y,
                step.text,
                ha="left" if x == 0 else "right",
                va="center",
                fontsize=9,
                bbox={"boxstyle": "round,pad=0.3", "facecolor": "#eef3e2", "edgecolor": "#9ab46a"},
            )
            continue
        colour = "#d1495b" if step.is_payload else "#30638e"
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 3.5 if step.is_payload else 1.3}
        axis.annotate("", xy=(left[step.target], y), xytext=(left[step.source], y), arrowprops=style)
        axis.text(0.5, y + 0.13, step.text, ha="center", va="bottom", fontsize=9, color=colour)
    axis.set_xlim(-0.08, 1.08)
    axis.set_ylim(-len(steps) - 0.6, 1.1)
    axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(out: Path = Path("transfer.png")) -> None:
    """Draw it."""
    draw(run(), out)


if __name__ == "__main__":
    tyro.cli(main)
