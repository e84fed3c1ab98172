"""Try clients, unchanged, against servers of this project, and write what works as a table.

    python tools/acceptance/run.py [CLIENT ...] [--environments DIR] [--only FEATURE] [--write docs/clients.md]

Each client gets an environment of its own (venv or node_modules), which is kept. Two servers are started: one of the
small checkpoint with two ranks, and the application over a backend that plays a script. A client is told the base URL
and a key. Exit 1 where a cell is not what the client's script expects, or a client could not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from qwen3vl_disagg.assets.drawing import draw_scene
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from tools.acceptance.catalogue import CLIENTS, FEATURES, Client
from tools.bench_served import REPO, Served
from tools.doc_tables import put_table

HERE = Path(__file__).resolve().parent
KEY = "sk-acceptance"
NAMES = ("tiny", "gpt-5.5", "gpt-4o-mini", "claude-opus-5-5")
"""What the model is called: the names that quick starts use, too."""
PLACES = 16
"""Of the server, for requests that run: fewer than the streams that are cancelled at once."""
INSTALLS = 4
"""At once: they wait for the registries more than they compute."""
STARTS_S = 240.0
"""In which the scripted server must be there, on a machine that others use, too."""


class Cell(NamedTuple):
    feature: str
    result: str
    expect: str
    detail: str


def install(client: Client, folder: Path) -> None:
    """Once for a list of packages."""
    done = folder / "packages.json"
    wanted = json.dumps(client.packages)
    if done.exists() and done.read_text() == wanted:
        return
    print(f"{client.name}: installing", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if client.is_node:
        (folder / "package.json").write_text('{"private": true}\n')
        run = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run([*run, *client.packages], cwd=folder, check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *client.packages], check=True)
    done.write_text(wanted)


def version(client: Client, folder: Path) -> str:
    """The client's name with its version, and packages that it comes with as plugins."""
    if client.is_node:
        first, *more = [name.removesuffix("@latest") for name in client.packages if name.endswith("@latest")]
        said = {client.name: first} | {name: name for name in more}
        files = {name: folder / "node_modules" / package / "package.json" for name, package in said.items()}
        return ", ".join(f"{name} {json.loads(file.read_text())['version']}" for name, file in files.items())
    name = re.split(r"[\[=<>]", client.packages[0])[0]
    ask = f"from importlib.metadata import version; print(version({name!r}))"
    done = subprocess.run([str(folder / "bin" / "python"), "-c", ask], capture_output=True, text=True, check=True)
    return f"{name.replace('_', '-')} {done.stdout.strip()}"


