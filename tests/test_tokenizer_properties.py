"""Four encoders, one answer: ours, the textbook's, tiktoken from our ranks, tokenizers from our file; for any text at all.

And the ruler that stands on it: what tokens spell adds up to the same held-out bytes under every tokenizer.
"""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_from_scratch import tokenizer
from llm_from_scratch.data.documents import read_documents
from llm_from_scratch.data.shards import FILES, open_shards, write_shards
from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.model.bigram import BigramParams
from llm_from_scratch.model.registry import build
from llm_from_scratch.tokenizer import SPECIAL, BpeTokenizer, Tokenizer
from llm_from_scratch.tokenizer.bpe import PATTERN, WORDS, learn_merges, train_bpe
from llm_from_scratch.tokenizer.char import train_char

ROOT = Path(__file__).parent.parent
SLICE = 300_000  # characters of a real corpus
MEGABYTE = 1_000_000

RUNS = ["a" * 4096, " " * 4096, "\n \t" * 600, "é" * 2000, "語" * 2000, "👩‍🚀" * 400, "7" * 4096]
TEXTS = [topics[name] for name in sorted(topics)][:40] + ["Füße, naïve café; 東京 and Москва 👩‍🚀\r\n\tit's we'll 1234567"] * 9 + RUNS

EMOJI = st.text(st.sampled_from("😀👩🚀🏽\u200d\ufe0f🇫🇷👍️❤🧑‍💻"), max_size=60)
CONTROL = st.text(st.characters(categories=["Cc", "Cf", "Zs", "Zl", "Zp"]), max_size=60)
LETTERS = st.text(st.characters(categories=["L", "M", "N"]), max_size=60)
ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=120)
HALVES = st.text(st.characters(categories=["Cs"]), max_size=4)
NAMES = st.sampled_from([*SPECIAL, "<|", "|>", "<|endoftext", "endoftext|>"])
BROKEN = st.lists(st.one_of(ASSIGNED, HALVES, EMOJI), max_size=6).map("".join)
KNOWN = st.lists(st.one_of(ASSIGNED, EMOJI, CONTROL, LETTERS, NAMES), max_size=6).map("".join)
MANY = settings(max_examples=400, deadline=None)


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    """Merges of English, of other scripts, and of long runs of one character."""
    return train_bpe(TEXTS, 1200)


@pytest.fixture(scope="module")
def tik(bpe: BpeTokenizer) -> tiktoken.Encoding:
    return tiktoken_of(bpe)


@pytest.fixture(scope="module")
def rust(bpe: BpeTokenizer) -> tokenizers.Tokenizer:
    return rust_of(bpe.document())


def tiktoken_of(made: BpeTokenizer) -> tiktoken.Encoding:
    ranks = {made.bytes_of(token): token for token in range(made.eot)}
    return tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=made.special)


