"""What documents say of the tree holds: links, files, commands. Dated figures stand in one place, prose is wrapped."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

from qwen3vl_disagg.options import ServeOptions
from tools.doc_tables import TABLES, write_tables

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qwen3vl_disagg"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
WIDTH = 120
DATE = re.compile(r"\b20\d\d-[01]\d-[0-3]\d\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_FILE = re.compile(r"(?<![\w/.{*~<-])((?:[\w.-]+/)*\w[\w.-]*\.(?:py|jinja))\b(?!\.)")
PAGE_NAME = re.compile(r"\bdocs/[\w/-]+\.(?:md|png)\b")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]+)")
WAYS = {"Its bytes, from HTTP to the tower": 14, "Its rows, from the tower to the hook": 13}
"""Headings in docs/architecture.md, and how many files that way may go through."""
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
WITH_DATES = {"benchmarks.md", "clients.md", "CHANGELOG.md"}


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def ways(text: str) -> dict[str, list[tuple[str, str]]]:
    """Heading -> (file, function) of each row of the tables "file | function | .." below it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^#+ +", text, flags=re.MULTILINE)[1:]:
        heading, _, rest = part.partition("\n")
        if "| file | function |" in rest:
            table = rest[rest.index("| file | function |") :].split("\n\n")[0]
            found[heading] = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", table, re.MULTILINE)
    return found


def has_function(file: Path, dotted: str) -> bool:
    """`function`, `Class.method`, or `function.inner`."""
    nodes: list[ast.AST] = [ast.parse(file.read_text())]
    for name in dotted.split("."):
        inside = [child for node in nodes for child in ast.walk(node) if child is not node]
        nodes = [node for node in inside if isinstance(node, DEFINITIONS) and node.name == name]
    return bool(nodes)


def broken_links(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(page.read_text()):
        name, _, anchor = target.partition("#")
        if "://" in name:
            continue
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


def is_there(name: str, names: set[str]) -> bool:
    """A path from the root, the package or the folders of tools; a bare name may be any file's."""
    if "/" not in name:
        return name in names
    return any((base / name).exists() for base in (ROOT, PACKAGE, ROOT / "tools"))


def missing_files(page: Path) -> list[str]:
    names = {
        path.name
        for folder in (PACKAGE, *(ROOT / name for name in ("recipes", "tools", "tests")))
        for path in folder.rglob("*")
        if path.suffix in (".py", ".jinja")
    }
    return sorted({name for name in CODE_FILE.findall(page.read_text()) if not is_there(name, names)})


def unknown_options(page: Path) -> list[str]:
    """`--options` that are spelled out nowhere in the code, with neither `-` nor `_`."""
    code = [path.read_text() for name in ("qwen3vl_disagg", "recipes", "tools") for path in (ROOT / name).rglob("*.py")]
    words = {word.replace("_", "-") for text in code for word in re.findall(r"[a-z][a-z0-9_-]+", text)}
    return sorted(set(OPTION.findall(page.read_text())) - words)


def too_wide(page: Path) -> list[str]:
    """Lines of prose beyond the width: not of tables, code, pictures."""
    found, fenced = [], False
    for line in page.read_text().splitlines():
        fenced ^= line.startswith("```")
        if len(line) > WIDTH and not fenced and not line.startswith(("|", "    ", "![")):
            found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_right_about_the_tree(page):
    assert broken_links(page) == []
    assert missing_files(page) == [] or page.name == "CHANGELOG.md"
    assert unknown_options(page) == [] or page.name == "CHANGELOG.md"
    assert too_wide(page) == [] or page.name == "CHANGELOG.md"
    assert page.name in WITH_DATES or DATE.findall(page.read_text()) == []


def test_the_ways_of_an_image_and_of_its_rows_go_through_functions_that_exist():
    found = ways((ROOT / "docs" / "architecture.md").read_text())
    assert set(found) == set(WAYS)
    for heading, steps in found.items():
        assert [f"{file}: {name}" for file, name in steps if not has_function(PACKAGE / file, name)] == []
        assert len({file for file, _ in steps}) <= WAYS[heading], f"{heading}: longer than it was"


@pytest.mark.parametrize("page", sorted({page for page, _, _ in TABLES.values()}))
def test_tables_are_those_of_the_code(page):
    text = (ROOT / page).read_text()
    assert write_tables(text, page) == text, f"python -m tools.doc_tables {page}"


def flags_of(options: type) -> Iterator[str]:
    kinds = get_type_hints(options)
    for field in dataclasses.fields(options):
        kind = kinds[field.name]
        yield from flags_of(kind) if dataclasses.is_dataclass(kind) else [field.name.replace("_", "-")]


def test_the_servers_options_are_all_told():
    table = (ROOT / "docs" / "serving.md").read_text().split("\n## ")[0]
    told = [flag for row in re.findall(r"^\| (`--.*?) \| ", table, re.MULTILINE) for flag in OPTION.findall(row)]
    assert sorted(told) == sorted(flags_of(ServeOptions))


def test_the_death_of_an_encode_rank_goes_through_functions_that_exist():
    [(_, steps)] = ways((ROOT / "docs" / "transfer.md").read_text()).items()
    assert len(steps) > 10
    assert [f"{file}: {name}" for file, name in steps if not has_function(PACKAGE / file, name)] == []


def test_pages_that_code_names_exist():
    files = [path for name in ("qwen3vl_disagg", "recipes", "tools", "tests") for path in (ROOT / name).rglob("*.py")]
    named = {(path, name) for path in files for name in PAGE_NAME.findall(path.read_text())}
    assert len(named) > 10
    assert [f"{path.relative_to(ROOT)}: {name}" for path, name in sorted(named) if not (ROOT / name).exists()] == []


def test_what_is_wrong_is_noticed(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "# A b\n[x](gone.md) [y](#a-b) [z](#c) `no_such_file.py`, `engine/no_such.py`, `tools/*.py`\n" + "w" * 121
    )
    assert broken_links(page) == ["gone.md", "#c"]
    assert missing_files(page) == ["engine/no_such.py", "no_such_file.py"]
    assert len(too_wide(page)) == 1
    page.write_text("def f():\n    def g(): ...\n\nclass A:\n    async def h(self): ...\n")
    names = ["f", "f.g", "A.h", "g.f", "A.f", "h.A", "i"]
    assert [name for name in names if has_function(page, name)] == ["f", "f.g", "A.h"]
    page.write_text("`--encode-ranks 2 --never-an-option`")
    assert unknown_options(page) == ["never-an-option"]
    assert DATE.findall("on 2026-11-21, v2.2026-1") == ["2026-11-21"]
