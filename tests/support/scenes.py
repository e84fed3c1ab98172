"""Questions over drawn scenes as chat requests."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.assets.scenes import write


@dataclass(frozen=True)
class Asked:
    """One question with its images' files."""

    images: list[Path]
    question: str
    answer: str
    kind: str

    def content(self) -> list[dict[str, Any]]:
        """The user turn, images as data: URIs."""
        parts = []
        for path in self.images:
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        return [*parts, {"type": "text", "text": self.question}]

    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.content()}]


def ask_scenes(folder: Path, *, seed: int, count: int) -> list[Asked]:
    """Write `count` questions into `folder` and read them back."""
    write(seed, count, folder)
    lines = (folder / "questions.jsonl").read_text().splitlines()
    return [
        Asked([folder / name for name in entry["images"]], entry["question"], entry["answer"], entry["kind"])
        for entry in map(json.loads, lines)
    ]
