"""How far the work is: a bar where somebody watches, a line now and then where a file or a pipe does.

tqdm draws one line over and over. A log would hold it as a heap, and with tqdm's usual `disable=None` not at all, so that a rebuild that
is piped into `tee` looks dead for minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY = 15.0  # seconds between two lines away from a terminal


def bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """tqdm, with its options, on stderr; where that is no terminal, whole lines: at the start, every EVERY seconds, at the end."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "ncols": 0, "position": 0, "leave": True, "mininterval": EVERY, "maxinterval": EVERY}
    return tqdm(items, **options)


class _Lines:
    """stderr, to which a redrawn line goes as a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
