"""A base model becomes one that answers: read, ask, train, ask again, write."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_from_scratch import bundle, data, finetune, model, progress, tokenizer, tracking, training
from llm_from_scratch.config import Params
from llm_from_scratch.data.chat import ChatRecord, read_records, records, split_records
from llm_from_scratch.data.documents import DOCUMENTS, read_documents
from llm_from_scratch.data.questions import questions
from llm_from_scratch.evaluation.generation import Exam, Task, examine, fitting, task_of, task_of_record
from llm_from_scratch.evaluation.speed import size_mb
from llm_from_scratch.finetune.sft import Examples, Finetune, answer_loss, encode_records
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.model.registry import load_model, parameters
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.training.loop import Fitted, fit, write_curve
from llm_from_scratch.training.resume import Journal, code_digest, run_folder

ANSWER_TOKENS = 32

CARD = """\
# {name}

The model `{base}`, fine-tuned by `{method}` on {records:,} conversations made from `{corpus}`; {trained_parameters:,} of
{total_parameters:,} parameters were trained. It answers in a few words, from the passages put before a question if there are any.
It is small, and what it says is not to be relied on.

Load it with {how}. What it was made from is in `manifest.json`.
"""
HOW = {
    "model": "`llm_from_scratch.inference.engine.Engine.open(folder)` or `transformers.AutoModelForCausalLM.from_pretrained(folder)`",
    "adapter": "`peft.PeftModel.from_pretrained(base, folder)`, where `base` is the model that it was made from",
}


@dataclass(frozen=True)
class Lesson:
    """What is learned, what is held out to measure the loss on, and what is asked."""

    train: Examples
    held_out: Examples
    tasks: list[Task]


@dataclass(frozen=True)
class Standing:
    """What a model knows of what was held out: nats per answer token, and its answers."""

    val_loss: float
    exam: Exam

    def metrics(self) -> dict[str, float]:
        return {"val_loss": self.val_loss, "exact_match": self.exam.exact_match, "f1": self.exam.f1}


def run(params: Params, name: str, root: Path) -> None:
    """A killed run goes on where it was: its state is kept in runs/ until its bundle and its logs stand."""
    told = params.finetune[name]
    base_at, records_at = f"artifacts/models/{told.model}", f"artifacts/raw/{told.records}"
    parents = {"base": bundle.verify(root / base_at, "model").digest, "records": bundle.verify(root / records_at, "corpus").digest}
    words, base = tokenizer.load(root / base_at), open_base(root / base_at, name, told.context)
    lesson = prepare(root / records_at, params.sources[told.records].validation, told, base, words)
    journal = Journal(run_folder(root / "runs", told.model_dump(), *parents.values(), code_digest(_code()), torch.__version__))

    with tracking.stage_run("finetune", name, told.model_dump(), [base_at, records_at]) as log:
        total, before = parameters(base), measure(base, words, lesson, told)
        job = finetune.METHODS[told.method](base, lesson.train, told)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        fitted = fit(job.model, job.batches, job.loss, told, log, journal, partial(glance, lesson, told), device, progress=True)
        job.model.cpu()
        after = measure(job.plain(), words, lesson, told)
        log(told.steps, after.metrics())

    trained = sum(weight.numel() for weight in job.model.parameters() if weight.requires_grad)
    facts = {"records": len(lesson.train.pairs), "trained_parameters": trained, "total_parameters": total}
    folder = root / "artifacts/models" / name
    with bundle.writing(folder) as new:
        job.save(new, base_at)
        words.save(new)
        card = CARD.format(name=name, base=told.model, method=told.method, corpus=told.records, how=HOW[job.kind], **facts)
        (new / "README.md").write_text(card, encoding="utf-8")
        bundle.seal(new, job.kind, f"finetune@{name}", parents, tokenizer_digest=tokenizer.digest(new), method=told.method, **facts)

    with bundle.writing(root / "artifacts/logs/finetune" / name) as new:
        was = {f"{key}_before": value for key, value in before.metrics().items()}
        sizes = {"share": trained / total, "size_mb": round(size_mb(folder), 3)}
        _write_json(new / "metrics.json", {"method": told.method, **facts, **sizes, **was, **after.metrics(), **effort(lesson, fitted)})
        _write_json(new / "answers.json", side_by_side(lesson.tasks[: told.samples], before.exam.answers, after.exam.answers))
        write_curve(new / "curve.csv", fitted.curve)
    journal.remove()


def open_base(folder: Path, name: str, context: int) -> Rung:
    """The model to start from. Raises ValueError where it cannot see as far as a batch is long."""
    base = load_model(folder)
    assert isinstance(base, Rung), "a bundle of kind 'model' holds a neural rung"
    if context > base.context:
        raise ValueError(f"finetune.{name}.context is {context}, but {folder.name} sees {base.context} tokens; lower it")
    return base


def prepare(corpus: Path, share: float, told: Finetune, base: Rung, words: Tokenizer) -> Lesson:
    """The lesson that a corpus gives: as many records as the steps can show, `told.questions` of those held out, and as many asked."""
    learnable, held_out, tasks = conversations(corpus, share, told.seed)
    if not held_out:
        raise ValueError(f"no record of {told.records} is held out to measure on; raise sources.{told.records}.validation, now {share}")
    rng = random.Random(told.seed)
    shown = rng.sample(learnable, min(told.steps * told.batch, len(learnable)))
    tested = rng.sample(held_out, min(told.questions, len(held_out)))
    asked = fitting(tasks, Engine(base, words), ANSWER_TOKENS)[: told.questions]
    return Lesson(encode_records(shown, words, told.context), encode_records(tested, words, told.context), asked)


def conversations(corpus: Path, share: float, seed: int) -> tuple[list[ChatRecord], list[ChatRecord], list[Task]]:
    """(to learn, held out, to ask): made from a corpus' documents, or, where it holds only files, the chat records in them as they are."""
    if (corpus / DOCUMENTS).exists():
        train, held_out = (list(read_documents(corpus, split)) for split in ("train", "validation"))
        asked = questions(held_out, len(held_out), choices=1, seed=seed)
        return records(train, seed), records(held_out, seed), [task_of(question, with_passage=True) for question in asked]
    found = [record for path in sorted(corpus.rglob("*.jsonl")) for record in read_records(path)]
    learnable, tested = split_records(found, share)
    return learnable, tested, [task_of_record(record) for record in tested]


