"""What benchmarks.tokenizing starts and watches: one encoding of a corpus in a process of its own, without anything heavy imported.

python -m benchmarks.tokenizing_child ours|tiktoken CORPUS TOKENIZER
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

import tiktoken

from llm_from_scratch import tokenizer
from llm_from_scratch.data.documents import read_documents
from llm_from_scratch.data.shards import FILES, write_shards
from llm_from_scratch.data.workers import across_processes
from llm_from_scratch.tokenizer import BpeTokenizer
from llm_from_scratch.tokenizer.bpe import PATTERN

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(who: str, corpus: str, words: str) -> None:
    """Print seconds and tokens as JSON; imports and the loading of the tokenizer are not counted."""
    made = tokenizer.load(Path(words))
    assert isinstance(made, BpeTokenizer)
    print(json.dumps(encode_ours(made, Path(corpus)) if who == "ours" else encode_theirs(made, Path(corpus))))


def encode_ours(made: BpeTokenizer, corpus: Path) -> dict[str, float]:
    begin = perf_counter()
    texts = {split: (document.text for document in read_documents(corpus, split)) for split in FILES}
    with tempfile.TemporaryDirectory() as target:
        run = partial(across_processes, processes=CORES)
        facts = write_shards(Path(target), texts, made.encode_batch, made.eot, made.vocab_size, run)
        seconds = perf_counter() - begin
    return {"seconds": seconds, "tokens": sum(facts[f"{name}_tokens"] - facts[f"{name}_documents"] for name in FILES.values())}


def encode_theirs(made: BpeTokenizer, corpus: Path) -> dict[str, float]:
    ranks = {made.bytes_of(token): token for token in range(made.eot)}
    encoding = tiktoken.Encoding("peer", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=made.special)
    texts = [document.text for document in read_documents(corpus)]
    begin = perf_counter()
    ids = encoding.encode_ordinary_batch(texts, num_threads=CORES)
    seconds = perf_counter() - begin
    return {"seconds": seconds, "tokens": sum(map(len, ids))}


if __name__ == "__main__":
    main(*sys.argv[1:])
