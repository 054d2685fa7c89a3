"""A base model becomes one that answers: read, ask, train, ask again, write."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch import bundle, data, evaluation, finetune, inference, model, progress, tokenizer, tracking, training
from llm_from_scratch.config import Params
from llm_from_scratch.evaluation.courses import enrol
from llm_from_scratch.evaluation.speed import size_mb
from llm_from_scratch.finetune.qlora import unpacked
from llm_from_scratch.inference.quantize import load_bundle
from llm_from_scratch.model.registry import parameters
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.training.loop import fit, write_curve
from llm_from_scratch.training.resume import Journal, code_digest, run_folder

ABOUT = """\
# {name}

"""
ENDING = """

What it was made from is in `manifest.json`.
"""
ANSWERS = """The model `{base}`, fine-tuned by `{method}` on {records:,} records made from `{corpus}`; {trained_parameters:,} of
{total_parameters:,} parameters were trained. It is small, and what it says is not to be relied on.

Load it with """
CARDS = {
    "model": ABOUT + ANSWERS + "`llm_from_scratch.inference.engine.Engine.open(folder)` or `transformers.AutoModelForCausalLM`." + ENDING,
    "adapter": ABOUT + ANSWERS + "`peft.PeftModel.from_pretrained(base, folder)`, where `base` is what it was made from." + ENDING,
    "reward": ABOUT
    + """The model `{base}` with one number for a head, taught on {records:,} pairs of answers which is the better one. The pairs are in
`pairs.jsonl`. It judges what is like them, and of anything else it says something too.

Load it with `llm_from_scratch.finetune.reward.load_reward(folder)` or `transformers.AutoModelForSequenceClassification`."""
    + ENDING,
}


def run(params: Params, name: str, root: Path) -> None:
    """A killed run goes on where it was: its state is kept in runs/ until its bundle and its logs stand."""
    told = params.finetune[name]
    base_at, records_at, guide_at = f"artifacts/models/{told.model}", f"artifacts/raw/{told.records}", f"artifacts/models/{told.guide}"
    parents = {
        "base": bundle.verify(root / base_at, "model", "quantized").digest,
        "records": bundle.verify(root / records_at, "corpus").digest,
    }
    if told.guide != told.model:
        parents["guide"] = bundle.verify(root / guide_at, "reward").digest
    words, base = tokenizer.load(root / base_at), open_base(root / base_at, name, told.context)
    share, bars = params.sources[told.records].validation, partial(progress.bar, desc="answer")
    course = enrol(told, root / records_at, root / guide_at, base, words, share, bars)
    journal = Journal(run_folder(root / "runs", told.model_dump(), *parents.values(), code_digest(_code()), torch.__version__))

    with tracking.stage_run("finetune", name, told.model_dump(), [base_at, records_at]) as log:
        start = unpacked(base) if told.method == "qlora" else base  # says the same, sooner, and can be counted
        total, before = parameters(start), course.measure(start)
        job = finetune.METHODS[told.method](base, course.lesson, told)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        fitted = fit(job.model, job.batches, job.loss, told, log, journal, course.glance, device, progress=True)
        job.model.cpu()
        learned = job.plain()
        after, extras = course.measure(learned), course.extras(learned)
        log(told.steps, {key: value for key, value in after.metrics.items() if isinstance(value, float)})

    trained = sum(weight.numel() for weight in job.model.parameters() if weight.requires_grad)
    facts = {**course.facts, "trained_parameters": trained, "total_parameters": total}
    folder = root / "artifacts/models" / name
    with bundle.writing(folder) as new:
        job.save(new, base_at)
        words.save(new)
        card = CARDS[job.kind].format(name=name, base=told.model, method=told.method, corpus=told.records, **facts)
        (new / "README.md").write_text(card, encoding="utf-8")
        bundle.seal(new, job.kind, f"finetune@{name}", parents, tokenizer_digest=tokenizer.digest(new), method=told.method, **facts)

    with bundle.writing(root / "artifacts/logs/finetune" / name) as new:
        was = {f"{key}_before": value for key, value in before.metrics.items()}
        sizes = {"share": trained / total, "size_mb": round(size_mb(folder), 3)}
        measured = {**was, **after.metrics, **extras, **course.effort, **fitted.metrics()}
        _write_json(new / "metrics.json", {"method": told.method, **facts, **sizes, **measured})
        _write_json(new / "answers.json", course.show(before, after))
        write_curve(new / "curve.csv", fitted.curve, course.columns)
    journal.remove()


def open_base(folder: Path, name: str, context: int) -> Rung:
    """The model to start from. Raises ValueError where it cannot see as far as a batch is long."""
    base = load_bundle(folder)
    assert isinstance(base, Rung), "a bundle of kind 'model' holds a neural rung"
    if context > base.context:
        raise ValueError(f"finetune.{name}.context is {context}, but {folder.name} sees {base.context} tokens; lower it")
    return base


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _code() -> list[Path]:
    """Whatever decides the weights beside params, base and records: the same sources resume, others start anew.

    What is learned is put together in `evaluation.courses`, and rollouts are drawn in `inference`.
    """
    packages = [Path(package.__path__[0]) for package in (data, evaluation, finetune, inference, model, tokenizer, training)]
    return [Path(__file__), *(path for package in packages for path in package.glob("*.py"))]
