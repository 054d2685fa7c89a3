"""Token shards: what is in the files, that every tokenizer holds out the same bytes, and what happens to a file that was cut."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.data import shards
from llm_from_scratch.data.documents import Document, Split, read_documents, with_splits, write_documents
from llm_from_scratch.data.shards import Shards, document_lengths, open_shards, write_lengths, write_shards
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.tokenizer.bpe import train_bpe
from llm_from_scratch.tokenizer.char import train_char

EOT = 300


def code_points(texts: Sequence[str]) -> list[list[int]]:
    return [[ord(one) for one in text] for text in texts]


def written(folder: Path, train: Sequence[str], val: Sequence[str], vocab_size: int = 301) -> Shards:
    with bundle.writing(folder) as partial:
        facts = write_shards(partial, {"train": train, "validation": val}, code_points, EOT, vocab_size)
        bundle.seal(partial, "tokens", "tokenize@test", **facts)
    return open_shards(folder)


def test_documents_follow_one_another_each_closed_by_the_end_of_text(tmp_path: Path) -> None:
    made = written(tmp_path / "t", ["ab", "", "c"], ["é"])

    assert made.train.tolist() == [97, 98, EOT, EOT, 99, EOT]
    assert made.val.tolist() == [233, EOT]
    assert (made.eot, made.vocab_size) == (EOT, 301)
    assert document_lengths(made.train, EOT).tolist() == [2, 0, 1]


def test_facts_count_tokens_documents_characters_and_bytes(tmp_path: Path) -> None:
    facts = write_shards(tmp_path, {"train": ["ab", "c"], "validation": ["é", "1"]}, code_points, EOT, 301)

    assert facts == {
        "dtype": "<u2",
        "eot": EOT,
        "vocab_size": 301,
        "train_documents": 2,
        "train_tokens": 5,
        "train_characters": 3,
        "train_bytes": 3,
        "train_sha256": hashlib.sha256(b"abc").hexdigest(),
        "val_documents": 2,
        "val_tokens": 4,
        "val_characters": 2,
        "val_bytes": 3,
        "val_sha256": hashlib.sha256("é1".encode()).hexdigest(),
    }


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_until_the_vocabulary_needs_more(tmp_path: Path, vocab_size: int, width: int) -> None:
    made = written(tmp_path / "t", ["ab"], ["\uffff"], vocab_size)

    assert (tmp_path / "t" / "train.bin").read_bytes() == b"".join(one.to_bytes(width, "little") for one in (97, 98, EOT))
    assert made.val.tolist() == [65_535, EOT]


def test_a_corpus_is_encoded_in_batches_and_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 10)
    produced, sizes = 0, []

    def texts() -> Iterator[str]:
        nonlocal produced
        for _ in range(25):
            produced += 1
            yield "abcd"

    def encode(batch: Sequence[str]) -> list[list[int]]:
        sizes.append((len(batch), produced))
        return code_points(batch)

    write_shards(tmp_path, {"train": texts(), "validation": ["x"]}, encode, EOT, 301)
    assert sizes[:3] == [(3, 3), (3, 6), (3, 9)]
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == [*map(ord, "abcd"), EOT] * 25


def test_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: dict[Split, list[str]] = {"train": [f"document {n}" * n for n in range(40)], "validation": ["x"]}
    (tmp_path / "small").mkdir()
    whole = write_shards(tmp_path, texts, code_points, EOT, 301)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 1)

    assert write_shards(tmp_path / "small", texts, code_points, EOT, 301) == whole
    assert (tmp_path / "small" / "train.bin").read_bytes() == (tmp_path / "train.bin").read_bytes()


CORPUS = [Document(f"d{n}", f"Title {n}", f"Dokument {n}: naïve café, “quoted” 東京 {n * n}\n\n" * (n % 5 + 1)) for n in range(60)]


def tokens_of(source: Path, made: Tokenizer, folder: Path) -> tuple[dict[str, Any], Shards]:
    names: tuple[Split, ...] = ("train", "validation")
    splits = {name: [document.text for document in read_documents(source, name)] for name in names}
    with bundle.writing(folder) as partial:
        made.save(partial)
        facts = write_shards(partial, splits, made.encode_batch, made.eot, made.vocab_size)
        bundle.seal(partial, "tokens", "tokenize@test", **facts)
    return facts, open_shards(folder)


def test_characters_and_bpe_hold_out_the_same_bytes(tmp_path: Path) -> None:
    """The one ruler, bits per byte, needs the same held-out bytes under every rung, and each token's bytes must add up to them."""
    write_documents(tmp_path / "documents.jsonl", with_splits(CORPUS, 0.2))
    texts = [document.text for document in read_documents(tmp_path)]
    tokenizers: dict[str, Tokenizer] = {"char": train_char(texts), "bpe": train_bpe(texts, 400)}
    found = {name: tokens_of(tmp_path, made, tmp_path / name) for name, made in tokenizers.items()}
    char, bpe = found["char"][0], found["bpe"][0]

    assert all(char[key] == bpe[key] for key in ("val_sha256", "val_bytes", "val_characters", "val_documents"))
    assert char["val_tokens"] == char["val_characters"] + char["val_documents"] > bpe["val_tokens"]
    for name, (facts, opened) in found.items():
        back = tokenizer.load(tmp_path / name)
        assert back.token_bytes()[opened.val].sum() == facts["val_bytes"]
        held_out = "".join(document.text for document in read_documents(tmp_path, "validation"))
        assert back.decode(opened.val.tolist()) == held_out
        assert facts["val_sha256"] == hashlib.sha256(held_out.encode()).hexdigest()