def rust_of(document: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library would cut the names of special tokens out of any text; told not to, it encodes as we do."""
    made = tokenizers.Tokenizer.from_str(json.dumps(document))
    made.encode_special_tokens = True
    return made


def textbook(made: BpeTokenizer, text: str) -> list[int]:
    """Sennrich's algorithm as printed: in each word, join the neighbours that were joined first in training, until none were."""
    rank = {pair: place for place, pair in enumerate(made.merges)}
    place = {made.bytes_of(token): token for token in range(256)}
    ids: list[int] = []
    for word in WORDS.findall(text):
        symbols = [place[bytes([byte])] for byte in word.encode()]
        while known := [rank[pair] for pair in pairwise(symbols) if pair in rank]:
            first, joined, at = made.merges[min(known)], [], 0
            while at < len(symbols):
                whole = tuple(symbols[at : at + 2]) == first
                joined.append(256 + min(known) if whole else symbols[at])
                at += 2 if whole else 1
            symbols = joined
        ids += symbols
    return ids


@MANY
@given(text=KNOWN)
@example(text="".join(SPECIAL))
@example(text=" \u3000\x85\u2028\n x\x00\x1b[0m")
def test_all_encoders_agree_on_any_assigned_characters(
    bpe: BpeTokenizer, tik: tiktoken.Encoding, rust: tokenizers.Tokenizer, text: str
) -> None:
    ids = bpe.encode(text)

    assert ids == textbook(bpe, text) == bpe.encode_reference(text)
    assert ids == tik.encode_ordinary(text) == rust.encode(text).ids
    assert bpe.encode_batch([text])[0].tolist() == ids
    assert bpe.decode(ids) == text == rust.decode(ids)
    assert max(ids, default=0) < bpe.eot, "no text makes a special token"


@MANY
@given(text=st.text(max_size=200))
def test_the_fast_encoders_agree_on_characters_that_are_not_assigned_yet_too(
    bpe: BpeTokenizer, tik: tiktoken.Encoding, rust: tokenizers.Tokenizer, text: str
) -> None:
    """The module `regex` knows a later Unicode than the two Rust libraries, so what it calls a letter may not be one for them."""
    ids = bpe.encode(text)

    assert ids == tik.encode_ordinary(text) == rust.encode(text).ids
    assert bpe.decode(ids) == text == bpe.decode(bpe.encode_reference(text))


@MANY
@given(text=BROKEN)
def test_half_characters_become_replacement_characters_as_in_tiktoken(
    bpe: BpeTokenizer, tik: tiktoken.Encoding, rust: tokenizers.Tokenizer, text: str
) -> None:
    repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = bpe.encode(text)

    assert ids == tik.encode_ordinary(text) == rust.encode(repaired).ids == bpe.encode_reference(text)
    assert bpe.encode_batch([text])[0].tolist() == ids
    assert bpe.decode(ids) == repaired


def test_every_assigned_character_is_cut_from_its_neighbours_alike(
    bpe: BpeTokenizer, tik: tiktoken.Encoding, rust: tokenizers.Tokenizer
) -> None:
    """What is a letter, a number or a blank decides where words end: 280,000 characters, each after a letter, a digit and a mark."""
    assigned = [one for one in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(one) not in ("Cs", "Cn", "Co")]
    text = "".join(f"a{one}7{one}!{one}{one} " for one in assigned)
    ids = bpe.encode(text)

    assert ids == tik.encode_ordinary(text)
    assert ids == bpe.encode_reference(text)
    assert ids == rust.encode(text).ids
    assert bpe.decode(ids) == text


@pytest.mark.parametrize("one", ["a", " ", "\n", "7", "!", "é", "語", "👩", "\x00", "\u200d"])
def test_a_megabyte_of_one_character(bpe: BpeTokenizer, tik: tiktoken.Encoding, rust: tokenizers.Tokenizer, one: str) -> None:
    text = one * (MEGABYTE // len(one.encode()))
    ids = bpe.encode(text)

    assert ids == bpe.encode_reference(text)
    assert bpe.encode_batch([text])[0].tolist() == ids
    if one not in " \n":  # there tiktoken itself panics; ours gives such a run to the slow encoder
        assert ids == tik.encode_ordinary(text)
    assert ids == rust.encode(text).ids
    assert bpe.decode(ids) == text


@pytest.mark.parametrize("name", ["shakespeare_bpe", "wikipedia_bpe"])
def test_all_encoders_agree_on_a_slice_of_the_corpus(name: str) -> None:
    tokens = ROOT / "artifacts" / "tokens" / name
    if not (tokens / "manifest.json").exists():
        pytest.skip(f"no tokens in artifacts/tokens/{name}; make repro builds them")
    made = tokenizer.load(tokens)
    assert isinstance(made, BpeTokenizer)
    source = ROOT / "artifacts" / "raw" / name.removesuffix("_bpe")
    text = "\n".join(document.text[:20_000] for document, _ in zip(read_documents(source), range(500), strict=False))[:SLICE]
    ids = made.encode(text)

    assert ids == made.encode_reference(text) == tiktoken_of(made).encode_ordinary(text)
    assert ids == tokenizers.Tokenizer.from_file(str(tokens / "tokenizer.json")).encode(text).ids
    assert made.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.one_of(KNOWN, NAMES), max_size=8), size=st.integers(261, 340))
