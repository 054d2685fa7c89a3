"""How busy the machine is while something runs: readings some seconds apart, kept until somebody takes them.

MLflow has a monitor of its own, which asks the store about the run at every reading, and at the end makes a stage wait for a slow server.
This one asks psutil alone and never waits. Its names are MLflow's, so that its page draws them under "System metrics".
"""

from __future__ import annotations

import threading
import time

SECONDS = 5.0
"""Between two readings: a stage of a minute has a curve, one of an hour no more than some hundred points."""

Reading = tuple[int, dict[str, float]]
"""When (milliseconds since 1970), and what was read."""


class Readings:
    """A thread that reads from `start` to `stop`; what was read in between is there to `take`, once."""

    def __init__(self, seconds: float = SECONDS) -> None:
        import psutil

        self._process = psutil.Process()
        self._machine = psutil
        self._seconds = seconds
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._found: list[Reading] = []
        self._thread = threading.Thread(target=self._go_on, name="hardware", daemon=True)

    def start(self) -> None:
        for percent in (self._machine.cpu_percent, self._process.cpu_percent):
            percent()  # each counts from the call before it
        self._thread.start()

    def stop(self) -> None:
        """One last reading, so that the shortest work has one."""
        self._stopped.set()
        self._thread.join()
        self._read()

    def take(self) -> list[Reading]:
        with self._lock:
            found, self._found = self._found, []
        return found

    def _go_on(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._read()

    def _read(self) -> None:
        memory = self._machine.virtual_memory()
        found = {
            "system/cpu_utilization_percentage": self._machine.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": memory.used / memory.total * 100,
            "system/process_cpu_percentage": self._process.cpu_percent(),
            "system/process_memory_megabytes": self._process.memory_info().rss / 1e6,
        }
        with self._lock:
            self._found.append((int(time.time() * 1000), found))
