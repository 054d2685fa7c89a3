"""A corpus to shards on all cores: against tiktoken's own threads, and in memory that must not grow with the corpus.

python -m benchmarks.tokenizing
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from time import sleep
from typing import Any

import psutil

from benchmarks import table
from benchmarks.tokenizing_child import CORES
from llm_from_scratch import tokenizer
from llm_from_scratch.data.documents import Document, read_documents, write_documents
from llm_from_scratch.tokenizer.bpe import train_bpe

POLL = 0.05  # seconds
LONG = 250_000  # characters of a long document
MB = 1_000_000

NOTES = [
    "`ours` is the whole way: documents.jsonl is read and parsed, encoded by a process a core, hashed, and written as shards.",
    "`tiktoken` is its encode_ordinary_batch with a thread a core, from strings in memory to lists in memory: it reads and writes nothing.",
    "Starting the processes is in the time of ours, about a second of it.",
    "Both have the same ranks and split pattern and give equally many tokens. They take turns; the ratio is of the medians.",
    "Short documents are the corpus as it is, repeated up to the size; long ones are made by joining them. tiktoken lets go of Python's "
    "lock only inside a text, so its threads pay on long texts and hardly on short ones.",
    "Peak memory is that of the process and its workers added up, sampled every 50 ms; pages that they share are counted for each.",
]


def main() -> None:
    arguments = parser().parse_args()
    sizes, compared, runs = ([0.3], 0.3, 1) if arguments.quick else (arguments.sizes, arguments.compared, arguments.runs)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts, words = sources(arguments, folder)
        rows = [*throughput(folder, texts, words, compared, runs), *memory(folder, texts, words, sizes)]
        vocabulary = tokenizer.load(words).vocab_size
    settings = {"processes": CORES, "compared_mb": compared, "runs": runs, "vocab_size": vocabulary, **table.packages("tiktoken")}
    table.write(arguments.out, "tokenizing", "Tokenizing a corpus on all cores", rows, settings, NOTES)


def parser() -> argparse.ArgumentParser:
    made = table.parser("Encode a corpus into shards on all cores, beside tiktoken's own threads, and watch the memory.")
    made.add_argument(
        "--corpus", type=Path, default=Path("artifacts/raw/wikipedia"), help="a corpus folder, as dvc repro download leaves it"
    )
    made.add_argument("--tokenizer", type=Path, default=Path("artifacts/tokens/wikipedia_bpe"), help="a folder with a BPE tokenizer.json")
    made.add_argument("--compared", type=float, default=120.0, help="MB of text that both encode")
    made.add_argument("--sizes", type=float, nargs="+", default=[10.0, 100.0, 400.0], help="MB of text at which memory is watched")
    made.add_argument("--runs", type=int, default=3)
    return made


def sources(arguments: Any, folder: Path) -> tuple[list[str], Path]:
    """The texts and the folder of the tokenizer; at toy size, Python's own help texts. One line where they are not there."""
    if arguments.quick:
        texts = [text for text in pydoc_data.topics.topics.values() if len(text) < 3000]
        train_bpe(texts, 400).save(folder)
        return texts, folder
    try:
        tokenizer.load(arguments.tokenizer)
        return [document.text for document in read_documents(arguments.corpus)], arguments.tokenizer.resolve()
    except ValueError as error:
        raise SystemExit(f"benchmarks.tokenizing: {error}") from None


def throughput(folder: Path, texts: list[str], words: Path, compared: float, runs: int) -> Iterator[dict[str, Any]]:
    """A row for short documents and one for long: MB of text a second by both, and the ratio."""
    for shape, pieces in {"short documents": texts, "long documents": list(joined(texts))}.items():
        size = lay_out(folder / "documents", pieces, compared)
        seconds: dict[str, list[float]] = {"ours": [], "tiktoken": []}
        for _ in range(runs):
            found = {who: started(who, folder / "documents", words)[0] for who in seconds}
            assert found["ours"]["tokens"] == found["tiktoken"]["tokens"]
            for who, times in seconds.items():
                times.append(found[who]["seconds"])
        ours, theirs = (size / table.middle(times)["median"] for times in seconds.values())
        yield {"what": shape, "MB": size, "ours MB/s": ours, "tiktoken MB/s": theirs, "ours / tiktoken": ours / theirs}


def memory(folder: Path, texts: list[str], words: Path, sizes: Iterable[float]) -> Iterator[dict[str, Any]]:
    """A row a size: how fast, and the most memory that ours had."""
    for wanted in sizes:
        size = lay_out(folder / "documents", texts, wanted)
        found, peak = started("ours", folder / "documents", words)
        yield {"what": "memory", "MB": size, "ours MB/s": size / found["seconds"], "peak memory MB": peak}


def joined(texts: Iterable[str]) -> Iterator[str]:
    parts: list[str] = []
    for text in texts:
        parts.append(text)
        if sum(map(len, parts)) >= LONG:
            yield "\n\n".join(parts)
            parts = []
    yield "\n\n".join(parts)


def lay_out(folder: Path, texts: list[str], wanted: float) -> float:
    """A corpus of `wanted` MB of text in `folder`, the texts over and over, its first document held out; the MB there are."""
    folder.mkdir(exist_ok=True)
    size = 0

    def documents() -> Iterator[Document]:
        nonlocal size
        for number, text in enumerate(chain.from_iterable(repeat(texts))):
            if size >= wanted * MB:
                return
            size += len(text.encode())
            yield Document(str(number), "", text, "train" if number else "validation")

    write_documents(folder / "documents.jsonl", documents())
    return size / MB


def started(who: str, corpus: Path, words: Path) -> tuple[dict[str, Any], float]:
    """What a process of its own found, and the most MB that it and its children had at a time."""
    command = [sys.executable, "-m", "benchmarks.tokenizing_child", who, str(corpus), str(words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak = max(peak, resident(watched))
            sleep(POLL)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"benchmarks.tokenizing: {who} ended with {process.returncode}")
    return json.loads(printed), peak / MB


def resident(process: psutil.Process) -> int:
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


if __name__ == "__main__":
    main()
