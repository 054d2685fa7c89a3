"""A command that a flow waits for: each line it says goes into the run's log, and it never outlives the flow."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefect import get_run_logger

from pipelines import dvc

LAST_LINES = 12  # of a command that failed, kept in its error
LEASH = [sys.executable, "-P", str(Path(__file__).with_name("leash.py"))]

_endings: list[Callable[[], object]] = []


class CommandFailed(ValueError):
    """A command of a flow did not come to its end; the message holds the last lines that it said."""


def require(who: str, command: list[str]) -> list[str]:
    """The last lines that `command` says, all of them in the run's log. Raises CommandFailed, in the name of `who`."""
    status, said = stream(command)
    if status:
        raise CommandFailed(f"{who} ended with {status}:\n" + "\n".join(said))
    return said


def stream(command: list[str]) -> tuple[int, list[str]]:
    """Run `command`, each line it says sent to the run's log as it comes; its exit status and the last of the lines.

    Whatever breaks this off, a cancelled or killed run too, ends the command with all that it started: DVC's lock is free for the next one.
    """
    log = get_run_logger()
    last: deque[str] = deque(maxlen=LAST_LINES)
    with (
        subprocess.Popen(
            [*LEASH, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dvc.environment() | {"PYTHONUNBUFFERED": "1"},  # a pipe would keep a stage's lines until it ends
            start_new_session=True,
        ) as process,
        until(process.stdin.close),
    ):
        try:
            for line in filter(None, map(str.strip, process.stdout)):
                log.info(line)
                last.append(line)
        except BaseException:
            process.stdin.close()
            raise
    return process.returncode, list(last)


@contextmanager
def until(end: Callable[[], object]) -> Iterator[None]:
    """While this lasts, `end_all` calls `end` too."""
    _endings.append(end)
    try:
        yield
    finally:
        _endings.remove(end)


def end_all() -> None:
    """End what other threads of this run wait for. A cancelled run only interrupts the main one, and would wait for the rest."""
    for end in list(_endings):
        with suppress(OSError, ValueError):  # it is ending already
            end()
