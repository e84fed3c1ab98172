"""Rules that hold for the whole tree: imports go down, nothing is unpickled, files fit one head."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "qwen3vl_disagg"
ROOMS = [
    "core",
    "options",
    "media",
    "kernels",
    "model",
    "processing",
    "checkpoint",
    "protocol",
    "transport",
    "parallel",
    "cluster",
    "engine",
    "encode",
    "language",
    "plan",
    "llm",
    "serving",
    "assets",
    "launch",
    "generate",
    "cli",
]
"""Bottom to top: a room imports itself and rooms before it. The package's own `__init__` stands beside `cli`."""
MAX_LINES = 500
SPINE = tuple(f"{PACKAGE}/{room}" for room in ("model", "protocol", "transport", "encode", "language", "engine"))
NUM_LINES = {"spine": (SPINE, 15_444, 8_000), "package": ((PACKAGE,), 44_249, 19_500)}
"""The folders, the lines they have at most, and the lines they should have."""
SOURCES = ("qwen3vl_disagg", "recipes", "tools")

FORMATTER_OFF = re.compile(r"#\s*(?:isort|fmt|yapf):\s*(?:skip|off)")
DOUBLES = {
    "_Entry": "private to its file",
}
"""Class names that are there twice, and why."""

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLING_NAMES = {"recv_pyobj", "send_pyobj", "recv_object", "send_object", "allow_pickle", "weights_only"}


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere; `from a import b` gives `a.b`, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    return parts[1].removesuffix(".py") if parts[0] == PACKAGE else parts[0]


def height(room: str) -> int:
    """Position of a room; what is not a room of the package stands above all of them."""
    if room in ("__init__", "__main__"):
        return ROOMS.index("cli")
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def upward_imports(root: Path) -> list[str]:
    found = []
    for path in python_files(root, *SOURCES):
        room, where = room_of(path, root), path.relative_to(root)
        for line, name in imported_modules(ast.parse(path.read_text())):
            if name.startswith("."):
                found.append(f"{where}:{line}: relative import {name}")
                continue
            top, *rest = name.split(".")
            if top not in SOURCES:
                continue
            target = rest[0] if top == PACKAGE and rest and rest[0] in ROOMS else "__init__"
            if (top == PACKAGE and height(target) > height(room)) or (top != PACKAGE and room in ROOMS):
                found.append(f"{where}:{line}: {room} imports {name}")
    return found


def imports_of_files(root: Path) -> dict[str, set[str]]:
    """Module -> modules whose files it imports, anywhere in it. `from a import b` is `a.b` if that is a file."""
    names = {}
    for path in python_files(root, *SOURCES):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for module, path in names.items():
        found[module] = set()
        for _, name in imported_modules(ast.parse(path.read_text())):
            while name and name not in names:
                name = name.rpartition(".")[0]
            found[module] |= {name} - {"", module}
    return found


def circles(root: Path) -> list[set[str]]:
    """Files that import one another, directly or by way of others."""
    imports = imports_of_files(root)
    reached = {module: set(targets) for module, targets in imports.items()}
    for middle in imports:
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    found = [
        {module} | {other for other in targets if module in reached[other]}
        for module, targets in reached.items()
        if module in targets
    ]
    return [circle for index, circle in enumerate(found) if circle not in found[:index]]


def num_lines(root: Path, *folders: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in python_files(root, *folders))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain on a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def unpickling(root: Path) -> list[str]:
    found = []
    for path in python_files(root, *SOURCES):
        where, tree = path.relative_to(root), ast.parse(path.read_text())
        names = [
            *imported_modules(tree),
            *((node.lineno, dotted(node)) for node in ast.walk(tree) if isinstance(node, ast.Attribute)),
            *((node.value.lineno, node.arg) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg),
        ]
        for line, name in names:
            last = name.rpartition(".")[2]
            if (
                PICKLERS & set(name.split("."))
                or last in UNPICKLING_NAMES
                or last.endswith("_object_list")
                or name in ("torch.load", "torch.save")
            ):
                found.append(f"{where}:{line}: {name}")
    return found


