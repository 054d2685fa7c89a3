"""Text out of tokens, a piece at a time, never showing what a later token could take back.

Two things are held back: bytes that begin a character (a token may end in the middle of one), and characters that begin
a stop string. So what was shown is final, and a stop string is never seen, however it was split into tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Takes the bytes of tokens, gives the text that is certain. `stopped` is true once a stop string was met."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, piece: bytes) -> str:
        """The text that became certain with these bytes; nothing once `stopped`."""
        return self._advance(self._characters.decode(piece))

    def finish(self) -> str:
        """What was held back, now that nothing follows; an unfinished character becomes U+FFFD."""
        text = self._advance(self._characters.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        cut = _first_stop(text, self.stop)
        self.stopped = cut is not None
        ready = len(text) - _possible_start(text, self.stop) if cut is None else cut
        self._held = "" if self.stopped else text[ready:]
        return text[:ready]


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins. By its end, not its beginning, so that tokenization cannot change it."""
    found = [(at + len(word), at) for word in stop if (at := text.find(word)) >= 0]
    return min(found)[1] if found else None


def _possible_start(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(word) for word in stop), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(word.startswith(text[-n:]) for word in stop)), 0)
