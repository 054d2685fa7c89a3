"""Where drills happen: the toy graph, built once and left alone, and a copy of it for each drill, to be broken.

A copy has its own DVC cache, which is empty, so nothing in it can be had for free that the drill has to make again.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from llm_from_scratch import bundle
from pipelines import certify, dvc

PROJECT = Path(__file__).resolve().parent.parent
HEAVY = shutil.ignore_patterns("cache", "downloads", "mlflow.db", "mlruns", "spool", "__pycache__")
TIMES = "var/seconds.json"
PROGRESS = re.compile(r"\d+%|it/s|^\s*$|\r")


class Unfit(RuntimeError):
    """This machine cannot hold this drill; the message says what it lacks."""


@dataclass(frozen=True)
class Outcome:
    """What a drill showed: the line that a person sees, the command that goes on, and whether what it makes equals what was lost."""

    said: str
    goes_on: str
    equal: int
    compared: int
    remark: str = ""

    @property
    def lost(self) -> str:
        if self.equal == self.compared:
            return f"nothing: {self.equal} of {self.compared} digests equal"
        return f"{self.compared - self.equal} of {self.compared} digests differ"


@dataclass(frozen=True)
class Clone:
    """A project folder that may be broken, and the environment that its commands see."""

    root: Path
    environment: Mapping[str, str]

    def start(self, *command: str, **told: str) -> subprocess.Popen[str]:
        """The command, in a process group of its own, all that it says in one pipe."""
        environment = {**self.environment, **told}
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def run(self, *command: str, **told: str) -> tuple[int, list[str]]:
        """The exit status of the command, and the lines that it said, bars left out."""
        process = self.start(*command, **told)
        said, _ = process.communicate()
        return process.returncode, lines(said)

    def repro(self, *nodes: str, **told: str) -> tuple[int, list[str]]:
        return self.run(*repro(*nodes), **told)

    def must(self, *command: str, **told: str) -> list[str]:
        """`run`, for what has to end well. Raises RuntimeError with its last lines where it does not."""
        status, said = self.run(*command, **told)
        if status:
            raise RuntimeError(f"{shown(command)} ended with {status}: {' / '.join(said[-4:])}")
        return said

    def stale(self, *nodes: str) -> None:
        """Forget what these nodes made, as if they had never run; DVC's cache of runs, too, which would bring it back."""
        remove(self.root / ".dvc/cache/runs")
        path = self.root / "dvc.lock"
        lock: dict[str, Any] = yaml().load(path.read_text(encoding="utf-8"))
        for node in nodes:
            for out in lock["stages"].pop(node)["outs"]:
                remove(self.root / out["path"])
        with path.open("w", encoding="utf-8") as file:
            yaml().dump(lock, file)

    def digest(self, folder: str) -> str:
        """Of a bundle in artifacts/, after checking every byte; what is wrong with it where it is not whole."""
        try:
            return bundle.verify(self.root / "artifacts" / folder).digest
        except bundle.BundleError as error:
            return str(error)


@dataclass
class Ground:
    """The graph that nobody disturbed, and how long each of its nodes took, in seconds."""

    whole: Clone
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def copy(self, cached: bool = False) -> Iterator[Clone]:
        """A copy of the whole, gone after the drill."""
        with tempfile.TemporaryDirectory(prefix="drill.", dir=self.whole.root.parent) as place:
            root = Path(place) / "clone"
            shutil.copytree(self.whole.root, root, symlinks=True, ignore=None if cached else HEAVY)
            yield Clone(root, {**self.whole.environment, "PYTHONPATH": str(root / "src")})

    def outcome(self, clone: Clone, said: str, goes_on: tuple[str, ...], *folders: str, remark: str = "") -> Outcome:
        """The drill's end: the bundles in `folders` held against those of the whole."""
        equal = sum(clone.digest(folder) == self.whole.digest(folder) for folder in folders)
        return Outcome(said.replace(f"{clone.root}/", ""), shown(goes_on), equal, len(folders), remark)


def built(place: Path, say: Callable[[str], None]) -> Ground:
    """A clone of HEAD in `place` with the toy graph in it, and what its nodes took. Raises ValueError where it cannot be built."""
    root = place / "clone"
    seconds = certify.grow(PROJECT, root, "smoke", mirror(place), say)
    (root / TIMES).parent.mkdir(exist_ok=True)
    (root / TIMES).write_text(json.dumps(seconds), encoding="utf-8")
    return opened(root)


def opened(root: Path) -> Ground:
    """The ground around a clone in which the toy graph is built. What this checkout or that clone has downloaded is the drills' mirror."""
    whole = Clone(root, certify.environment(root, certify.collected(root / "var/downloads", mirror(root.parent))))
    times = root / TIMES
    seconds = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
    return Ground(whole, seconds)


def mirror(place: Path) -> Path:
    """What this checkout has downloaded, for the clones."""
    return certify.collected(PROJECT / "var/downloads", place / "mirror")


def repro(*nodes: str) -> tuple[str, ...]:
    return (*dvc.command("repro", "--single-item"), *nodes)


def shown(command: tuple[str, ...]) -> str:
    """A command as a person types it."""
    return " ".join(command).replace(f"{sys.executable} -m dvc", "dvc").replace(sys.executable, "python")


def lines(said: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\n\r]", said) if not PROGRESS.search(line)]


def line_with(said: list[str], *words: str) -> str:
    """The first line that has one of the words. Raises RuntimeError where no line has."""
    for word in words:
        for line in said:
            if word in line:
                return line
    raise RuntimeError(f"nobody said {' or '.join(words)}; the end was: {' / '.join(said[-4:])}")


def kill_below(process: subprocess.Popen[str]) -> None:
    """SIGKILL for all that a process started; itself it may say so."""
    for child in reversed(psutil.Process(process.pid).children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def yaml() -> YAML:
    made = YAML(typ="safe", pure=True)
    made.default_flow_style = False
    return made
