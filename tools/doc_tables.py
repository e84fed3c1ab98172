"""Tables in documents that are made from tables in code.

    python -m tools.doc_tables docs/serving.md docs/media.md

writes them anew, between their marks. A test holds that they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen3vl_disagg.core.sampling_params import DEFAULTS, OPTIONS, ORDER, ROUTES, SamplingOption
from qwen3vl_disagg.media.image_formats import FOREIGN, FORMATS, Mending
from qwen3vl_disagg.processing.request_fields import FIELDS, IGNORED, RefusedField

END = "<!-- end -->"


def start(table: str) -> str:
    return f"<!-- table: {table} -->\n"


def put_table(text: str, table: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The document with the table anew. ValueError without its marks."""
    before, mark, rest = text.partition(start(table))
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the document has no place for the table `{table}`")
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    lines.insert(1, "|---" * len(heads) + "|")
    return before + mark + "\n".join(lines) + "\n" + end + after


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _in_body(name: str, option: SamplingOption) -> str:
    by_spelling: dict[str, list[str]] = {}
    for route in ROUTES:
        spelled = _code(option.spellings(name, route))
        by_spelling.setdefault(f"{spelled}, with `{s}`" if (s := option.switch.get(route)) else spelled, []).append(
            route
        )
    if len(by_spelling) == 1:
        return next(iter(by_spelling))
    return "; ".join(f"{', '.join(routes)}: {spelled}" for spelled, routes in by_spelling.items())


def _default(name: str, option: SamplingOption) -> str:
    own = DEFAULTS[name]
    if name == "temperature":
        return "the checkpoint's; 0 where it asks for no sampling"
    said = "none" if own is None or own == [] or own == {} else str(own).lower()
    return f"the checkpoint's, else {said}" if option.is_checkpoints else said


def _options() -> list[list[str]]:
    return [
        [
            f"`{name}`",
            _in_body(name, option),
            "no" if option.flag is None else f"`--{name.replace('_', '-')}`",
            option.kind.values,
            _default(name, option),
            option.about,
        ]
        for name, option in OPTIONS.items()
    ]


def _fields() -> list[list[str]]:
    """Of a chat request; those that are refused by what else they may say."""
    rows: dict[str, list[str]] = {"works": [], "changes nothing": []}
    for name, treatment in FIELDS["request"].items():
        if isinstance(treatment, RefusedField):
            neutral = [f"`{json.dumps(value)}`" for value in treatment.neutral]
            rows.setdefault(f"400, but for {', '.join(neutral)}" if neutral else "400", []).append(name)
        else:
            rows["changes nothing" if treatment == IGNORED else "works"].append(name)
    return [[what, _code(sorted(names))] for what, names in rows.items()]


def _order() -> list[list[str]]:
    return [
        [str(number), step, _code([name for name, option in OPTIONS.items() if option.step == step])]
        for number, step in enumerate(ORDER, 1)
    ]


_MENDED: dict[Mending | None, str] = {
    None: "refused",
    "rows": "its rows",
    "png": "its rows; chunks beside the picture are skipped",
    "jpeg": "its rows; of several scans all of it, less fine",
    "webp": "its rows",
}


def _formats() -> list[list[str]]:
    taken = [
        [
            name,
            form.shown,
            form.turned_by or "nothing",
            _MENDED[form.mending],
            f"{round(100 * form.min_share)} %" if form.mending else "",
        ]
        for name, form in FORMATS.items()
    ]
    return [*taken, [", ".join(FOREIGN), "refused by name", "", "", ""]]


TABLES: dict[str, tuple[str, tuple[str, ...], Callable[[], list[list[str]]]]] = {
    "sampling options": (
        "docs/serving.md",
        ("option", "in a body", "`generate`", "values", "default", "meaning"),
        _options,
    ),
    "fields of a chat request": ("docs/serving.md", ("what becomes of it", "fields"), _fields),
    "order of sampling": ("docs/serving.md", ("", "step", "by"), _order),
    "picture formats": (
        "docs/media.md",
        ("format", "shown", "turned by", "cut off or damaged", "of its pixels at least"),
        _formats,
    ),
}
"""Name -> its page, its columns, what makes its rows."""


def write_tables(text: str, page: str) -> str:
    """The page with all of its tables anew. ValueError without their marks."""
    for table, (where, heads, rows) in TABLES.items():
        if where == page:
            text = put_table(text, table, heads, rows())
    return text


def main(pages: Sequence[str]) -> None:
    for page in pages:
        path = Path(page)
        path.write_text(write_tables(path.read_text(), page))


if __name__ == "__main__":
    main(sys.argv[1:])
