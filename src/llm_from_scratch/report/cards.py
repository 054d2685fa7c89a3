"""Model cards in the Hub's form: metadata that its pages and searches read, results among them, then Markdown from a template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llm_from_scratch.bundle import Manifest
from llm_from_scratch.report import pages

OURS = ("ngram", "bigram", "mlp", "attention")
"""Architectures that no library but this one opens."""
RESULTS = {
    "val_bpb": ("bits_per_byte", "bits per byte of held-out text"),
    "val_ppl": ("perplexity", "perplexity of held-out text"),
    "f1": ("f1", "F1 of written answers"),
    "exact_match": ("exact_match", "exact match of written answers"),
    "accuracy": ("accuracy", "held-out pairs told right"),
    "gold": ("reward", "gold reward of held-out prompts"),
}
"""Of a model's numbers, those that its metadata names: the Hub's type of the metric, and what it is called."""


def write_model(path: Path, values: Mapping[str, Any], model: str, manifest: Manifest) -> None:
    """The card of a bundle. Raises ValueError where its metadata is not a card's."""
    metrics, params = values["m"], values["params"]
    parts = [part for part in ("ladder", "finetune", "alignment", "quantize") if model in metrics[part]]
    row = metrics[parts[0]][model]
    section = next(params[part][model] for part in ("train", "finetune", "quantize") if model in params[part])
    ours = row.get("architecture") in OURS
    corpus = params["tokenize"][params["train"][model if model in params["train"] else "base"]["tokens"]]["corpus"]
    data = ModelCardData(
        license="mit",
        language="en",
        library_name="peft" if manifest.kind == "adapter" else "llm-from-scratch" if ours else "transformers",
        pipeline_tag="text-classification" if manifest.kind == "reward" else "text-generation",
        tags=["llm-from-scratch", manifest.kind],
        model_name=model,
        eval_results=results(row, corpus),
    )
    told = {"model": model, "manifest": manifest, "row": row, "section": section, "corpus": corpus, "ours": ours}
    _write(path, data, "card.md.j2", {**values, **told})


def write_retriever(path: Path, values: Mapping[str, Any]) -> None:
    """The card of the index and the encoder that it was made with."""
    data = ModelCardData(license="cc-by-sa-4.0", language="en", pipeline_tag="sentence-similarity", tags=["llm-from-scratch", "retrieval"])
    _write(path, data, "retriever.md.j2", values)


def results(row: Mapping[str, Any], corpus: str) -> list[EvalResult]:
    """A model's numbers as the Hub has them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=corpus,
            dataset_name=f"{corpus}, held out",
            dataset_split="validation",
            metric_type=kind,
            metric_name=name,
            metric_value=row[key],
        )
        for key, (kind, name) in RESULTS.items()
        if key in row
    ]


def _write(path: Path, data: ModelCardData, template: str, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{pages.render(template, values)}").save(path)
