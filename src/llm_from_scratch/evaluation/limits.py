"""What the model cards tell beside the report: where a model is weak, what it leans to, what it knows by heart. The section `cards`.

Everything is measured on the corpus that `base` has read: all these models were made of it, and the held-out texts are from there. What is
searched may be another corpus, of which they know nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import nn

from llm_from_scratch.data.documents import Document
from llm_from_scratch.evaluation.bias import pronouns, pronouns_read
from llm_from_scratch.evaluation.energy import EnergyParams
from llm_from_scratch.evaluation.memorization import MemorizationParams, memorization, runs_of
from llm_from_scratch.evaluation.multiple_choice import Progress, quiet
from llm_from_scratch.evaluation.topics import bits_by_topic
from llm_from_scratch.inference.decoding import context_of
from llm_from_scratch.section import Section
from llm_from_scratch.tokenizer.base import Tokenizer


class CardParams(Section):
    """The `models` that are looked at beside the served one, on so many held-out documents (0: all); and what energy is assumed to be."""

    models: list[str]
    held_out_documents: int = Field(ge=0)
    memorization: MemorizationParams
    energy: EnergyParams


@dataclass(frozen=True)
class Material:
    """The corpus as these measurements want it, read once for all models: texts, the runs in `trained`, and its pronouns by occupation."""

    trained: list[str]
    held_out: list[Document]
    known: frozenset[int]
    read: Mapping[str, tuple[int, int]]


def material(documents: Sequence[Document], params: CardParams) -> Material:
    """Of both splits of a corpus."""
    trained = [document.text for document in documents if document.split == "train"]
    held_out = [document for document in documents if document.split == "validation"]
    known = runs_of(trained, params.memorization.run_words)
    return Material(trained, held_out[: params.held_out_documents or None], known, pronouns_read(trained))


def limits(
    model: nn.Module, tokenizer: Tokenizer, material: Material, params: CardParams, seed: int, progress: Progress = quiet
) -> dict[str, Any]:
    """`topics`, `pronouns` and `memorization` of one model; see `topics`, `bias` and `memorization`."""
    texts = [document.text for document in material.held_out]
    return {
        "topics": bits_by_topic(model, tokenizer, material.held_out, context_of(model), progress),
        "pronouns": pronouns(model, tokenizer, material.read),
        "memorization": memorization(model, tokenizer, material.trained, texts, material.known, params.memorization, seed),
    }
