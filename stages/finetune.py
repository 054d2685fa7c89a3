"""A base model becomes one that answers: read, ask, train, ask again, write."""

from __future__ import annotations

import json
import random
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
from llm_from_scratch.evaluation.courses import PolicyCourse, RewardCourse, Standing
from llm_from_scratch.evaluation.generation import Task, examine, fitting, task_of, task_of_record
from llm_from_scratch.evaluation.speed import size_mb
from llm_from_scratch.finetune.qlora import unpacked
from llm_from_scratch.finetune.sft import Examples, Finetune, answer_loss, encode_records
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.quantize import load_bundle
from llm_from_scratch.model.registry import parameters
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.training.loop import fit, write_curve
from llm_from_scratch.training.resume import Journal, code_digest, run_folder

ANSWER_TOKENS = 32

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


class Answering:
    """The course of the methods that learn answers: records to learn, some held out for the loss, and questions that are asked."""

    columns: tuple[str, ...] = ()

    def __init__(self, corpus: Path, share: float, told: Finetune, base: Rung, words: Tokenizer) -> None:
        self.told, self.words = told, words
        self.tasks, self.held_out, self.lesson = prepare(corpus, share, told, base, words)
        self.facts = {"records": len(self.lesson.pairs)}
        self.effort = {"questions": len(self.tasks), "records_cut": self.lesson.cut, "records_skipped": self.lesson.skipped}

    def measure(self, model: nn.Module) -> Standing:
        """Nats per answer token on what was held out, and the answers to what is asked."""
        exam = examine(Engine(model, self.words), self.tasks, ANSWER_TOKENS, partial(progress.bar, desc="ask"))
        loss = answer_loss(model, self.held_out, self.told.batch)
        return Standing({"val_loss": loss, "exact_match": exam.exact_match, "f1": exam.f1}, exam.answers)

    def glance(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": answer_loss(model, self.held_out, self.told.batch)}

    def extras(self, model: nn.Module) -> dict[str, Any]:
        return {}

    def show(self, before: Standing, after: Standing) -> list[dict[str, Any]]:
        """Some questions, what was answered to them before and after, and what was wanted."""
        rows = zip(self.tasks[: self.told.samples], before.answers, after.answers, strict=False)
        return [{"prompt": task.messages[-1]["content"], "before": old, "after": new, "wanted": task.wanted} for task, old, new in rows]


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
    course = enrol(told, root / records_at, root / guide_at, base, words, params.sources[told.records].validation)
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


def enrol(told: Any, corpus: Path, guide: Path, base: Rung, words: Tokenizer, share: float) -> Answering | RewardCourse | PolicyCourse:
    """What a method is taught with and measured by."""
    bars = partial(progress.bar, desc="answer", unit=" batches")
    if told.method == "reward":
        return RewardCourse(corpus, told, base, words, share, bars)
    if told.method in ("dpo", "ppo", "grpo"):
        return PolicyCourse(corpus, guide, told, base, words, share, bars)
    return Answering(corpus, share, told, base, words)


def open_base(folder: Path, name: str, context: int) -> Rung:
    """The model to start from. Raises ValueError where it cannot see as far as a batch is long."""
    base = load_bundle(folder)
    assert isinstance(base, Rung), "a bundle of kind 'model' holds a neural rung"
    if context > base.context:
        raise ValueError(f"finetune.{name}.context is {context}, but {folder.name} sees {base.context} tokens; lower it")
    return base


def prepare(corpus: Path, share: float, told: Finetune, base: Rung, words: Tokenizer) -> tuple[list[Task], Examples, Examples]:
    """(to ask, held out, to learn): as many records as the steps can show, `told.questions` of those held out, and as many asked."""
    learnable, held_out, tasks = conversations(corpus, share, told.seed)
    if not held_out:
        raise ValueError(f"no record of {told.records} is held out to measure on; raise sources.{told.records}.validation, now {share}")
    rng = random.Random(told.seed)
    shown = rng.sample(learnable, min(told.steps * told.batch, len(learnable)))
    tested = rng.sample(held_out, min(told.questions, len(held_out)))
    asked = fitting(tasks, Engine(base, words), ANSWER_TOKENS)[: told.questions]
    return asked, encode_records(tested, words, told.context), encode_records(shown, words, told.context)


def conversations(corpus: Path, share: float, seed: int) -> tuple[list[ChatRecord], list[ChatRecord], list[Task]]:
    """(to learn, held out, to ask): made from a corpus' documents, or, where it holds only files, the chat records in them as they are."""
    if (corpus / DOCUMENTS).exists():
        train, held_out = (list(read_documents(corpus, split)) for split in ("train", "validation"))
        asked = questions(held_out, len(held_out), choices=1, seed=seed)
        return records(train, seed), records(held_out, seed), [task_of(question, with_passage=True) for question in asked]
    found = [record for path in sorted(corpus.rglob("*.jsonl")) for record in read_records(path)]
    learnable, tested = split_records(found, share)
    return learnable, tested, [task_of_record(record) for record in tested]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _code() -> list[Path]:
    """Whatever decides the weights beside params, base and records: the same sources resume, others start anew."""
    packages = [Path(package.__path__[0]) for package in (data, finetune, model, tokenizer, training)]
    return [Path(__file__), *(path for package in packages for path in package.glob("*.py"))]
