"""Text as a point on the unit sphere, so that near in meaning is near in angle: a BERT-like encoder and the mean of its token vectors.

This is what sentence-transformers computes for all-MiniLM-L6-v2 (Reimers & Gurevych 2019), from plain transformers and files on disk.
What it cannot do is read past the encoder's own limit (256 tokens): longer texts are cut there, so passages are made shorter than that.

Full precision on purpose: torch's dynamic int8 is 1.7 times as fast, but its vectors have a cosine of only 0.95 (least 0.92) with these.

Shapes: N texts, T tokens, D dimensions of the vectors (384 for MiniLM).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from llm_from_scratch import bundle

Vectors = NDArray[np.float32]
Progress = Callable[[int], object]

PART = 1024  # texts embedded between two saves of a journal: a few seconds of work


def quiet(done: int) -> None:
    """The progress nobody watches; `done` is how many more texts are embedded."""


class Embedder:
    """`embed` turns texts into unit vectors (N, D); `digest` names the bundle it was opened from, for indexes to remember."""

    def __init__(self, model: Any, tokenizer: Any, limit: int, digest: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.limit = limit
        self.digest = digest
        self.dimension: int = model.config.hidden_size

    @classmethod
    def open(cls, folder: Path) -> Embedder:
        """The encoder in a corpus bundle, wherever its config.json lies. Raises BundleError when it is damaged or not there."""
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise ValueError("no transformers here; pip install 'llm-from-scratch[retrieval]' brings it") from None
        manifest = bundle.verify(folder, "corpus")
        home = _home(folder, manifest)
        with _no_progress_bar():
            model = AutoModel.from_pretrained(home, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
        return cls(model.eval(), tokenizer, _limit(home, model.config.max_position_embeddings), manifest.digest)

    def embed(self, texts: Sequence[str], batch: int = 16, progress: Progress = quiet) -> Vectors:
        """Unit vectors (N, D) of `texts`, in their order. Alike lengths share a batch, so that little of it is padding."""
        ids: list[list[int]] = self.tokenizer(_encodable(texts), truncation=True, max_length=self.limit)["input_ids"] if texts else []
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]), reverse=True)
        vectors = np.empty((len(ids), self.dimension), np.float32)
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            vectors[places] = self._pooled([ids[place] for place in places])
            progress(len(places))
        return vectors

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where each token of each text lies, as (first character, one after the last); the encoder's own marks are left out."""
        if not texts:
            return []
        found = self.tokenizer(_encodable(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return [[(int(first), int(last)) for first, last in text] for text in found]

    @torch.inference_mode()
    def _pooled(self, ids: list[list[int]]) -> Vectors:
        padded = pad_sequence([torch.tensor(text) for text in ids], batch_first=True, padding_value=self.tokenizer.pad_token_id)
        real = pad_sequence([torch.ones(len(text)) for text in ids], batch_first=True)
        states = self.model(input_ids=padded, attention_mask=real).last_hidden_state
        mean = torch.einsum("ntd,nt->nd", states, real) / real.sum(1, keepdim=True)
        vectors: Vectors = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return vectors


@dataclass(frozen=True)
class Embedded:
    """The vectors (N, D), and how many of them an earlier, interrupted run had left."""

    vectors: Vectors
    resumed_at: int


def embed_in_parts(embedder: Embedder, texts: Sequence[str], batch: int, journal: Path, progress: Progress = quiet) -> Embedded:
    """As `Embedder.embed`, saving every part into the folder `journal`, so that the same call goes on where it was killed.

    The folder must belong to these texts, this embedder and this code: name it after their digests.
    """
    journal.mkdir(parents=True, exist_ok=True)
    parts: list[Vectors] = []
    resumed_at = 0
    for start in range(0, len(texts), PART):
        part, path = texts[start : start + PART], journal / f"{start:09}.npy"
        if path.exists():
            parts.append(np.load(path, allow_pickle=False))
            resumed_at += len(part)
            progress(len(part))
        else:
            parts.append(embedder.embed(part, batch, progress))
            _save(path, parts[-1])
    return Embedded(np.concatenate(parts) if parts else np.empty((0, embedder.dimension), np.float32), resumed_at)


def _encodable(texts: Sequence[str]) -> list[str]:
    """Half a surrogate pair, which JSON can smuggle into a string, as a question mark: same length, and the tokenizer takes it."""
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]


def _save(path: Path, vectors: Vectors) -> None:
    """Whole or not at all: a part that exists is complete, even after a power cut."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Reading 100 tensors takes a blink, and transformers would draw a bar for it on every start of a server."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _home(folder: Path, manifest: bundle.Manifest) -> Path:
    """The folder of the encoder: the config.json highest up, as modules around it (1_Pooling) have one of their own."""
    found = sorted((name for name in manifest.files if Path(name).name == "config.json"), key=lambda name: (name.count("/"), name))
    if not found:
        raise bundle.BundleError(f"{folder}: found no config.json, wanted an encoder; name the source of one in index.embedder")
    return (folder / found[0]).parent


def _limit(home: Path, positions: int) -> int:
    """How many tokens the encoder was trained to pool, which sentence-transformers notes beside it; all its positions where it does not."""
    noted = home / "sentence_bert_config.json"
    if not noted.exists():
        return positions
    return min(positions, int(json.loads(noted.read_text(encoding="utf-8"))["max_seq_length"]))