def measure(asked: Rung, words: Tokenizer, lesson: Lesson, told: Finetune) -> Standing:
    """Where the model stands on what was held out."""
    exam = examine(Engine(asked, words), lesson.tasks, ANSWER_TOKENS, partial(progress.bar, desc="ask"))
    return Standing(answer_loss(asked, lesson.held_out, told.batch), exam)


def glance(lesson: Lesson, told: Finetune, trained: nn.Module) -> dict[str, float]:
    """A point of the curve."""
    return {"val_loss": answer_loss(trained, lesson.held_out, told.batch)}


def effort(lesson: Lesson, fitted: Fitted) -> dict[str, float]:
    """What was asked, what of the records was used, and what training took, padding counted."""
    return {
        "questions": len(lesson.tasks),
        "records_cut": lesson.train.cut,
        "records_skipped": lesson.train.skipped,
        **fitted.metrics(),
    }


def side_by_side(tasks: Sequence[Task], before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
    """Some questions, what was answered to them before and after, and what was wanted."""
    rows = zip(tasks, before, after, strict=False)
    return [{"prompt": task.messages[-1]["content"], "before": old, "after": new, "wanted": task.wanted} for task, old, new in rows]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _code() -> list[Path]:
    """Whatever decides the weights beside params, base and records: the same sources resume, others start anew."""
    packages = [Path(package.__path__[0]) for package in (data, finetune, model, tokenizer, training)]
    return [Path(__file__), *(path for package in packages for path in package.glob("*.py"))]
