"""Documents become ids: read, train a tokenizer, encode, write; and show what the tokenizer does to a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from llm_from_scratch import bundle, progress, tracking
from llm_from_scratch.config import Params
from llm_from_scratch.data.documents import Split, read_documents
from llm_from_scratch.data.shards import open_shards, write_lengths, write_shards
from llm_from_scratch.tokenizer import TokenizeParams, Tokenizer, digest, printable, train

SHOWN_TOKENS = 60
SHOWN_CHARACTERS = 600


def run(params: Params, name: str, root: Path) -> None:
    settings = params.tokenize[name]
    source, target = root / "artifacts" / "raw" / settings.corpus, root / "artifacts" / "tokens" / name
    corpus = bundle.verify(source, "corpus")

    with tracking.stage_run("tokenize", name, settings.model_dump(), [f"artifacts/raw/{settings.corpus}"]) as log:
        started = perf_counter()
        tokenizer = learn(settings, source)
        with bundle.writing(target) as folder:
            tokenizer.save(folder)
            splits: tuple[Split, Split] = ("train", "validation")
            texts = {split: shown(read(source, split), f"encode {split}") for split in splits}
            facts = write_shards(folder, texts, tokenizer.encode_batch, tokenizer.eot, tokenizer.vocab_size)
            facts |= {"corpus": settings.corpus, "tokenizer": settings.kind, "tokenizer_digest": digest(folder)}
            bundle.seal(folder, "tokens", f"tokenize@{name}", {"corpus": corpus.digest}, **facts)
        metrics = measured(facts) | {"seconds": perf_counter() - started}
        log(0, metrics)

    with bundle.writing(root / "artifacts" / "logs" / "tokenize" / name) as folder:
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (folder / "sample.txt").write_text(sample(tokenizer, next(read(source, "validation"))), encoding="utf-8")
        write_lengths(folder / "lengths.csv", open_shards(target))


def learn(settings: TokenizeParams, source: Path) -> Tokenizer:
    """A tokenizer of the corpus. Merges are statistics, so they come from the training documents alone.

    The alphabet is of all documents: a held-out character without an id would become <unk>, whose bytes nobody can count, and bits per
    byte would no longer be over the same bytes. Which characters exist tells a model nothing about the text.
    """
    texts = read(source, None if settings.kind == "char" else "train")
    with progress.bar(desc="merges", total=0, disable=settings.kind == "char") as bar:

        def merged(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return train(settings, texts, merged)


def read(source: Path, split: Split | None) -> Iterator[str]:
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
