"""A camera and a terminal: what a headless browser paints becomes a video, and a shell of its own is drawn into a page of that browser.

Nothing is acted. The shell is a real one behind a pseudo-terminal, and frames bear the time at which Chromium painted them. A stretch may
be played faster, and then its caption says so, or be left out.
"""

from __future__ import annotations

import base64
import os
import select
import shutil
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1280, 720
COLUMNS, LINES = 138, 32
FRAMES_A_SECOND = 12
KEYSTROKE_SECONDS = 0.025
LOOK_MILLISECONDS = 80
PROMPT = "$"
COLOURS = {
    "black": "#6e7681",
    "red": "#ff7b72",
    "green": "#7ee787",
    "brown": "#e3b341",
    "blue": "#79c0ff",
    "magenta": "#d2a8ff",
    "cyan": "#76e3ea",
}
BLANK = """
<body style="margin:0;background:#0d1117"><pre id="screen" style="margin:14px 18px;color:#e6edf3;font:15px/20px DejaVu Sans Mono,monospace">
</pre></body>"""
CAPTION = """text => {
  let bar = document.getElementById("caption");
  if (!bar) { bar = document.createElement("div"); bar.id = "caption"; document.body.append(bar); }
  bar.style = "position:fixed;left:0;right:0;bottom:0;z-index:99999;padding:12px 24px;background:#1f2937;color:white;" +
              "font:22px DejaVu Sans,sans-serif;opacity:.95";
  bar.textContent = text;
}"""


class Camera:
    """The frames of `page`, kept in `folder`, each with the time it was painted at; `develop` makes the video of them."""

    def __init__(self, page: Any, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.frames: list[tuple[Path, float]] = []
        self.paces: list[tuple[float, float, float]] = []  # from, until, and how much of that time the video takes
        self.ended = 0.0
        self.session = page.context.new_cdp_session(page)
        self.session.on("Page.screencastFrame", self._painted)

    def start(self) -> None:
        self.session.send("Page.startScreencast", {"format": "jpeg", "quality": 92, "maxWidth": WIDTH, "maxHeight": HEIGHT})

    def stop(self) -> None:
        self.session.send("Page.stopScreencast")
        self.ended = time.time()

    @contextmanager
    def faster(self, times: float) -> Iterator[None]:
        """What is done in here takes a part of its time in the video."""
        begun = time.time()
        try:
            yield
        finally:
            self.paces.append((begun, time.time(), 1 / times))

    @contextmanager
    def off(self) -> Iterator[None]:
        """What is done in here is not in the video."""
        with self.faster(float("inf")):
            yield

    def say(self, text: str, seconds: float = 0.0) -> None:
        """A caption, and time to read it."""
        self.page.evaluate(CAPTION, text)
        self.page.wait_for_timeout(1000 * seconds)

    def develop(self, out: Path) -> Path:
        """A WebM of all frames. Raises ValueError where ffmpeg is missing or fails."""
        if not shutil.which("ffmpeg"):
            raise ValueError("no ffmpeg here; install it (Debian: apt-get install ffmpeg)")
        times = [moment for _, moment in self.frames] + [self.ended]
        lasts = [end - begin - self._saved(begin, end) for begin, end in pairwise(times)]
        shown = [f"file '{path}'\nduration {seconds:.4f}" for (path, _), seconds in zip(self.frames, lasts, strict=True) if seconds > 1e-3]
        listed = self.folder / "frames.txt"
        listed.write_text("ffconcat version 1.0\n" + "\n".join(shown) + "\n", encoding="utf-8")
        film = [
            "-vf",
            f"fps={FRAMES_A_SECOND},scale={WIDTH}:{HEIGHT}",
            "-c:v",
            "libvpx-vp9",
            "-crf",
            "38",
            "-b:v",
            "0",
            "-pix_fmt",
            "yuv420p",
        ]
        quick = ["-deadline", "good", "-cpu-used", "4", "-row-mt", "1"]
        command = ["ffmpeg", "-loglevel", "error", "-y", "-f", "concat", "-safe", "0", "-i", str(listed), *film, *quick, str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"ffmpeg made no {out}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
        return out

    def _painted(self, event: Mapping[str, Any]) -> None:
        path = self.folder / f"{len(self.frames):06}.jpg"
        path.write_bytes(base64.b64decode(event["data"]))
        self.frames.append((path, float(event["metadata"]["timestamp"])))
        self.session.send("Page.screencastFrameAck", {"sessionId": event["sessionId"]})

    def _saved(self, begin: float, end: float) -> float:
        """Seconds between two moments that the video does not take."""
        return sum((1 - share) * max(0.0, min(end, until) - max(begin, since)) for since, until, share in self.paces)


class Terminal:
    """A shell in `folder`, whose screen is drawn into `page`. Raises ValueError where pyte, which keeps the screen, is missing."""

    def __init__(self, page: Any, folder: Path, environment: Mapping[str, str]) -> None:
        try:
            import pyte
        except ImportError:
            raise ValueError("no pyte here; pip install 'llm-from-scratch[dev]' brings it") from None
        self.page = page
        self.screen = pyte.Screen(COLUMNS, LINES)
        self.stream = pyte.ByteStream(self.screen)
        self.end, inside = os.openpty()
        termios.tcsetwinsize(self.end, (LINES, COLUMNS))
        shell = ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"]
        settings = {**environment, "PS1": f"{PROMPT} ", "TERM": "linux", "PAGER": "cat", "PROMPT_COMMAND": "", "HISTFILE": ""}
        self.shell = subprocess.Popen(shell, cwd=folder, env=settings, stdin=inside, stdout=inside, stderr=inside, close_fds=True)
        os.close(inside)
        page.set_content(BLANK)

    def run(self, command: str, seconds: float) -> None:
        """Type it, and watch until the prompt is back. Raises ValueError where it is not after so many seconds."""
        for key in command:
            os.write(self.end, key.encode())
            self.page.wait_for_timeout(1000 * KEYSTROKE_SECONDS)
            self.look()
        os.write(self.end, b"\n")
        until = time.monotonic() + seconds
        self.page.wait_for_timeout(5 * LOOK_MILLISECONDS)
        while not self.look():
            if time.monotonic() > until:
                raise ValueError(f"{command!r} was not done after {seconds:.0f} s; try it by hand")
            self.page.wait_for_timeout(LOOK_MILLISECONDS)

    def clear(self) -> None:
        self.run("clear", 10)

    def look(self) -> bool:
        """Draw what the shell has said by now. Whether it waits for a command."""
        said = False
        while select.select([self.end], [], [], 0)[0]:
            self.stream.feed(os.read(self.end, 65536))
            said = True
        if said:
            self.page.evaluate("lines => { document.getElementById('screen').innerHTML = lines }", self._drawn())
        return self.screen.display[self.screen.cursor.y].rstrip() == PROMPT

    def close(self) -> None:
        self.shell.kill()
        self.shell.wait()
        os.close(self.end)

    def _drawn(self) -> str:
        return "\n".join(_line([self.screen.buffer[row][column] for column in range(COLUMNS)]) for row in range(LINES))


def _line(characters: list[Any]) -> str:
    """A row of the screen as HTML."""
    runs = groupby(characters, key=lambda one: (COLOURS.get(one.fg, "inherit"), one.bold))
    return "".join(
        f'<span style="color:{colour};font-weight:{"bold" if bold else "normal"}">{escape("".join(one.data for one in run))}</span>'
        for (colour, bold), run in runs
    )
