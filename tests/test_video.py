"""The walkthrough's camera and terminal: a real shell, a real browser, a real file at the end, of a few seconds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Error, Page, sync_playwright

from pipelines.filming import Camera, Terminal


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        try:
            path = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium here: {str(error).splitlines()[0]}")
        yield browser.new_page(viewport={"width": 1280, "height": 720})
        browser.close()


def shown(page: Page) -> str:
    return page.locator("#screen").inner_text()


@pytest.mark.slow
def test_what_a_shell_says_is_on_the_page_with_its_colours_and_without_its_markup(page: Page, tmp_path: Path) -> None:
    terminal = Terminal(page, tmp_path, os.environ)
    try:
        terminal.run("echo '<b>bold?</b>' && printf '\\033[31mred\\033[0m\\n' && pwd", 30)
        assert "<b>bold?</b>" in shown(page)
        assert tmp_path.name in shown(page)
        assert "color:#ff7b72" in page.locator("#screen").inner_html()
        with pytest.raises(ValueError, match=r"'sleep 9' was not done after 0 s"):
            terminal.run("sleep 9", 0)
    finally:
        terminal.close()


@pytest.mark.slow
def test_a_film_lasts_as_long_as_what_was_done_but_for_what_is_played_faster_or_left_out(page: Page, tmp_path: Path) -> None:
    if not shutil.which("ffprobe"):
        pytest.skip("no ffmpeg here")
    page.set_content("<p id=p></p><script>let n = 0; setInterval(() => { p.textContent = n++ }, 50)</script>")
    camera = Camera(page, tmp_path)
    camera.start()
    camera.say("One second,", 1)
    with camera.faster(4):
        camera.say("two in the time of half a second,", 2)
    with camera.off():
        camera.say("and one that nobody sees.", 1)
    camera.stop()

    film = camera.develop(tmp_path / "film.webm")

    probe = ["ffprobe", "-v", "error", "-show_entries", "format=duration:stream=width,height,codec_name", "-of", "csv=p=0", str(film)]
    told = subprocess.run(probe, capture_output=True, text=True, check=True).stdout
    assert "vp9,1280,720" in told
    assert 1.2 < float(re.findall(r"[\d.]+", told)[-1]) < 2.1


def test_time_that_is_saved_is_what_of_each_pace_lies_between_two_frames() -> None:
    camera: Any = Camera.__new__(Camera)
    camera.paces = [(10.0, 20.0, 0.5), (30.0, 40.0, 0.0)]
    assert camera._saved(0, 10) == 0
    assert camera._saved(12, 16) == 2
    assert camera._saved(18, 35) == 1 + 5
