"""JSON that others wrote."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

_MAX_SHOWN = 100


def shown(value: object) -> str:
    """A value from there, for a message: its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}.."


def parse_json(data: bytes) -> Any:
    """JSON in UTF-8; ValueError for anything else, a name given twice, or nesting too deep to parse."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise ValueError(f"{counts.most_common(1)[0][0]!r} is given twice")
        return values

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