def test_no_training_text_can_name_or_spell_a_special_token(texts: list[str], size: int) -> None:
    made = train_bpe(texts, size)

    assert made.vocab_size <= size
    assert made.eot == made.vocab_size - len(SPECIAL)
    for text in [*texts, *SPECIAL]:
        assert not set(made.encode(text)) & set(made.special.values())
        assert made.decode(made.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(words=st.dictionaries(st.text("abc é", min_size=1, max_size=8), st.integers(1, 9), max_size=12), wanted=st.integers(0, 20))
def test_merges_are_those_of_counting_everything_again_after_each(words: dict[str, int], wanted: int) -> None:
    """The textbook loop, with Hugging Face's rule for ties: the pair with the lower ids."""
    place = {bytes([byte]): token for token, byte in enumerate(tokenizer.bpe.BYTE_ORDER)}
    spelled = {word: [place[bytes([byte])] for byte in word.encode()] for word in words}
    expected: list[tuple[int, int]] = []
    while len(expected) < wanted:
        counts: dict[tuple[int, int], int] = {}
        for word, ids in spelled.items():
            for pair in pairwise(ids):
                counts[pair] = counts.get(pair, 0) + words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        spelled = {word: tokenizer.bpe.merged(ids, best, 256 + len(expected)) for word, ids in spelled.items()}
        expected.append(best)

    assert learn_merges(words, wanted) == expected


# The ruler

HELD_OUT = ["naïve café 語語 🙂\n", "", "日本", "x", "🙂🙂 <|endoftext|> and a last half-sentence with é"]


def rulers() -> dict[str, Tokenizer]:
    train = ["the cat and the dog", "naïve", *HELD_OUT]
    return {"char": train_char(train), "bytes": train_bpe([], 261), "small": train_bpe(train[:1], 270), "large": train_bpe(train * 2, 340)}


@pytest.mark.parametrize("name", ["char", "bytes", "small", "large"])
def test_bits_per_byte_are_over_the_same_bytes_whatever_the_tokens(name: str, tmp_path: Path) -> None:
    """A uniform model pays log2(V) bits a token, ends of documents too, over the bytes of the text as UTF-8; the end of a text that
    comes before the first makes the first token one to predict like any other."""
    made = rulers()[name]
    facts = write_shards(tmp_path, dict.fromkeys(FILES, HELD_OUT), made.encode_batch, made.eot, made.vocab_size)
    ids = np.fromfile(tmp_path / "val.bin", facts["dtype"])
    size = sum(len(text.encode()) for text in HELD_OUT)
    found = score(build(BigramParams(architecture="bigram"), made.vocab_size), np.concatenate([[made.eot], ids]), made.token_bytes(), 8)

    assert facts["val_bytes"] == found.bytes == size
    assert found.val_bpb == pytest.approx(math.log2(made.vocab_size) * facts["val_tokens"] / size)
    assert made.decode(ids.tolist()) == "".join(HELD_OUT)


def test_a_character_that_is_split_into_bytes_counts_each_of_them_once() -> None:
    """🙂 in one token, in its first two bytes and the rest, or in four: four bytes always."""
    place = {byte: token for token, byte in enumerate(tokenizer.bpe.BYTE_ORDER)}
    f0, nine_f, nine_nine, eight_two = (place[byte] for byte in "🙂".encode())
    whole = BpeTokenizer([(f0, nine_f), (nine_nine, eight_two), (256, 257)])
    half = BpeTokenizer([(f0, nine_f)])
    none = BpeTokenizer([])

    assert [len(made.encode("🙂")) for made in (whole, half, none)] == [1, 3, 4]
    assert [made.token_bytes()[made.encode("🙂")].tolist() for made in (whole, half, none)] == [[4], [2, 1, 1], [1, 1, 1, 1]]


def test_the_real_corpora_hold_out_the_same_bytes_under_both_their_tokenizers() -> None:
    folders = [ROOT / "artifacts" / "tokens" / f"shakespeare_{kind}" for kind in ("char", "bpe")]
    if not all((folder / "manifest.json").exists() for folder in folders):
        pytest.skip("no tokens in artifacts/tokens/shakespeare_*; make repro builds them")
    spelled = [int(tokenizer.load(folder).token_bytes()[open_shards(folder).val].sum()) for folder in folders]

    held_out = sum(len(document.text.encode()) for document in read_documents(ROOT / "artifacts/raw/shakespeare", "validation"))
    assert spelled == [held_out, held_out]
