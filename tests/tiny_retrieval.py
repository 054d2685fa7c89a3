"""A real BERT and a real WordPiece tokenizer, too small to mean anything, in the folder that download would leave; and an index over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llm_from_scratch import bundle
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import Index, IndexParams, SearchParams, build_index
from llm_from_scratch.retrieval.passages import Passage

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-()"
WORDS = ["the", "of", "a", "is", "what", "who", "cat", "dog", "film", "star", "river", "in", "and"]

# Nothing is too far away to be answered from, and every source is cited: a tiny model's words are in none.
SEARCH = SearchParams(probes=4, dense_share=0.55, word_share=0.3, minimum_evidence=-1.0, support=0.0)
PARAMS = IndexParams(
    documents="wiki",
    embedder="tiny",
    passage_tokens=40,
    overlap_tokens=8,
    batch=4,
    maximum_passages=0,
    flat_below=1000,
    cells=8,
    search=SEARCH,
)


def tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """A sealed corpus bundle of an encoder that reads at most 64 positions and knows the letters and a few words."""
    with bundle.writing(folder) as partial:
        home = partial / "files" / "tiny_bert" / "model"
        home.mkdir(parents=True)
        _save_model(home, seed)
        _save_tokenizer(home)
        pooling = home / "1_Pooling"
        pooling.mkdir()
        (pooling / "config.json").write_text('{"pooling_mode_mean_tokens": true}\n', encoding="utf-8")
        bundle.seal(partial, "corpus", "download@tiny")
    return folder


def tiny_index(folder: Path, embedder: Embedder, passages: Sequence[Passage], params: IndexParams = PARAMS) -> Index:
    """The passages, indexed and sealed as the stage does it."""
    with bundle.writing(folder) as partial:
        build_index(partial, passages, embedder.embed([passage.searched for passage in passages]), params)
        bundle.seal(partial, "index", "index", {"corpus": "0" * 64, "embedder": embedder.digest}, passages=len(passages))
    return Index.open(folder, embedder)


def vocabulary() -> dict[str, int]:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def _save_model(home: Path, seed: int) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,  # the default leaves a random encoder's vectors all alike
    )
    BertModel(config).save_pretrained(home)


def _save_tokenizer(home: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece(vocabulary(), unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = [(mark, vocabulary()[mark]) for mark in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    ).save_pretrained(home)
