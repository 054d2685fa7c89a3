"""GPT-2's own vocabulary, from the two files that OpenAI published: nothing is learned here, and the ids are the published ones.

vocab.bpe has its 50,000 merges in order. encoder.json has the ids, which follow from the merges as those of every byte-level tokenizer
here (bytes, merges, end of text), so they are only compared. The end of text is 50256; the tokens of a chat come after it, and OpenAI's
own model has no rows for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_from_scratch.tokenizer import export
from llm_from_scratch.tokenizer.base import END_OF_TEXT, SPECIAL
from llm_from_scratch.tokenizer.bpe import BpeTokenizer, Pair

NAMES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))  # OpenAI's, and Hugging Face's for the same bytes


def read_gpt2(folder: Path, special: Sequence[str] = SPECIAL) -> BpeTokenizer:
    """The tokenizer in the files of `folder`, at any depth; with `special` (END_OF_TEXT,) the published 50,257 tokens and no more.

    Raises ValueError where a file is missing or is not what it should be.
    """
    merges, ids = _files(folder)
    try:
        made = BpeTokenizer(list(_merges(merges)), special)
        published = json.loads(ids.read_text(encoding="utf-8"))
    except (ValueError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: {merges.name} and {ids.name} are not a GPT-2 tokenizer ({found}); fetch them again") from None
    spelled = {"".join(export.CHARACTER_OF[byte] for byte in token): place for place, token in enumerate(made.tokens)}
    if published != spelled | {END_OF_TEXT: made.eot}:
        raise ValueError(f"{ids}: not the ids that {merges.name} gives; take both files of one tokenizer, in which the end of text is last")
    return made


def _files(folder: Path) -> tuple[Path, Path]:
    for pair in NAMES:
        merges, ids = (next(iter(sorted(folder.rglob(name))), None) for name in pair)
        if merges and ids:
            return merges, ids
    wanted = " or ".join(" and ".join(pair) for pair in NAMES)
    raise ValueError(f"no GPT-2 tokenizer in {folder}, wanted {wanted}; fetch the source that holds them")


def _merges(path: Path) -> Iterator[Pair]:
    """Each line has the two parts of a merge, spelled in GPT-2's printable characters; the first line is a version."""
    place = {character: token for token, character in enumerate(export.BYTE_OF)}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#version"):
            left, right = line.split(" ")
            yield place[left], place[right]
            place[left + right] = len(place)
