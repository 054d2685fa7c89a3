"""Prompt lookup: the text itself guesses how it goes on, and the model checks several tokens in the time of one (Saxena 2023).

Where the last few tokens stood before, what followed them then is the guess. A guess is kept as far as the model draws the same tokens
itself, from the logits of a forward over all of them, so the text is the one it would have written anyway. It pays where a text repeats
what was read (quotations, code, answers from passages) and costs a little where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 3
"""Tokens that have to be alike, first of all so many, and down to two."""


class Lookup:
    """Where each pair and triple of a growing text stood last. Each call reads only the tokens that are new."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._read = 0

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`; none where its end is new. `ids` begins with those of the last call."""
        for end in range(self._read + 1, len(ids)):  # not the end itself: nothing follows it yet
            for length in range(2, min(LONGEST, end) + 1):
                self._after[tuple(ids[end - length : end])] = end
        self._read = max(self._read, len(ids) - 1)
        for length in range(min(LONGEST, len(ids)), 1, -1):
            if (place := self._after.get(tuple(ids[-length:]))) is not None:
                guess: list[int] = []
                for at in range(place, place + most):  # past the end it goes on in itself, so what goes round goes round
                    guess.append(ids[at] if at < len(ids) else guess[at - len(ids)])
                return guess
        return []
