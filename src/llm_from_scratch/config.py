"""params.yaml as frozen, strict models. Each section is declared beside the code that reads it; here they meet.

Checked before any work: an unknown key, a wrong type or a name that leads nowhere is reported with its path, all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from llm_from_scratch.data.corpora import DownloadParams, Source
from llm_from_scratch.evaluation import EvaluateParams
from llm_from_scratch.evaluation.certificate import CertifyParams
from llm_from_scratch.evaluation.limits import CardParams
from llm_from_scratch.finetune import FinetuneParams
from llm_from_scratch.inference.quantize import QuantizeParams
from llm_from_scratch.retrieval.index import IndexParams
from llm_from_scratch.section import Section
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.tokenizer import TokenizeParams
from llm_from_scratch.training.plan import RungParams

EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


class ParamsError(ValueError):
    """params.yaml is not what the code can run with; one line an issue, each with its path."""


class Params(Section):
    """The whole of params.yaml."""

    sources: dict[str, Source]
    download: DownloadParams
    tokenize: dict[str, TokenizeParams]
    train: dict[str, RungParams]
    quantize: dict[str, QuantizeParams]
    finetune: dict[str, FinetuneParams]
    index: IndexParams
    evaluate: EvaluateParams
    cards: CardParams
    serve: ServeParams
    certify: CertifyParams

    @model_validator(mode="after")
    def names_lead_somewhere(self) -> Params:
        if wrong := list(self._dangling()):
            raise ValueError("\n".join(wrong))
        return self

    def _dangling(self) -> Iterator[str]:
        partial = ("lora", "qlora", "reward")  # an adapter is no whole model, and a reward model writes nothing
        models = [*self.train, *(name for name, entry in self.finetune.items() if entry.method not in partial)]
        packed = [name for name, entry in self.quantize.items() if entry.scheme == "nf4"]
        guides = [name for name, entry in self.finetune.items() if entry.method == "reward"]
        links: list[tuple[str, str, list[str]]] = [
            *((f"download.fetch.{place}", name, list(self.sources)) for place, name in enumerate(self.download.fetch)),
            *((f"tokenize.{name}.corpus", entry.corpus, self.download.fetch) for name, entry in self.tokenize.items()),
            *((f"train.{name}.tokens", entry.tokens, list(self.tokenize)) for name, entry in self.train.items()),
            *((f"quantize.{name}.model", entry.model, models) for name, entry in self.quantize.items()),
            *((f"quantize.{name}.tokens", entry.tokens, list(self.tokenize)) for name, entry in self.quantize.items()),
            *(
                (f"finetune.{name}.model", entry.model, packed if entry.method == "qlora" else models)
                for name, entry in self.finetune.items()
            ),
            *((f"finetune.{name}.records", entry.records, self.download.fetch) for name, entry in self.finetune.items()),
            *(
                (f"finetune.{name}.guide", entry.guide, guides if entry.method in ("dpo", "ppo", "grpo") else [entry.model])
                for name, entry in self.finetune.items()
            ),
            *((f"cards.models.{place}", name, models) for place, name in enumerate(self.cards.models)),
            ("index.documents", self.index.documents, self.download.fetch),
            ("index.embedder", self.index.embedder, self.download.fetch),
            ("serve.model", self.serve.model, [*models, *self.quantize]),
        ]
        for path, name, known in links:
            if name not in known:
                yield f"{path}: no '{name}'; there is {', '.join(known)}"


def parse(tree: Mapping[str, Any], origin: str) -> Params:
    """`tree` as Params. Raises ParamsError naming `origin` and the path of every issue found."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise ParamsError("\n".join(f"{origin}: {line}" for issue in error.errors() for line in _lines(issue, tree))) from None


def _lines(issue: ErrorDetails, tree: Mapping[str, Any]) -> list[str]:
    if issue["type"] == "value_error":
        place = _path(issue["loc"], tree)
        return [f"{place}: {line}" if place else line for line in str(issue["ctx"]["error"]).splitlines()]
    return [f"{_path(issue['loc'], tree)}: {_complaint(issue)}"]


def _complaint(issue: ErrorDetails) -> str:
    if issue["type"] == "missing":
        return "missing; params.yaml has no defaults in Python, so write it down"
    if issue["type"] == "extra_forbidden":
        return "unknown key; check its spelling or take it out"
    if issue["type"] in EXPECTED:
        return f"expected {EXPECTED[issue['type']]}, got {issue['input']!r}"
    return f"{issue['msg'][0].lower()}{issue['msg'][1:]}, got {issue['input']!r}"


def _path(location: tuple[int | str, ...], tree: Any) -> str:
    """The dotted path as a person wrote it: pydantic adds the tag of a union member, which params.yaml does not have."""
    steps: list[str] = []
    for place, step in enumerate(location):
        known = (isinstance(tree, Mapping) and step in tree) or (isinstance(tree, list) and isinstance(step, int))
        if known or place == len(location) - 1:
            steps.append(str(step))
            tree = tree[step] if known else None
    return ".".join(steps)