def test_the_files_are_mapped_and_cannot_be_written_by_accident(tmp_path: Path) -> None:
    made = written(tmp_path / "t", ["ab"], ["c"])

    assert isinstance(made.train, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        made.train[0] = 1


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_a_split_without_documents_says_which_parameter_to_change(tmp_path: Path, empty: str) -> None:
    texts = {"train": ["a"], "validation": ["b"]} | {empty: []}

    with pytest.raises(ValueError, match=f"the corpus has no {empty} documents, wanted one at least; .*sources.<corpus>.validation"):
        write_shards(tmp_path, texts, code_points, EOT, 301)  # type: ignore[arg-type]


def test_ids_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token ids are 97 … 19968, the vocabulary has 301"):
        write_shards(tmp_path, {"train": ["a一"], "validation": ["b"]}, code_points, EOT, 301)


def test_half_a_character_is_named_because_its_bytes_cannot_be_counted(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the document that begins 'ab\\ud800' holds half a character .* the download gate must refuse it"
    ):
        write_shards(tmp_path, {"train": ["a", "ab\ud800"], "validation": ["b"]}, lambda texts: [[1]] * len(texts), EOT, 301)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "t", ["abc"], ["c"])
    (tmp_path / "t" / "train.bin").write_bytes(b"a\0b\0")

    with pytest.raises(bundle.BundleError, match=r"train\.bin: 4 bytes, the manifest says 4 tokens of <u2; dvc repro tokenize"):
        open_shards(tmp_path / "t")


def test_another_kind_of_bundle_is_refused(tmp_path: Path) -> None:
    with bundle.writing(tmp_path / "m") as partial:
        bundle.seal(partial, "model", "train@base")

    with pytest.raises(bundle.BundleError, match="found a bundle of kind 'model', wanted tokens"):
        open_shards(tmp_path / "m")
    with pytest.raises(bundle.BundleError, match="no finished bundle"):
        open_shards(tmp_path / "nowhere")


def test_lengths_are_a_histogram_of_both_splits(tmp_path: Path) -> None:
    """Lengths 0, 2, 59 and 60, 2: bars three tokens wide, from 0 … 2 to 60 … 62."""
    made = written(tmp_path / "t", ["", "ab", "x" * 59], ["x" * 60, "ab"])
    write_lengths(tmp_path / "lengths.csv", made)
    rows = [line.split(",") for line in (tmp_path / "lengths.csv").read_text().splitlines()]

    assert rows[0] == ["first", "last", "train", "validation"]
    assert rows[1] == ["0", "2", "2", "1"]
    assert [row for row in rows[2:] if row[2:] != ["0", "0"]] == [["57", "59", "1", "0"], ["60", "62", "0", "1"]]
    assert sum(int(row[2]) + int(row[3]) for row in rows[1:]) == 5
