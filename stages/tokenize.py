"""Documents become ids: read, learn or take over a tokenizer, encode on all cores, write; and show what the tokenizer does to a text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from llm_from_scratch import bundle, progress, tracking
from llm_from_scratch.config import Params
from llm_from_scratch.data import cluster
from llm_from_scratch.data.chat import PASSAGE_CHARACTERS
from llm_from_scratch.data.documents import Document, Split, read_documents
from llm_from_scratch.data.lessons import lessons
from llm_from_scratch.data.rendered import Rendered, write_conversations
from llm_from_scratch.data.shards import FILES, Encoder, open_shards, write_lengths, write_shards
from llm_from_scratch.data.workers import across_processes
from llm_from_scratch.tokenizer import TokenizeParams, Tokenizer, digest, printable, read_gpt2, train
from llm_from_scratch.tokenizer.chat import render

LESSON_SEED = 1  # which questions are asked on which passage; the order in which they are learned is the rung's to draw
SHOWN_TOKENS = 60
SHOWN_CHARACTERS = 600
EXAMPLES = {
    "English": "The tokenizer splits unbelievably long words.",
    "Numbers": "In 1969, 3.14159 + 2,718 = 2721.14159",
    "Code": "def add(a, b):\n    return a + b\n",
    "French": "Où est la bibliothèque, s'il vous plaît ?",
    "Russian": "Москва — столица России",
    "Chinese": "北京是中国的首都",
    "Emoji": "👩‍🚀 to the 🌕!",
}


def run(params: Params, name: str, root: Path) -> None:
    settings = params.tokenize[name]
    raw, target = root / "artifacts" / "raw", root / "artifacts" / "tokens" / name
    source = raw / settings.corpus
    parents = {"corpus": bundle.verify(source, "corpus").digest}
    if settings.vocabulary_from != settings.corpus:
        parents["vocabulary"] = bundle.verify(raw / settings.vocabulary_from, "corpus").digest
    read = [f"artifacts/raw/{each}" for each in dict.fromkeys((settings.corpus, settings.vocabulary_from))]

    with tracking.stage_run("tokenize", name, settings.model_dump(), read) as log:
        started = perf_counter()
        tokenizer = learn(settings, raw / settings.vocabulary_from)
        with bundle.writing(target) as folder:
            tokenizer.save(folder)
            facts = encode(settings, tokenizer, source, folder)
            if settings.lessons:
                facts["lessons"] = write_conversations(folder, rendered(list(read_documents(source, "train")), tokenizer))
            facts |= {"corpus": settings.corpus, "tokenizer": settings.kind, "tokenizer_digest": digest(folder)}
            bundle.seal(folder, "tokens", f"tokenize@{name}", parents, **facts)
        metrics = measured(facts) | {"seconds": perf_counter() - started}
        log(0, metrics)

    with bundle.writing(root / "artifacts" / "logs" / "tokenize" / name) as folder:
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (folder / "sample.txt").write_text(sample(tokenizer, next(texts(source, "validation"))), encoding="utf-8")
        (folder / "encoding.json").write_text(json.dumps(encodings(tokenizer), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_lengths(folder / "lengths.csv", open_shards(target))


def learn(settings: TokenizeParams, source: Path) -> Tokenizer:
    """A tokenizer from `source`. Merges are statistics, so they come from the training documents alone.

    The alphabet is of all documents: a held-out character without an id would become <unk>, whose bytes nobody can count, and bits per
    byte would no longer be over the same bytes. Which characters exist tells a model nothing about the text.
    """
    if settings.kind == "gpt2":
        return read_gpt2(source)
    read = texts(source, None if settings.kind == "char" else "train")
    with progress.bar(desc="merges", total=0, disable=settings.kind == "char") as bar:

        def merged(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return train(settings, read, merged)


def encode(settings: TokenizeParams, tokenizer: Tokenizer, source: Path, folder: Path) -> dict[str, Any]:
    """The shards of a corpus in `folder`, made on all cores or on a cluster; their facts. The files are the same either way."""
    if settings.workers == "ray":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with cluster.connected():
            return cluster.write_shards(folder, source, Encoder(tokenizer.encode_batch, tokenizer.eot, tokenizer.vocab_size))
    read = {split: shown(texts(source, split), f"encode {split}") for split in FILES}
    everywhere = partial(across_processes, processes=cores())
    return write_shards(folder, read, tokenizer.encode_batch, tokenizer.eot, tokenizer.vocab_size, everywhere)


def rendered(documents: list[Document], tokenizer: Tokenizer) -> Iterator[Rendered]:
    """The lessons that the documents give, as ids."""
    for lesson in progress.bar(lessons(documents, LESSON_SEED, PASSAGE_CHARACTERS), desc="lessons"):
        yield render(lesson["messages"], tokenizer, prompt=False)


def cores() -> int:
    """How many cores this process may use: fewer than there are inside a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def texts(source: Path, split: Split | None) -> Iterator[str]:
    return (document.text for document in read_documents(source, split))


def shown(texts: Iterator[str], title: str) -> Iterator[str]:
    """The texts, with a bar that begins when the first is asked for."""
    yield from progress.bar(texts, desc=title, unit=" documents")


def measured(facts: dict[str, Any]) -> dict[str, float]:
    """Sizes, and the tokenizer on the held-out text without its end-of-text tokens: bytes a token, and its length against characters."""
    encoded = facts["val_tokens"] - facts["val_documents"]
    return {
        "vocab_size": facts["vocab_size"],
        "tokens": facts["train_tokens"] + facts["val_tokens"],
        "documents": facts["train_documents"] + facts["val_documents"],
        "bytes_per_token": facts["val_bytes"] / encoded,
        "characters_per_token": facts["val_characters"] / encoded,
        "val_length_as_characters": facts["val_characters"],
        "val_length_as_tokens": encoded,
    }


def sample(tokenizer: Tokenizer, text: str) -> str:
    """The first tokens of a passage, as pieces between bars and as ids."""
    ids = tokenizer.encode(text[:SHOWN_CHARACTERS])[:SHOWN_TOKENS]
    pieces = [tokenizer.bytes_of(token) for token in ids]
    size = sum(map(len, pieces))
    shown = "|".join(printable(piece) for piece in pieces)
    return f"{len(ids)} tokens for {size} bytes\n\n|{shown}|\n\n{' '.join(map(str, ids))}\n"


def encodings(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What becomes of a few texts of different kinds: a row each, with its tokens as pieces for the eye, ids, and how many bytes each has.

    A character the alphabet lacks is a token of no bytes and no piece.
    """
    rows = []
    for title, text in EXAMPLES.items():
        pieces = [(token, tokenizer.bytes_of(token)) for token in tokenizer.encode(text)]
        tokens = [{"piece": printable(piece), "id": token, "bytes": len(piece)} for token, piece in pieces]
        rows.append({"title": title, "text": text, "bytes": len(text.encode()), "characters": len(text), "tokens": tokens})
    return rows