def uses(root: Path, folder: str, module: str) -> list[str]:
    """Imports of `module`, and dotted names below it, in a folder."""
    found = []
    for path in python_files(root, folder):
        tree = ast.parse(path.read_text())
        names = [
            *imported_modules(tree),
            *((n.lineno, dotted(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute)),
        ]
        found += [
            f"{path.relative_to(root)}:{line}: {name}" for line, name in names if f"{name}.".startswith(f"{module}.")
        ]
    return found


def doubles(root: Path) -> dict[str, list[str]]:
    """Class name -> the files of the package that have one of that name, where it is more than one."""
    found: dict[str, list[str]] = {}
    for path in python_files(root, PACKAGE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(path.relative_to(root / PACKAGE).as_posix())
    return {name: files for name, files in found.items() if len(files) > 1}


def unformatted(root: Path) -> list[str]:
    """Lines that keep the formatter or the sorter of imports away."""
    return [
        f"{path.relative_to(root)}:{number}"
        for path in python_files(root, *SOURCES, "tests")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FORMATTER_OFF.search(line)
    ]


def long_files(root: Path) -> list[str]:
    lines = {path: len(path.read_text().splitlines()) for path in python_files(root, *SOURCES, "tests")}
    return [f"{path.relative_to(root)}: {count} lines" for path, count in lines.items() if count > MAX_LINES]


def test_the_wheel_has_neither_simulator_nor_planted_bugs_nor_training():
    names = {path.stem for path in python_files(ROOT, PACKAGE)}
    assert not names & {"simulation", "simulate", "mutants", "lessons", "evaluate", "make_tokenizer"}
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert found == {"include": [f"{PACKAGE}*"]}


def test_every_folder_of_the_package_is_a_room():
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(ROOMS)
    assert len(python_files(ROOT, *SOURCES)) > 20


def test_imports_go_down():
    assert upward_imports(ROOT) == []


def scripts_without_path(root: Path) -> list[str]:
    """What is run as `python FOLDER/FILE.py` finds its own folder, and `tools` only if it says where that is."""
    found = []
    for path in sorted([*root.glob("tools/*.py"), *root.glob("recipes/*.py")]):
        text = path.read_text()
        if "__main__" in text and re.search(r"^(from|import) tools\b", text, re.MULTILINE):
            found += [] if re.search(r"^sys\.path\.insert", text, re.MULTILINE) else [str(path.relative_to(root))]
    return found


def test_scripts_find_the_tools(tmp_path):
    assert scripts_without_path(ROOT) == []
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "a.py").write_text("from tools.b import c\nif __name__ == '__main__':\n    c()\n")
    assert scripts_without_path(tmp_path) == ["tools/a.py"]


def test_no_files_import_one_another():
    assert circles(ROOT) == []


def test_nothing_is_pickled():
    assert unpickling(ROOT) == []


def test_the_oracle_stays_in_the_tests():
    found = [use for folder in SOURCES for use in uses(ROOT, folder, "transformers")]
    measured_against = {
        *("tools/bench_contestants/hf_transformers.py", "tools/acceptance/clients/lm_eval.py"),
        *("tools/gpu_steps/oracle.py", "tools/places_parts/oracle.py"),
    }
    assert {use.split(":")[0] for use in found} == measured_against


def test_models_know_nothing_of_ranks():
    assert uses(ROOT, f"{PACKAGE}/model", "torch.distributed") == []


def test_files_fit_one_head():
    assert long_files(ROOT) == []


def test_a_class_name_is_there_once():
    assert set(doubles(ROOT)) == set(DOUBLES), "a new one needs a reason, one that is gone needs none"


@pytest.mark.parametrize("what", NUM_LINES)
def test_the_code_does_not_grow(what):
    """Where more is needed, something else can go. Where it is less, the number comes down with it."""
    folders, most, target = NUM_LINES[what]
    assert num_lines(ROOT, *folders) <= most
    assert target <= most


def test_the_formatter_is_never_kept_away():
    assert unformatted(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("qwen3vl_disagg/core/a.py", "from qwen3vl_disagg.model import config"),
        ("qwen3vl_disagg/core/a.py", "def f():\n    import qwen3vl_disagg.cli"),
        ("qwen3vl_disagg/core/a.py", "from qwen3vl_disagg import model"),
        ("qwen3vl_disagg/core/a.py", "from qwen3vl_disagg import LLM"),
        ("qwen3vl_disagg/protocol/a.py", "from qwen3vl_disagg.engine.pages import Pages"),
        ("qwen3vl_disagg/engine/a.py", "from ..serving import app"),
        ("qwen3vl_disagg/serving/a.py", "import tools.make_checkpoint"),
        ("qwen3vl_disagg/assets/a.py", "from qwen3vl_disagg.cli import main"),
    ],
)
def test_an_upward_import_is_noticed(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line)
    (found,) = upward_imports(tmp_path)
    assert found.startswith(file)


@pytest.mark.parametrize("guard", ["", "if TYPE_CHECKING:\n    ", "def f():\n    "])
def test_a_circle_of_files_is_noticed(tmp_path, guard):
    room = tmp_path / PACKAGE / "core"
    room.mkdir(parents=True)
    for name, target in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")):
        line = f"{guard if name == 'c' else ''}from {PACKAGE}.core.{target} import X"
        (room / f"{name}.py").write_text(line)
    assert circles(tmp_path) == [{f"{PACKAGE}.core.{name}" for name in "abc"}]


@pytest.mark.parametrize(
    "line",
    [  # text for the check to find; nothing here is run
        "import pickle",
        "from multiprocessing.reduction import pickle",
        "import torch\ntorch.load('x')",
        "dist.broadcast_object_list(x)",
        "from torch.distributed import all_gather_object_list",
        "np.load(f, allow_pickle=True)",
        "socket.recv_pyobj()",
    ],
)
def test_unpickling_is_noticed(tmp_path, line):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "a.py").write_text(line)
    assert unpickling(tmp_path)


def test_the_other_rules_notice_too(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "a.py").write_text("import torch\ntorch.distributed.barrier()\n" + "\n" * MAX_LINES)
    (tmp_path / "tools" / "b.py").write_text("from transformers.utils import logging")
    assert uses(tmp_path, "tools", "torch.distributed")
    assert len(uses(tmp_path, "tools", "transformers")) == 1
    assert long_files(tmp_path) == [f"tools/a.py: {MAX_LINES + 2} lines"]
    (tmp_path / "tools" / "c.py").write_text(
        "a=1  # fmt" + ": skip\n# isort" + ":skip_file\n# fmt" + ": off\n# format: on"
    )
    assert num_lines(tmp_path, "tools") == MAX_LINES + 7
    assert unformatted(tmp_path) == ["tools/c.py:1", "tools/c.py:2", "tools/c.py:3"]
    for room in ("core", "model"):
        (tmp_path / PACKAGE / room).mkdir(parents=True)
        (tmp_path / PACKAGE / room / "a.py").write_text(f"class Twice:\n    class {room.title()}:\n        pass\n")
    assert doubles(tmp_path) == {"Twice": ["core/a.py", "model/a.py"]}
