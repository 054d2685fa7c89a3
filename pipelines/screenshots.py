"""Pictures of the page, one a tab, taken in headless Chromium from a Bento that is served for it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.bento import package, serving

LARGEST_BYTES = 300_000
SETTLED_SECONDS = 0.6
QUESTIONS = ("What is a stick insect?", "What is the Amazon River?", "What is the capital of France?", "What is Paris?")


def screenshots(root: Path, out: Path, url: str) -> list[Path]:
    """A PNG of each tab in `out`, from the page of the server at `url`, or where that is empty from a Bento packaged and served for it.

    Raises ValueError where Playwright, Chromium or the server is missing, and for a picture of more than 300 kB.
    """
    if url:
        return _taken(url, out)
    with serving(package(root, "")) as address:
        return _taken(address, out)


def _taken(address: str, out: Path) -> list[Path]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise ValueError("no playwright here; pip install 'llm-from-scratch[dev]' brings it") from None
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        try:
            path = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            raise ValueError(f"no Chromium here ({_first_line(error)}); install chromium, or: playwright install chromium") from None
        try:
            page = browser.new_page(viewport={"width": 1100, "height": 850})
            page.goto(f"{address}/ui/")
            taken = [_picture(page, name, use, out) for name, use in TABS.items()]
        except Error as error:
            raise ValueError(f"{address}/ui/ is not as expected: {_first_line(error)}; look at it in a browser") from None
        finally:
            browser.close()
    if large := [path.name for path in taken if path.stat().st_size > LARGEST_BYTES]:
        raise ValueError(f"{', '.join(large)} in {out}: more than {LARGEST_BYTES} bytes; make what is shown smaller")
    return taken


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _picture(page: Any, name: str, use: Callable[[Any, Any], None], out: Path) -> Path:
    page.get_by_role("tab", name=name, exact=True).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    use(page, panel)
    _settle(page, panel)
    path = out / f"{name.lower()}.png"
    page.mouse.move(0, 0)
    page.screenshot(path=path, full_page=name == "Evolution")
    return path


def _settle(page: Any, panel: Any) -> None:
    """Until the text of the panel has stayed the same for a while."""
    before, since = "", time.monotonic()
    while time.monotonic() - since < SETTLED_SECONDS:
        page.wait_for_timeout(200)
        if (text := panel.inner_text()) != before:
            before, since = text, time.monotonic()


def _chat(page: Any, panel: Any) -> None:
    """The first of some questions whose answer cites a passage, the passage open; the last one where none does."""
    for question in QUESTIONS:
        if panel.get_by_role("button", name="Clear").is_visible():
            panel.get_by_role("button", name="Clear").click()
        panel.get_by_role("textbox", name="Message").fill(question)
        panel.get_by_role("button", name="Send").click()
        panel.get_by_test_id("bot").first.wait_for()
        _settle(page, panel)
        if (passage := panel.get_by_role("button", name="[1]")).count():
            passage.click()
            return


def _completion(page: Any, panel: Any) -> None:
    panel.get_by_role("button", name="Continue").click()
    panel.locator(".token").first.wait_for()


def _retrieval(page: Any, panel: Any) -> None:
    panel.get_by_role("button", name="Search").click()
    panel.locator("td").first.wait_for()


def _attention(page: Any, panel: Any) -> None:
    panel.get_by_role("button", name="Draw").click()
    panel.locator("rect").first.wait_for()


def _evolution(page: Any, panel: Any) -> None:
    panel.get_by_role("button", name="Write").click()
    panel.locator(".card p").last.filter(has_text=" ").wait_for()


TABS = {"Chat": _chat, "Completion": _completion, "Retrieval": _retrieval, "Attention": _attention, "Evolution": _evolution}
"""What is done in each tab before its picture."""
