"""A real server on its worst days: kills, stops, cuts, bursts, bad input, hang-ups; every answer is checked.

    python tools/chaos.py --hours 0.05 --seed 1 --log chaos.jsonl
    python tools/chaos.py --hours 1 --seed 2 --json --plot chaos.png
    python tools/chaos.py --replay chaos.jsonl

Ends with status 0 when no answer was wrong, lost, late for ever, or a 500, connections were cut by deaths of the
frontend alone, and the server was whole afterwards and left nothing; 1 otherwise; 2 for bad arguments.
docs/chaos.md says what is done and counted. Linux only; as root it also cuts the network.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen3vl_disagg.core.errors import DisaggError, InputError, report
from tools.bench_served import REPO
from tools.chaos_parts.bad_input import bad_requests
from tools.chaos_parts.far_host import FarHost
from tools.chaos_parts.job import Server
from tools.chaos_parts.load import Load
from tools.chaos_parts.ordeal import Ordeal, afterwards
from tools.chaos_parts.questions import Asked, read_pool
from tools.chaos_parts.record import Record
from tools.chaos_parts.report import conclude, draw, table
from tools.chaos_parts.schedule import KINDS, Event, events_of, schedule

POOL_S = 600.0


@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    hours: float | None = None
    """How long clients ask; 0.05 are three minutes. Start and end come on top."""
    seed: int = 0
    """Decides events and their times, and the questions."""
    world: int = 3
    """Ranks of the server."""
    encode_ranks: int = 2
    """How many of them encode."""
    clients: int = 6
    """That ask one question after another."""
    every: float = 6.0
    """Seconds from one event to the next, on average."""
    only: tuple[str, ...] = ()
    """Kinds of events, as `kill-encode`; without it all."""
    calm: float = 0.0
    """Seconds without an event at first, to compare with."""
    questions: int = 60
    """Different requests."""
    request_timeout: float = 60.0
    """Seconds that the server has for a request; who has heard nothing 20 s later hangs."""
    kill_language: bool = False
    """Kill language ranks, too. The job ends with each, and is started again."""
    pool: Path | None = None
    """Keep the requests and their answers in this file, and take them from it if it is there."""
    log: Path | None = None
    """Write each event, request and sample as a line of JSON."""
    replay: Path | None = None
    """Run the events of this log again, with its settings."""
    plot: Path | None = None
    """Draw memory and descriptors of all processes; needs matplotlib."""
    json: bool = False
    """Print one JSON object in place of text."""


REPLAYED = (
    *("hours", "seed", "world", "encode_ranks", "clients"),
    *("every", "calm", "questions", "request_timeout", "kill_language"),
)
"""What a log says of its run."""


def main() -> int:
    options = tyro.cli(ChaosOptions, description=__doc__)
    signal.signal(signal.SIGTERM, _leave)
    try:
        settings, events = plan(options)
        result = run(settings, events)
    except DisaggError as error:
        return report(error)
    print(json.dumps(result) if options.json else table(result))
    return 0 if result["ok"] else 1


def _leave(*_: object) -> None:
    """What has begun is ended on the way out."""
    raise SystemExit(1)


def plan(options: ChaosOptions) -> tuple[ChaosOptions, list[Event]]:
    """What will be done. InputError for arguments that cannot be."""
    events: list[Event] | None = None
    if options.replay is not None:
        try:
            lines = options.replay.read_text().splitlines()
        except OSError as error:
            raise InputError(f"{options.replay}: {error.strerror}", param="replay") from None
        settings, events = events_of(lines)
        if unknown := settings.keys() - set(REPLAYED):
            raise InputError(f"settings that are none: {sorted(unknown)}", param="replay")
        options = replace(options, **settings)
    check(options)
    hours = options.hours or 0.0
    return options, events if events is not None else _schedule(options, hours * 3600)


def _schedule(options: ChaosOptions, seconds: float) -> list[Event]:
    return schedule(options.seed, seconds, options.every, calm_s=options.calm, only=options.only)


def check(options: ChaosOptions) -> None:
    if options.hours is None or not 0 < options.hours <= 1000:
        raise InputError(f"--hours {options.hours}: must be more than 0, and at most 1000", param="hours")
    if not 1 <= options.encode_ranks < options.world <= 64:
        split = f"--world {options.world} --encode-ranks {options.encode_ranks}"
        raise InputError(f"{split}: there must be ranks of both kinds", param="world")
    for name in ("clients", "questions"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: must be at least 1", param=name)
    for name in ("every", "request_timeout"):
        if not getattr(options, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be more than 0", param=name)
    if not 0 <= options.calm < options.hours * 3600:
        raise InputError(f"--calm {options.calm:g}: must be shorter than --hours", param="calm")
    if unknown := sorted(set(options.only) - KINDS.keys()):
        raise InputError(f"--only {' '.join(unknown)}: the kinds are {', '.join(KINDS)}", param="only")
    if "kill-language" in options.only and not options.kill_language:
        raise InputError("--only kill-language: needs --kill-language", param="only")
    for name in ("pool", "log", "plot"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"--{name} {path}: there is no such folder", param=name)


def questions(options: ChaosOptions) -> list[Asked]:
    """With the answers of one process, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = options.pool or Path(folder) / "pool.json"
        if not path.is_file():
            command = [sys.executable, "-m", "tools.chaos_parts.questions", "--seed", str(options.seed)]
            command += ["--count", str(options.questions), "--out", str(path)]
            subprocess.run(command, cwd=REPO, check=True, timeout=POOL_S, stdout=subprocess.DEVNULL)
        return read_pool(path)


def run(options: ChaosOptions, events: list[Event]) -> dict[str, Any]:
    """From start to end; whatever happens, nothing of it is left."""
    pool = questions(options)
    seconds = (options.hours or 0.0) * 3600
    with Record(options.log) as record, FarHost() as far:
        settings = asdict(options)
        record.plan({name: settings[name] for name in REPLAYED}, events)
        server = Server(options.world, options.encode_ranks, options.request_timeout, far)
        bad = bad_requests()
        load = Load(server.port, pool, bad, record, options.request_timeout)
        try:
            _say(options, f"starting the server; its log: {server.log}")
            server.start()
            record.begin()
            _say(options, f"{len(events)} events in {seconds:.0f} s")
            load.start(options.clients, options.seed)
            Ordeal(server, load, record, far, kills_language=options.kill_language).follow(events, seconds)
            load.stop()
            if still := load.join(load.most_s):
                record.trouble(f"{still} clients did not end")
            seconds = record.now()
            afterwards(server, load, record, pool, bad)
            for trouble in server.end():
                record.trouble(trouble)
        except RuntimeError as error:  # the server does not come up any more: what was seen is told
            record.trouble(str(error))
        finally:
            load.stop()
            server.kill()
        result = {"seed": options.seed, **conclude(record, seconds, options.calm), "server_log": str(server.log)}
        record.line({"what": "end", "result": result})
        if options.plot is not None:
            draw(record.samples, options.plot)
    return result


def _say(options: ChaosOptions, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
