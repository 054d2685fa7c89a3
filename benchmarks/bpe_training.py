"""Learning merges: ours against Hugging Face's trainer, for the same merges, and against the textbook loop that counts again each time.

python -m benchmarks.bpe_training
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter

os.environ["TOKENIZERS_PARALLELISM"] = "true"  # read when tokenizers is imported: the peer may use all cores

import tokenizers

from benchmarks import table
from llm_from_scratch.data.documents import read_documents
from llm_from_scratch.tokenizer import SPECIAL
from llm_from_scratch.tokenizer.bpe import BYTE_ORDER, WORDS, BpeTokenizer, Pair, count_words, learn_merges, merged

NOTES = [
    "Both trainers start from the texts as strings in memory and end with the merges. The peer may use all cores, ours uses one.",
    "Of equally frequent pairs the one with the lower ids is merged first, which is the library's rule too; `same merges` compares all.",
    "The textbook loop keeps every word of the corpus as a list of ids and, for each merge, counts all pairs again and rewrites all words. "
    "Its time is that of its first merges, times the merges there are: too high by up to the factor by which words get shorter (about "
    "three), as later merges find fewer ids. It is written in Python as ours is.",
]


def main() -> None:
    arguments = parser().parse_args()
    texts = list(pydoc_data.topics.topics.values())[:20] if arguments.quick else corpus(arguments.corpus)
    size, runs = (300, 1) if arguments.quick else (arguments.vocab_size, arguments.runs)
    wanted = size - len(BYTE_ORDER) - len(SPECIAL)

    counting, learning, peer = [], [], []
    for _ in range(runs):
        started = perf_counter()
        counts = count_words(texts)
        counting.append(perf_counter() - started)
        started = perf_counter()
        merges = learn_merges(counts, wanted)
        learning.append(perf_counter() - started)
        started = perf_counter()
        theirs = hugging_face(texts, size - len(SPECIAL))
        peer.append(perf_counter() - started)
    slow = textbook(texts, arguments.textbook_merges) * wanted
    same = BpeTokenizer(merges).document()["model"]["merges"] == theirs

    ours = table.middle([count + learn for count, learn in zip(counting, learning, strict=True)])
    library = table.middle(peer)
    rows = [
        {"trainer": "ours", "seconds": ours["median"], "low": ours["low"], "high": ours["high"], "times ours": 1.0},
        {"trainer": "tokenizers", "seconds": library["median"], "low": library["low"], "high": library["high"]},
        {"trainer": f"textbook, from its first {arguments.textbook_merges} merges", "seconds": slow, "low": slow, "high": slow},
    ]
    for row in rows:
        row["times ours"] = row["seconds"] / ours["median"]
    settings = {
        "vocab_size": size,
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "unique_words": len(counts),
        "merges": len(merges),
        "same merges": same,
        "runs": runs,
        "counting_s": round(table.middle(counting)["median"], 3),
        "learning_s": round(table.middle(learning)["median"], 3),
        "ours_over_tokenizers": round(ours["median"] / library["median"], 2),
        "textbook_over_ours": round(slow / ours["median"]),
        **table.packages("tokenizers", "regex"),
    }
    table.write(arguments.out, "bpe_training", "Learning byte pairs", rows, settings, NOTES)


def parser() -> argparse.ArgumentParser:
    made = table.parser("Learn BPE merges from a corpus, by ours, tokenizers and the textbook loop.")
    made.add_argument(
        "--corpus", type=Path, default=Path("artifacts/raw/wikipedia"), help="a corpus folder, as dvc repro download leaves it"
    )
    made.add_argument("--vocab-size", type=int, default=4096)
    made.add_argument("--runs", type=int, default=3)
    made.add_argument("--textbook-merges", type=int, default=20, help="how many merges the textbook loop is timed for")
    return made


def corpus(folder: Path) -> list[str]:
    """The training documents. Ends the program in one line where there are none."""
    try:
        return [document.text for document in read_documents(folder, "train")]
    except ValueError as error:
        raise SystemExit(f"benchmarks.bpe_training: {error}") from None


def hugging_face(texts: Sequence[str], size: int) -> list[list[str]]:
    """The merges of the library's own trainer for the same bytes, split pattern and number of tokens."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    merges: list[list[str]] = json.loads(library.to_str())["model"]["merges"]
    return merges


def textbook(texts: Sequence[str], merges: int) -> float:
    """Seconds a merge of the loop in every textbook: count all pairs, join the most frequent one everywhere, again."""
    started = perf_counter()
    place = {byte: token for token, byte in enumerate(BYTE_ORDER)}
    words = [[place[byte] for byte in word.encode()] for text in texts for word in WORDS.findall(text)]
    for step in range(merges):
        counts: Counter[Pair] = Counter()
        for ids in words:
            counts.update(pairwise(ids))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merged(ids, best, len(BYTE_ORDER) + step) for ids in words]
    return (perf_counter() - started) / merges


if __name__ == "__main__":
    main()
