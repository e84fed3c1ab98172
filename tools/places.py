"""The same answers by every route: questions that ask for places on drawn screens, beside those of `transformers`.

    python tools/places.py --questions 1000 --answers places.json
    python tools/places.py --questions 100 --routes llm,one-plus-one,hit --json

Ends with status 0 where no answer of any route is wrong: each is the oracle's, or parts from it in a near tie. 1
otherwise, and where a route was not taken; 2 for bad arguments. docs/chaos.md says what the routes are.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen3vl_disagg.assets import tiny_folder
from qwen3vl_disagg.core.errors import DisaggError, InputError, report
from tools.bench_served import REPO
from tools.places_parts.answers import Answers, read_answers, wide_folder
from tools.places_parts.questions import Question, questions
from tools.places_parts.routes import ROUTES, Taken
from tools.places_parts.verdicts import Said, conclude

ORACLE_S = 3600.0
MAX_QUESTIONS = 100_000


@dataclass(frozen=True, kw_only=True)
class PlacesOptions:
    questions: int = 1000
    """How many are asked on each route."""
    seed: int = 1
    """Decides screens and questions."""
    routes: str = ",".join(ROUTES)
    """Names with commas between them."""
    answers: Path | None = None
    """Keep the oracle's answers in this file, and take them from it if it is there. Without it they are made anew,
    which needs `transformers`."""
    json: bool = False
    """Print one JSON object in place of text."""


def main() -> int:
    options = tyro.cli(PlacesOptions, description=__doc__)
    signal.signal(signal.SIGTERM, _leave)
    try:
        result = run(options, names_of(options))
    except DisaggError as error:
        return report(error)
    if options.json:
        print(json.dumps(result))
    return 0 if result["ok"] else 1


def _leave(*_: object) -> None:
    """What has begun is ended on the way out."""
    raise SystemExit(1)


def names_of(options: PlacesOptions) -> list[str]:
    """The routes. InputError for arguments that cannot be."""
    if not 1 <= options.questions <= MAX_QUESTIONS:
        raise InputError(f"--questions {options.questions}: must be from 1 to {MAX_QUESTIONS}", param="questions")
    names = [name.strip() for name in options.routes.split(",")]
    if unknown := [name for name in names if name not in ROUTES]:
        raise InputError(f"--routes {unknown[0]!r}: must be of {', '.join(ROUTES)}", param="routes")
    if options.answers is not None and not options.answers.absolute().parent.is_dir():
        raise InputError(f"--answers {options.answers}: there is no such folder", param="answers")
    return names


def expected(path: Path, folder: Path, asked: list[Question], options: PlacesOptions, dtypes: list[str]) -> Answers:
    """From the file, which a process of its own writes if it is not there."""
    if not path.is_file():
        if importlib.util.find_spec("transformers") is None:
            raise InputError("the oracle's answers need transformers: pip install 'qwen3vl-disagg[dev]'")
        command = [sys.executable, "-m", "tools.places_parts.oracle", "--folder", str(folder), "--out", str(path)]
        command += ["--seed", str(options.seed), "--count", str(len(asked)), "--dtypes", *dtypes]
        subprocess.run(command, cwd=REPO, check=True, timeout=ORACLE_S, stdout=subprocess.DEVNULL)
    return read_answers(path, folder, asked, dtypes)


def run(options: PlacesOptions, names: list[str]) -> dict[str, Any]:
    """All routes, one after another, on the small checkpoint with room for larger pictures."""
    import torch

    torch.set_num_threads(1)
    asked = list(questions(options.seed, options.questions))
    dtypes = sorted({ROUTES[name].dtype for name in (names if options.answers is None else ROUTES)})
    with tempfile.TemporaryDirectory(prefix="places-") as temporary:
        folder = wide_folder(tiny_folder(), Path(temporary) / "model")
        path = options.answers or Path(temporary) / "answers.json"
        answers = expected(path, folder, asked, options, dtypes)
        right = sum(one.text == q.truth for one, q in zip(answers.answers[dtypes[-1]], asked, strict=True))
        _say(options, f"{len(asked)} questions; the oracle has the right place in {right}")
        routes = {name: take(name, folder, asked, answers, options) for name in names}
    return {
        "questions": len(asked),
        "seed": options.seed,
        "versions": answers.versions,
        "right": right,
        "routes": routes,
        "ok": all(route["ok"] for route in routes.values()),
    }


def take(name: str, folder: Path, asked: list[Question], answers: Answers, options: PlacesOptions) -> dict[str, Any]:
    route, started = ROUTES[name], time.monotonic()
    try:
        taken = route.take(folder, asked)
    except RuntimeError as error:  # the server did not come up
        taken = Taken([Said(trouble="not asked")] * len(asked), str(error))
    found = conclude(asked, taken.answers, answers.answers[route.dtype], route.bound)
    found |= {"seconds": round(time.monotonic() - started, 1), "note": taken.note, "not taken": taken.trouble}
    found["ok"] = not taken.trouble and found["wrong" if route.is_exact else "unanswered"] == 0
    _say(options, f"{name}: {line_of(found, is_exact=route.is_exact, bound=route.bound)}")
    for example in () if found["ok"] else found["examples"]:
        _say(options, f"  {example['question']}: {example['said']!r}, not {example['expected']!r} {example['trouble']}")
    return found


def line_of(found: dict[str, Any], *, is_exact: bool, bound: float) -> str:
    near = f"{found['near ties']} near ties (within {bound:g})"
    near += f", {found['as float32']} as float32" if found["as float32"] else ""
    wrong = f"{found['wrong']} {'wrong' if is_exact else 'others'}"
    counts = (
        f"{found['asked']} asked, {found['equal']} equal, {near}, {wrong}, {found['different texts']} different texts"
    )
    notes = [f"{found['seconds']} s", found["note"], found["not taken"] and f"NOT TAKEN: {found['not taken']}"]
    return f"{counts}; {', '.join(note for note in notes if note)}"


def _say(options: PlacesOptions, text: str) -> None:
    print(text, file=sys.stderr if options.json else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