def prepare(chosen: Sequence[Client], environments: Path) -> tuple[dict[str, Client], list[str]]:
    """Those whose environment is there, by heading; a line for each other."""
    ready, wrong = {}, []
    pool = ThreadPoolExecutor(INSTALLS)
    try:
        installs = [pool.submit(install, client, environments / client.name) for client in chosen]
        for client, installed in zip(chosen, installs, strict=True):
            try:
                installed.result()
                ready[version(client, environments / client.name)] = client
            except (subprocess.CalledProcessError, OSError) as error:
                wrong.append(f"{client.name}: no environment at {environments / client.name}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)  # on SIGTERM: what has begun is made to its end
    return ready, wrong


def draw(folder: Path) -> dict[str, str]:
    """A scene with a red circle at its top left, and a clip of it; their places, as scripts are told."""
    import av  # of an extra

    picture = draw_scene([("red", "circle"), *[None] * 8], (128, 128), random.Random(1))
    picture.save(folder / "scene.png")
    with av.open(str(folder / "scene.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = *picture.size, "yuv420p"
        for _ in range(8):
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
    return {"ACCEPTANCE_IMAGE": str(folder / "scene.png"), "ACCEPTANCE_CLIP": str(folder / "scene.mp4")}


@contextmanager
def scripted(picture: Path) -> Iterator[dict[str, str]]:
    """The application over a script; where it and its picture are. RuntimeError when it does not come up."""
    run = [sys.executable, "-m", "tests.support.scripted_server", KEY, str(picture)]
    server = subprocess.Popen(run, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin
    assert server.stdout
    late = threading.Timer(STARTS_S, server.kill)
    try:
        late.start()
        lines = [server.stdout.readline() for _ in range(2)]
        late.cancel()
        if not all(lines):
            raise RuntimeError(f"the scripted server did not come up in {STARTS_S:.0f} s (exit {server.wait(5)})")
        told = dict(line.strip().split(": ", 1) for line in lines)
        yield {"ACCEPTANCE_SCRIPTED": told["ready"], "ACCEPTANCE_IMAGE_URL": told["picture"]}
    finally:
        late.cancel()
        server.stdin.close()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def fits(result: str, expect: str) -> bool:
    """Some clients tell of an error its status alone."""
    return result in (expect, expect.partition(" ")[0])


def run_script(client: Client, variant: str, folder: Path, told: dict[str, str]) -> list[Cell]:
    """All checks of a client's script, in a folder of their own. A script that ends early has a cell for that."""
    env = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")} | told
    with tempfile.TemporaryDirectory() as scratch:
        env |= {"HOME": scratch, "TMPDIR": scratch}
        if client.is_node:
            for name in ("checks.mjs", f"clients/{client.script}"):
                shutil.copy(HERE / name, folder)  # modules are looked for from where a script lies
            run = [str(folder / "node_modules" / ".bin" / "node"), str(folder / client.script), variant]
        else:
            run = [str(folder / "bin" / "python"), "-P", str(HERE / "clients" / client.script), variant]
            for name in ("checks.py", "chat_checks.py", "city.py"):  # what a script imports, and not the package
                (Path(scratch) / "tools" / "acceptance").mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO / "tools" / "acceptance" / name, Path(scratch) / "tools" / "acceptance")
            env |= {"PYTHONPATH": scratch, "PATH": f"{folder / 'bin'}:{env['PATH']}"}
        log = Path(scratch) / "log"
        with log.open("w") as out:
            process = subprocess.Popen(
                run, cwd=scratch, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
            try:
                status: int | str = process.wait(client.limit_s)
            except subprocess.TimeoutExpired:
                status = f"not done after {client.limit_s} s"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
        text = log.read_text(errors="replace")
    cells = [Cell(*json.loads(line[5:])) for line in text.splitlines() if line.startswith("CELL ")]
    asked = re.findall(r"^CHECKS (\d+)$", text, re.MULTILINE)
    if status != 0:
        cells.append(Cell("(the script)", f"exit {status}", "exit 0", text[-3000:]))
    elif asked != [str(len(cells))] or not (cells or told.get("ACCEPTANCE_ONLY")):
        cells.append(Cell("(the script)", f"{len(cells)} cells", f"{' + '.join(asked) or 'some'}", text[-3000:]))
    return cells


def try_client(client: Client, environments: Path, told: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Cells by feature, of several variants with a slash between them; and what is not as expected, with details."""
    found: dict[str, list[str]] = {}
    wrong = []
    for variant in client.variants:
        name = f"{client.name} {variant}".strip()
        for feature, result, expect, detail in run_script(client, variant, environments / client.name, told):
            found.setdefault(feature, []).append(result)
            mark = "" if fits(result, expect) else f"   <- {expect} expected"
            print(f"{name}: {feature}: {result}{mark}", flush=True)
            if mark:
                wrong.append(f"{name}: {feature}: {result}, {expect} expected\n{detail}")
            if feature not in FEATURES and feature != "(the script)":
                wrong.append(f"{name}: {feature} is no row of FEATURES")
    return {
        feature: cells[0] if len(set(cells)) == 1 and len(cells) == len(client.variants) else " / ".join(cells)
        for feature, cells in found.items()
    }, wrong


def table(columns: dict[str, dict[str, str]]) -> list[list[str]]:
    """A row for each feature that somebody was asked for, a cell for each client."""
    rows = []
    for feature in FEATURES:
        cells = [column.get(feature, ".") for column in columns.values()]
        if set(cells) != {"."}:
            rows.append([feature, *cells])
    return rows


def try_all(clients: dict[str, Client], environments: Path, only: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The cells of each client, by heading, from servers that are started for it; and what is not as expected."""
    columns, wrong = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        told = draw(Path(scratch))
        (Path(scratch) / "keys").write_text(KEY + "\n")
        options = ["--api-key-file", f"{scratch}/keys", "--allow-media-path", scratch, "--max-answer-tokens", "1024"]
        options += [word for name in NAMES for word in ("--served-model-name", name)]
        with (
            Served(2, [*options, "--max-running", str(PLACES)]) as server,
            Served(1, [*options, "--task", "embed"]) as vectors,
            scripted(Path(told["ACCEPTANCE_IMAGE"])) as more,
        ):
            root = f"http://127.0.0.1:{server.port}"
            told |= more | {
                "ACCEPTANCE_ROOT": root,
                "ACCEPTANCE_VECTORS": f"http://127.0.0.1:{vectors.port}",
                "ACCEPTANCE_MODEL": NAMES[0],
                "ACCEPTANCE_FOLDER": str(resolve_model_folder(None)),
                "ACCEPTANCE_ONLY": only,
                "OPENAI_BASE_URL": f"{root}/v1",
                "OPENAI_API_KEY": KEY,
                "OPENAI_DEFAULT_MODEL": NAMES[0],
                "HOSTED_VLLM_API_KEY": KEY,
                "ANTHROPIC_BASE_URL": root,
                "ANTHROPIC_API_KEY": KEY,
            }
            for heading, client in clients.items():
                columns[heading], more_wrong = try_client(client, environments, told)
                wrong += more_wrong
    return columns, wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [client.name for client in CLIENTS]
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(names)}; default: all")
    default = Path.home() / ".cache" / "qwen3vl-disagg" / "acceptance"
    parser.add_argument("--environments", type=Path, default=default, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="FEATURE", help="features that have this in their name")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table of all clients into this document")
    args = parser.parse_args(argv)
    if unknown := set(args.clients) - set(names):
        parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not any(args.only in feature for feature in FEATURES):
        parser.error(f"no feature has {args.only!r} in its name; there are {', '.join(FEATURES)}")
    if args.write and (args.clients or args.only):
        parser.error("--write puts the whole table: it takes neither clients nor --only")
    try:
        page = put_table(args.write.read_text(), "clients", [], []) if args.write else ""
    except (OSError, ValueError) as error:
        parser.error(f"--write: {error}")
    if find_spec("av") is None:
        parser.error("the clip is made with PyAV: install the extras serve and video")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and what was started is ended
    chosen = [client for client in CLIENTS if client.name in (args.clients or names)]
    environments = args.environments.resolve()
    ready, absent = prepare(chosen, environments)
    columns, wrong = try_all(ready, environments, args.only) if ready else ({}, [])
    wrong = absent + wrong
    heads, rows = ["", *columns], table(columns)
    if args.write and not absent:
        page = put_table(page, "clients", heads, rows)
        args.write.write_text(re.sub(r"(?ms)^Tried on .*?(?=\n\n)", time.strftime("Tried on %Y-%m-%d:"), page))
    else:
        print("\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]))
    print("\n\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
