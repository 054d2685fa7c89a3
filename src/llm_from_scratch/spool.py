"""What a log could not deliver waits on disk, a file a run, and is delivered when the store takes it again.

Nothing here knows the store: `tell` takes a run's key and one record, a JSON mapping, and raises where the record is not taken. A file that
was told in part is told again from its start by the next process, so telling a record twice must be as telling it once.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]
Tell = Callable[[str, Record], None]
SUFFIX = ".jsonl"


@dataclass
class Patient:
    """A `tell` that keeps its process for `grace` seconds and a `share` of the time that goes by, and no longer: what takes more is given
    up, and as long as it is stuck nothing else is asked. Raises TimeoutError, and what `tell` does."""

    tell: Tell
    grace: float
    share: float
    spent: float = 0.0
    since: float = field(default_factory=time.monotonic)
    stuck: threading.Thread | None = None

    def __call__(self, key: str, record: Record) -> None:
        started = time.monotonic()
        left = self.grace + self.share * (started - self.since) - self.spent
        if left <= 0 or (self.stuck is not None and self.stuck.is_alive()):
            raise TimeoutError(f"it has kept this process for {self.spent:.0f} s")
        raised: list[Exception] = []
        thread = threading.Thread(target=self._tell, args=(key, record, raised), daemon=True)
        thread.start()
        thread.join(left)
        self.spent += time.monotonic() - started
        if thread.is_alive():
            self.stuck = thread
            raise TimeoutError(f"no answer, and it has kept this process for {self.spent:.0f} s")
        if raised:
            raise raised[0]

    def _tell(self, key: str, record: Record, raised: list[Exception]) -> None:
        try:
            self.tell(key, record)
        except Exception as error:  # handed to whoever waits
            raised.append(error)


class Spool:
    """The records of one run, told as they come. From the first that is not taken on, they wait in `folder`, in their order; without a
    folder they are dropped. `complain` hears of each that was not taken."""

    def __init__(self, folder: Path | None, key: str, tell: Tell, complain: Callable[[Exception], None]) -> None:
        self.folder, self.key, self.tell, self.complain = folder, key, tell, complain
        self.opening: Record | None = None
        self.waiting: Waiting | None = None

    def put(self, record: Record) -> None:
        """Tell a record, or keep it. A kept file begins with the run's first record, told or not: another store may get it."""
        opening, self.opening = self.opening, self.opening or record
        if self.waiting is None:
            if self._tried(lambda: self.tell(self.key, record)) or self.folder is None:
                return
            self.waiting = Waiting.made(self.folder / f"{self.key}{SUFFIX}", [*([opening] if opening else []), record])
        else:
            self.waiting.append(record)
            self._catch_up(self.waiting)

    def close(self) -> None:
        if self.waiting is not None:
            self._catch_up(self.waiting)
        if self.waiting is not None:
            self.waiting.file.close()

    def _catch_up(self, waiting: Waiting) -> None:
        if self._tried(lambda: waiting.deliver(self.tell)):
            self.waiting = None

    def _tried(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # whatever the store raises (sqlite, HTTP, MLflow): a log may fail, the work may not
            self.complain(error)
            return False
        return True


def deliver(folder: Path, tell: Tell) -> None:
    """Tell what earlier processes left in `folder`, the oldest first; what lives still is let alone. Raises what `tell` does."""
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=os.path.getmtime):
        if waiting := Waiting.left(path):
            try:
                waiting.deliver(tell)
            finally:
                waiting.file.close()


def sayable(uri: str) -> str:
    """The address of a store without a name and a password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def reason(error: Exception) -> str:
    """In a line, why a record was not taken; of a server that is not there, what the system said first, and not what each library on the
    way here made of it."""
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) and deeper not in chain:
        chain.append(deeper)
    first = next((found for found in reversed(chain) if isinstance(found, OSError)), error)
    return f"{type(first).__name__}: {' '.join(str(first).split())[:200]}"


@dataclass
class Waiting:
    """A file of records, locked while its process lives; those before the byte `at` are told."""

    path: Path
    file: IO[bytes]
    at: int = 0

    @classmethod
    def made(cls, path: Path, records: list[Record]) -> Waiting:
        """Locked and filled before it has its name: nobody takes it for one that was left."""
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(f".{path.name}")
        waiting = cls(path, hidden.open("w+b"))
        fcntl.flock(waiting.file, fcntl.LOCK_EX)
        for record in records:
            waiting.append(record)
        os.replace(hidden, path)
        return waiting

    @classmethod
    def left(cls, path: Path) -> Waiting | None:
        """The file of a process that is gone; none where it lives, or where another has delivered it meanwhile."""
        try:
            file = path.open("r+b")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            file.close()
            return None
        return cls(path, file)

    def append(self, record: Record) -> None:
        self.file.seek(0, os.SEEK_END)
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def deliver(self, tell: Tell) -> None:
        """Tell from `at` on, and remove the file. A last line that a kill cut short is no record. Raises what `tell` does."""
        self.file.seek(self.at)
        for line in self.file:
            if line.endswith(b"\n"):
                tell(self.path.name.removesuffix(SUFFIX), json.loads(line))
            self.at += len(line)
        self.path.unlink(missing_ok=True)
        self.file.close()
