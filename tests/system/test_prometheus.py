"""A real Prometheus reads `/metrics` while encode ranks die; at the end it has what the clients have counted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.scenes import ask_scenes
from tests.support.server import Server, free_port

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]
NUM_REQUESTS, KILLS_AT, AT_ONCE = 1000, (300, 600), 6
ROUTE = "/v1/chat/completions"


class Prometheus:
    """Reads a server's metrics each second, as a context manager."""

    def __init__(self, folder: Path, target: str) -> None:
        self.port, config = free_port(), folder / "prometheus.yml"
        job = {"job_name": "q3vl", "static_configs": [{"targets": [target]}]}
        config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))  # JSON is YAML
        self.command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
        self.command.append(f"--web.listen-address=127.0.0.1:{self.port}")
        self.log = (folder / "prometheus.log").open("w")

    def __enter__(self) -> Prometheus:
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)
        self.log.close()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values, as they are now."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url, timeout=10) as response:
            found = json.load(response)["data"]["result"]
        return [(entry["metric"], float(entry["value"][1])) for entry in found]

    def by(self, name: str, label: str) -> dict[str, float]:
        return {labels[label]: value for labels, value in self.query(f"sum by ({label}) ({name})") if value}

    def total(self, name: str) -> float:
        [(_, value)] = self.query(f"sum({name})")
        return value


def test_counters_are_what_clients_have_counted(tmp_path: Path):
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        pytest.skip("prometheus is not installed")
    asked = ask_scenes(tmp_path / "scenes", seed=11, count=NUM_REQUESTS)
    counts, lock, done = Counter[str](), threading.Lock(), Counter[str]()
    with (
        Server(4, "--encode-ranks", "2") as server,
        Prometheus(tmp_path, server.url.removeprefix("http://")) as prometheus,
    ):

        def ask(number: int) -> None:
            one = asked[number]
            content = one.question if number % 3 == 0 else one.content()
            status, body = server.chat(content, max_tokens=8, logprobs=None, top_logprobs=None)
            with lock:
                counts[f"status {status}"] += 1
                if status == 200:
                    counts[body["choices"][0]["finish_reason"]] += 1
                    counts["prompt"] += body["usage"]["prompt_tokens"]
                    counts["generated"] += body["usage"]["completion_tokens"]
                    counts["items"] += len(body["timings"]["items"])
                done["requests"] += 1

        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = [pool.submit(ask, number) for number in range(NUM_REQUESTS)]
            for at in KILLS_AT:
                while done["requests"] < at:
                    time.sleep(0.05)
                victim = next(p["pid"] for p in server.processes() if p["role"] == "encode")
                os.kill(victim, signal.SIGKILL)
            for future in futures:
                future.result(300)
        statuses = {name.removeprefix("status "): n for name, n in counts.items() if name.startswith("status ")}
        requests = f'q3vl_http_requests_total{{path="{ROUTE}"}}'
        end = time.monotonic() + 15
        while prometheus.by(requests, "status") != statuses and time.monotonic() < end:
            time.sleep(0.5)
        time.sleep(2.5)  # one more look, of what came with the last of them
        print(dict(counts))
        assert prometheus.by(requests, "status") == statuses
        reasons = {name: counts[name] for name in ("stop", "length") if counts[name]}
        assert prometheus.by("q3vl_request_success_total", "finished_reason") == reasons
        assert prometheus.total("q3vl_prompt_tokens_total") == counts["prompt"]
        assert prometheus.total("q3vl_generation_tokens_total") == counts["generated"]
        assert prometheus.total("q3vl_e2e_request_latency_seconds_count") == counts["stop"] + counts["length"]
        # Some were in the prefix cache: of no more than half of these scenes.
        assert counts["items"] / 2 < prometheus.total("q3vl_mm_cache_queries_total") <= counts["items"]
        assert prometheus.query('min_over_time(up{job="q3vl"}[10m])')[0][1] == 1
        assert statuses["200"] >= 0.99 * NUM_REQUESTS  # typed refusals aside: nothing else may come
        assert set(statuses) <= {"200", "429", "503"}
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
            page = response.read()
        checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, timeout=30)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
