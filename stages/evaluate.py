"""Everything above, gathered: metrics.json, figures, cards, weeks, the report, and the verdict on promotion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isnan
from pathlib import Path
from typing import Any

from torch import nn

from llm_from_scratch import bundle, progress, tokenizer, tracking
from llm_from_scratch.config import Params
from llm_from_scratch.data.documents import read_documents
from llm_from_scratch.data.questions import questions
from llm_from_scratch.data.shards import open_shards
from llm_from_scratch.evaluation import energy
from llm_from_scratch.evaluation.calibration import answering
from llm_from_scratch.evaluation.heatmaps import attention_of
from llm_from_scratch.evaluation.limits import limits, material
from llm_from_scratch.evaluation.mixture import count, mixture
from llm_from_scratch.evaluation.promotion import Rule, Scores
from llm_from_scratch.evaluation.retrieval import CONDITIONS, graded, passages_for, replies_by_condition, retrieval_quality
from llm_from_scratch.evaluation.scores import Exam, scores_of, search_units
from llm_from_scratch.evaluation.searching import citations, search_limits
from llm_from_scratch.evaluation.selection import choose
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.quantize import load_bundle
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.model import registry
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.report import book, compared, figures, gather
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.retrieval.rag import answer, form_of
from llm_from_scratch.training.plan import TrainParams

HEATMAPS = ("attention", "gpt")
ANSWERING = ("sft", "lora", "qlora")
"""The methods that learn answers; the others learn which answers are better."""
ALIGNING, ADAPTERS = ("dpo", "ppo", "grpo"), ("lora", "qlora")
ILLUSTRATED = 8  # answered questions shown with what was read
SERVED, RETRIEVER = "served", "retriever"
"""Candidates beside the models of params.yaml: whichever of those is to be served, and the index."""


def run(params: Params, name: str, root: Path) -> None:
    artifacts, reports = root / "artifacts", root / "reports"
    models = [*params.train, *params.finetune, *params.quantize]
    manifests = {model: bundle.verify(artifacts / "models" / model) for model in models}

    raw = dict.fromkeys([params.index.documents, params.index.embedder, learned_from(params)])
    reads = [*(f"artifacts/raw/{name}" for name in raw), "artifacts/index"]
    reads += [f"artifacts/models/{model}" for model in models] + [f"artifacts/tokens/{params.train['ngram'].tokens}"]
    with tracking.stage_run("evaluate", "", params.evaluate.model_dump(), reads) as log:
        mixed = with_ngram(params, artifacts)
        stages = measured(params, artifacts / "logs")
        served = to_serve(params, stages["quantize"])
        answers, illustrated, weak = ask(params, artifacts, served["model"])
        weak |= look_at(params, artifacts, served["model"], weak)
        scores = examined(params, artifacts, served)
        for part, rows in (answers | {"mixture": mixed}).items():
            log(0, {f"{part}_{name}_{key}": value for name, row in rows.items() for key, value in row.items()})

    digests = {model: made.digest for model, made in manifests.items()}
    spent = estimates(params, stages, manifests)
    metrics = stages | answers | {"mixture": mixed, "served": served, "limits": weak, "energy": spent, "digests": digests}
    gather.write(reports / "metrics.json", metrics)
    gather.write(reports / "headline.json", compared.headline(metrics))
    with bundle.writing(artifacts / "plots") as new:
        compared.write_tables(new, metrics)
    draw(params, artifacts, reports / "figures", metrics)
    shown, by_hand = samples(params, artifacts / "logs"), gather.benchmarks(reports / "benchmarks")
    book.write(reports, book.Story(gather.rounded(metrics), params.model_dump(), manifests, shown, illustrated, by_hand))
    kept = write_scores(artifacts / "scores", scores)
    gather.write(reports / "verdict.json", verdict(params, metrics, manifests | {RETRIEVER: bundle.verify(artifacts / "index")}, kept))


def with_ngram(params: Params, artifacts: Path) -> dict[str, Any]:
    """Each rung that reads the n-gram's tokens, mixed with an n-gram; the end of train, which the rung has seen, fits the weights."""
    ruler = params.train["ngram"].tokens
    shards, words = open_shards(artifacts / "tokens" / ruler), tokenizer.load(artifacts / "tokens" / ruler)
    counted = count(shards.train, shards.vocab_size, params.evaluate.mixture)
    rungs = {name: rung for name, rung in params.train.items() if isinstance(rung, TrainParams) and rung.tokens == ruler}
    found = {}
    for name, rung in progress.bar(rungs.items(), desc="mixing with the n-gram", unit=" rungs"):
        model = registry.load_model(artifacts / "models" / name)
        assert isinstance(model, Rung)
        mixed = mixture(model, counted, shards.val[: rung.evaluate_tokens or None], words.token_bytes(), rung.context)
        found[name] = mixed.likelihood.metrics()
    return found


