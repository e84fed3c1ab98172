"""The page of what ranks do, in a real browser, with a key: a burst of images beside an answer that is being made.
Needs playwright and Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.scenes import ask_scenes
from tests.support.server import REPO, Server

pytestmark = pytest.mark.acceptance
BROWSER = shutil.which("chromium") or "/usr/bin/chromium"
KEY = {"x-api-key": "secret"}
NUM_IMAGES = 80


def post(server: Server, content: Any, max_tokens: int) -> Any:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"Content-Type": "application/json", **KEY}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def burst(server: Server, folder: Path, seed: int) -> None:
    """One long answer, and beside it questions about images that nobody has seen, all at once."""
    asked = [one for one in ask_scenes(folder, seed=seed, count=3 * NUM_IMAGES) if len(one.images) == 1][:NUM_IMAGES]
    long = threading.Thread(target=post, args=(server, "Tell a story.", 700))
    others = [threading.Thread(target=post, args=(server, one.content(), 60)) for one in asked]
    for thread in [long, *others]:
        thread.start()
    for thread in [long, *others]:
        thread.join(120)


def test_one_sees_encode_beside_decode_and_a_burst_of_images(tmp_path: Path):
    playwright = pytest.importorskip("playwright.sync_api")
    shots = Path(os.environ.get("UI_SHOTS", tmp_path))
    with Server(3, "--api-key", "secret", "--encode-ranks", "2") as server, playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for seed, (width, height) in enumerate(((1100, 800), (390, 800)), 1):
            page = browser.new_page(viewport={"width": width, "height": height})
            urls, problems = [], []
            page.on("request", lambda request, urls=urls: urls.append(request.url))
            page.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
            page.on("console", lambda message, problems=problems: problems.append(message.text))
            page.goto(f"{server.url}/ui/live")
            page.wait_for_selector("#state:has-text('needs an API key')")
            problems.clear()  # the browser says that it was a 401
            page.fill("#key", "secret")
            page.press("#key", "Enter")
            page.wait_for_selector("#state:has-text('live')")
            assert page.locator("section h2").all_inner_texts() == [
                "encode rank 0",
                "encode rank 1",
                "language rank 2",
            ]
            working = threading.Thread(target=burst, args=(server, tmp_path / str(seed), seed))
            working.start()
            working.join(120)
            page.wait_for_timeout(1500)
            assert max(page.evaluate("[...views.values()].flatMap((one) => one.history.map((at) => at.waiting))")) > 0
            names = set(page.evaluate("spans.map((one) => one.name)"))
            assert names >= {"preprocess", "encode", "send", "receive", "prefill", "decode"}
            requests = page.evaluate("new Set(spans.flatMap((one) => one.requests)).size")
            assert requests >= NUM_IMAGES + 1
            assert float(page.locator("#sums b").first.inner_text().removesuffix(" s")) > 0.05
            page.click("#pause")
            page.locator("canvas").last.scroll_into_view_if_needed()
            box = page.evaluate(
                """() => {
                    const view = views.get("language rank 2"), place = view.canvas.getBoundingClientRect();
                    const box = view.boxes.filter((one) => one.all[0].name === "prefill").at(-1);
                    return [place.left + (box.left + box.right) / 2, place.top + (box.top + box.bottom) / 2];
                }"""
            )
            page.mouse.move(*box)
            page.wait_for_selector("#tip:has-text('prefill')")
            assert "tokens" in page.locator("#tip").inner_text()
            page.screenshot(path=shots / f"live-{width}-hover.png")
            page.mouse.move(1, 1)
            page.screenshot(path=shots / f"live-{width}.png", full_page=True)
            with page.expect_download() as download:
                page.click("#save")
            made = json.loads(Path(download.value.path()).read_text())
            assert {event["ph"] for event in made["traceEvents"]} == set("XMsf")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert {url.split("/")[2] for url in urls if "//" in url} == {server.url.split("/")[2]}
            assert problems == []
            page.close()
        browser.close()
        out = tmp_path / "trace.json"
        command = [sys.executable, "-m", "qwen3vl_disagg", "trace", "--url", server.url, "--api-key", "secret"]
        done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=60, cwd=REPO)
        assert (done.returncode, done.stderr) == (0, "")
        events = json.loads(out.read_text())["traceEvents"]
        arrows = [[event for event in events if event["ph"] == ph] for ph in "sf"]
        assert len(arrows[0]) == len(arrows[1]) >= NUM_IMAGES
