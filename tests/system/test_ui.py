"""The page in a real browser: an image is dropped, the answer comes with its stages, one is stopped, and a key is asked
for. Needs playwright and Chromium."""

from __future__ import annotations

import base64
import json
import os
import shutil
import urllib.request
from pathlib import Path

import pytest

from qwen3vl_disagg import LLM
from tests.support.running import wait_for
from tests.support.scenes import ask_scenes
from tests.support.server import Server

pytestmark = pytest.mark.acceptance
BROWSER = shutil.which("chromium") or "/usr/bin/chromium"
DROP = """([name, data]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), all = new DataTransfer();
    all.items.add(new File([bytes], name, { type: "image/bmp" }));
    document.dispatchEvent(new DragEvent("drop", { dataTransfer: all, bubbles: true, cancelable: true }));
}"""


def without_end(route) -> None:
    """The page's request, but that the answer is as long as it may be."""
    route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True}))


def test_a_browser_drops_an_image_and_sees_the_answer_and_its_stages(tmp_path: Path):
    playwright = pytest.importorskip("playwright.sync_api")
    asked = [one for one in ask_scenes(tmp_path, seed=7, count=20) if len(one.images) == 1][:3]
    expected = [answer.text for answer in LLM().chat([one.messages() for one in asked])]
    shots = Path(os.environ.get("UI_SHOTS", tmp_path))
    with Server(2, "--api-key", "secret") as server, playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for page_number, (width, height) in enumerate(((1100, 800), (390, 800)), 1):
            page = browser.new_page(viewport={"width": width, "height": height})
            urls, problems = [], []
            page.on("request", lambda request, urls=urls: urls.append(request.url))
            page.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
            page.goto(f"{server.url}/ui")
            page.wait_for_selector("text=needs an API key")
            page.click("#open")
            page.fill("[data-name=key]", "secret")
            page.click("#settings button")
            page.wait_for_selector("#state:has-text('ready')")
            for number, (one, text) in enumerate(zip(asked, expected, strict=True)):
                data = base64.b64encode(Path(one.images[0]).read_bytes()).decode()
                page.evaluate(DROP, ["scene.bmp", data])
                page.wait_for_selector("#pictures img")
                page.fill("#text", one.question)
                page.press("#text", "Enter")
                answer = page.locator(".turn.assistant").nth(0)
                answer.locator(".stages").wait_for()
                assert answer.locator(".text").inner_text() == text
                assert answer.locator(".stages b").count() == 6
                where = "encode rank 0" if page_number == 1 else "cached"
                assert where in answer.locator(".facts").inner_text()
                page.screenshot(path=shots / f"{width}-{number}.png")
                page.click("#clear")
                assert page.locator(".turn").count() == 0
            page.route("**/v1/chat/completions", without_end)
            page.click("#open")
            page.fill("[data-name=max_tokens]", "3000")
            page.click("#settings button")
            page.fill("#text", "List all cells.")
            page.click("#send")
            page.wait_for_selector(".turn.assistant .text:not(:empty)")
            page.click("#stop")
            page.wait_for_selector(".turn.assistant .facts:has-text('Stopped.')")
            request = urllib.request.Request(f"{server.url}/metrics", headers={"x-api-key": "secret"})
            counted = f'q3vl_request_failure_total{{code="left"}} {float(page_number)}'
            wait_for(
                lambda request=request, counted=counted: counted in urllib.request.urlopen(request).read().decode(), 20
            )
            page.screenshot(path=shots / f"{width}-stopped.png")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert {url.split("/")[2] for url in urls if not url.startswith("data:")} == {server.url.split("/")[2]}
            assert problems == []
            page.close()
        browser.close()