def ask(params: Params, artifacts: Path, model: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Held-out questions put to the served model with and without retrieval; its numbers, some of its answers to look at, and where it and
    the search fail.

    All are empty where no held-out document says in a line what it is, as a person's own do not: no question has a known answer there.
    """
    held_out = list(read_documents(artifacts / "raw" / params.index.documents, "validation"))
    if not any(document.description for document in held_out):
        return {"rag": {}, "retrieval": {}}, [], {}
    engine = Engine.open(artifacts / "models" / model)
    index = Index.open(artifacts / "index", Embedder.open(artifacts / "raw" / params.index.embedder))
    asked = questions(held_out, params.evaluate.questions, params.evaluate.choices, params.evaluate.seed)

    with progress.bar(total=len(asked) * len(CONDITIONS), desc="asking", unit=" questions") as bar:
        found = replies_by_condition(engine.model, engine.tokenizer, index, asked, params.evaluate, progress=bar.update)
    conditions = {name: graded(asked, replies, params.evaluate.seed, found["none"]) for name, replies in found.items()}
    greedy = Sampling(temperature=0.0, max_tokens=params.evaluate.answer_tokens)
    illustrated = [
        {
            "question": question.question,
            "wanted": question.answer,
            **asdict(answer(engine, index, question.question, params.evaluate.passages, greedy)),
        }
        for question in asked[:ILLUSTRATED]
    ]
    read = passages_for("retrieved", asked, index, params.evaluate, form_of(engine.tokenizer))
    cited = citations(asked, found["retrieved"], read, index.params.search.support)
    weak = {model: {"answers": answering(asked, found), "citations": cited}, "retriever": search_limits(index, asked)}
    return {"rag": conditions, "retrieval": retrieval_quality(index, asked)}, illustrated, weak


def look_at(params: Params, artifacts: Path, served: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the models of the section `cards`, and the served one, cannot do, lean to and know by heart, beside what is `known` of them."""
    read = material(list(read_documents(artifacts / "raw" / learned_from(params))), params.cards)
    models, found = dict.fromkeys([*params.cards.models, served]), {}
    with progress.bar(total=len(models) * len(read.held_out), desc="measuring limits", unit=" texts") as bar:
        for name in models:
            folder = artifacts / "models" / name
            model, words = load_bundle(folder), tokenizer.load(folder)
            assert isinstance(model, nn.Module)
            found[name] = {**known.get(name, {}), **limits(model, words, read, params.cards, params.evaluate.seed, bar.update)}
    return found


def learned_from(params: Params) -> str:
    """The corpus that base has read, and with it all that was made of base; what is searched may be another."""
    return params.tokenize[params.train["base"].tokens].corpus


def estimates(params: Params, stages: Mapping[str, Any], manifests: Mapping[str, bundle.Manifest]) -> dict[str, dict[str, float]]:
    """What each model took, with those that it was made from, and the index."""
    names = {manifest.digest: name for name, manifest in manifests.items()}
    parents = {name: [names[digest] for digest in made.parents.values() if digest in names] for name, made in manifests.items()}
    timed = {**stages["ladder"], **stages["finetune"], **stages["alignment"], "retriever": stages["index"]}
    own = {name: float(timed.get(name, {}).get("seconds", 0.0)) for name in [*manifests, "retriever"]}
    return {
        name: energy.estimate(own[name], sum(own[each] for each in energy.ancestry(name, parents)), params.cards.energy) for name in own
    }


def to_serve(params: Params, quantized: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The model to serve: a quantization that `serve.model` names, or the one of it that the rule picks, with what it thought of each."""
    original = params.serve.model
    if original in params.quantize:
        return {"model": original, "original": params.quantize[original].model, "candidates": []}
    choice = choose(original, {name: row for name, row in quantized.items() if row["model"] == original}, params.evaluate.serve_rule)
    return {"model": choice.name, "original": original, "candidates": [asdict(candidate) for candidate in choice.candidates]}


def measured(params: Params, logs: Path) -> dict[str, Any]:
    """What the stages before this one measured, under the keys of docs/metrics.md."""
    ladder, tuned = gather.measurements(logs, "train", params.train), gather.measurements(logs, "finetune", params.finetune)
    return {
        "data": gather.measurements(logs, "download", params.download.fetch),
        "tokenize": gather.measurements(logs, "tokenize", params.tokenize),
        "encoding": gather.encodings(logs / "tokenize", [params.train["base"].tokens]),
        "ladder": ladder,
        "quantize": gather.measurements(logs, "quantize", params.quantize),
        "finetune": {name: row for name, row in tuned.items() if row["method"] in ANSWERING},
        "alignment": {name: row for name, row in tuned.items() if row["method"] not in ANSWERING},
        "index": gather.single(logs, "index"),
    }


def draw(params: Params, artifacts: Path, folder: Path, metrics: Mapping[str, Any]) -> None:
    """The report's figures."""
    shakespeare = {rung: row for rung, row in metrics["ladder"].items() if rung != "base"}
    figures.ladder(folder, {rung: row["val_bpb"] for rung, row in shakespeare.items()}, honest="ngram")
    curves = {rung: gather.curve(artifacts / "logs" / "train" / rung / "curve.csv") for rung in params.train if rung != "ngram"}
    figures.loss_curves(folder, curves)
    figures.quantization(folder, metrics["quantize"])
    if metrics["rag"]:
        figures.question_answering(folder, metrics["rag"], chance=1 / params.evaluate.choices)
    draw_alignment(artifacts / "logs" / "finetune", folder, metrics["alignment"])
    encodings = artifacts / "logs" / "tokenize" / params.train["base"].tokens / "encoding.json"
    figures.encodings(folder, json.loads(encodings.read_text(encoding="utf-8")))
    figures.token_lengths(folder, {name: row["bytes_per_token"] for name, row in metrics["tokenize"].items()})
    for rung in HEATMAPS:
        maps, tokens = attention_of(Engine.open(artifacts / "models" / rung), params.evaluate.heatmap_text)
        figures.heatmaps(folder, rung, maps, tokens)


def draw_alignment(logs: Path, folder: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The reward model's calibration, and how the policies went: their curves, and gold reward against distance."""
    policies = {name: gather.curve(logs / name / "curve.csv") for name, row in rows.items() if row["method"] != "reward"}
    guides = [row for row in rows.values() if row["method"] == "reward"]
    figures.alignment(folder, policies)
    paths = {
        name: [
            (0.0, rows[name]["gold_before"]),
            *((row["kl"], row["gold"]) for row in curve if not isnan(row["gold"])),
            (rows[name]["kl"], rows[name]["gold"]),
        ]
        for name, curve in policies.items()
    }
    figures.frontier(folder, paths, [point for row in guides for point in row.get("best_of", [])])
    for row in guides:
        figures.calibration(folder, row["calibration"])


def samples(params: Params, logs: Path) -> dict[str, str]:
    """What each model wrote, as its stage left it."""
    found = {model: logs / stage / model / "sample.txt" for stage in ("train", "quantize") for model in getattr(params, stage)}
    texts = {model: path.read_text(encoding="utf-8") for model, path in found.items()}
    answers = {model: json.loads((logs / "finetune" / model / "answers.json").read_text(encoding="utf-8")) for model in params.finetune}
    return texts | answers


def compared_by(params: Params, served: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Each model that may become a version: its bundle, and the metric that decides whether a new one is better.

    What answers is judged by its answers, a policy by the gold judge, and what is quantized by the text, but for the one that is served.
    """
    rule = params.evaluate.promotion
    metrics: dict[str, str] = {"base": rule.metric} | dict.fromkeys(params.quantize, rule.metric)
    for name, entry in params.finetune.items():
        metrics[name] = rule.alignment_metric if entry.method in ALIGNING else rule.finetune_metric
    what_is_served = (served["model"], metrics.get(served["original"], rule.metric))
    return {name: (name, metric) for name, metric in metrics.items()} | {SERVED: what_is_served}


def examined(params: Params, artifacts: Path, served: Mapping[str, Any]) -> dict[str, Scores]:
    """What each held-out unit costs each candidate: a model texts of the corpus it learned from, the retriever questions of its own."""
    told = params.evaluate
    held_out = list(read_documents(artifacts / "raw" / learned_from(params), "validation"))
    exam = Exam.of(held_out, told.promotion.units, {}, told.answer_tokens, told.seed)
    found = {}
    for name, (model, metric) in progress.bar(compared_by(params, served).items(), desc="scoring for promotion", unit=" models"):
        entry = params.finetune.get(model)
        judging = bundle.read_manifest(artifacts / "models" / entry.guide).facts.get("judge", {}) if entry else {}
        judging = bundle.read_manifest(artifacts / "models" / model).facts.get("judge", judging)
        base = artifacts / "models" / entry.model if entry else None
        found[name] = scores_of(artifacts / "models" / model, metric, replace(exam, judge=judging), base)
    return found | {RETRIEVER: Scores("1 - mrr", searched(params, artifacts))}


def searched(params: Params, artifacts: Path) -> Mapping[str, tuple[float, float]]:
    """What each held-out question costs the retriever; none where no question has a known answer, see `ask`."""
    held_out = list(read_documents(artifacts / "raw" / params.index.documents, "validation"))
    if not any(document.description for document in held_out):
        return {}
    index = Index.open(artifacts / "index", Embedder.open(artifacts / "raw" / params.index.embedder))
    return search_units(index, questions(held_out, params.evaluate.questions, params.evaluate.choices, params.evaluate.seed))


def write_scores(folder: Path, scores: Mapping[str, Scores]) -> dict[str, str]:
    """One file a candidate, and the digest of each."""
    with bundle.writing(folder) as new:
        for name, found in scores.items():
            (new / f"{name}.json").write_text(found.to_json(), encoding="utf-8")
    return {name: bundle.file_digest(folder / f"{name}.json") for name in scores}


def verdict(
    params: Params, metrics: Mapping[str, Any], manifests: Mapping[str, bundle.Manifest], scores: Mapping[str, str]
) -> dict[str, Any]:
    """Which bundles may become versions, what each was worth, and the rule by which a champion moves; `pipelines promote` applies it."""
    rows = (
        metrics["ladder"]
        | metrics["finetune"]
        | metrics["alignment"]
        | metrics["quantize"]
        | {RETRIEVER: metrics["retrieval"].get("fused", {})}
    )
    models = {name: model for name, (model, _) in compared_by(params, metrics["served"]).items()} | {RETRIEVER: RETRIEVER}
    return {
        "served": metrics["served"]["model"],
        "rule": asdict(Rule.of(params.evaluate)),
        "candidates": [
            {
                "name": f"llm-from-scratch-{name}",
                "folder": "artifacts/index" if name == RETRIEVER else f"artifacts/models/{model}",
                "card": f"reports/cards/{model}.md",
                "digest": manifests[model].digest,
                "metrics": {key: value for key, value in rows[model].items() if isinstance(value, float)},
                "facts": {"kind": manifests[model].kind, "made_by": manifests[model].made_by, "asked": asked(params, model)},
                "beside": beside(params, model),
                "scores": {"file": f"artifacts/scores/{name}.json", "sha256": scores[name]},
            }
            for name, model in models.items()
        ],
    }


def asked(params: Params, model: str) -> str:
    """How a version is asked: a `query` is searched for, a text is put to the `judge`, a `chat` is answered, a `text` gone on with."""
    if model == RETRIEVER:
        return "query"
    origin = params.quantize[model].model if model in params.quantize else model
    method = params.finetune[origin].method if origin in params.finetune else ""
    return "judge" if method == "reward" else "chat" if method in ANSWERING else "text"


def beside(params: Params, model: str) -> dict[str, str]:
    """The bundles that a version cannot be opened without."""
    if model == RETRIEVER:
        return {"embedder": f"artifacts/raw/{params.index.embedder}"}
    if model in params.finetune and params.finetune[model].method in ADAPTERS:
        return {"base": f"artifacts/models/{params.finetune[model].model}"}
    return {}
