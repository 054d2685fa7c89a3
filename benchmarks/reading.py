"""What teaches a small model to read? The recipe of `base` for more and less time, and without one ingredient at half of its time.

python -m benchmarks.reading --project FOLDER   (where make repro has run; --variants names fewer, --keep goes on after a break)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import table
from llm_from_scratch import bundle, config, tokenizer
from llm_from_scratch.data.chat import PASSAGE_CHARACTERS, ChatRecord, records
from llm_from_scratch.data.documents import Document, read_documents
from llm_from_scratch.data.lessons import lessons
from llm_from_scratch.data.questions import Question, questions
from llm_from_scratch.data.shards import Shards, open_shards
from llm_from_scratch.evaluation import EvaluateParams
from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.evaluation.retrieval import question_answering
from llm_from_scratch.model import registry
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.report import figures
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.tokenizer.chat import render
from llm_from_scratch.training.batches import Batches, conversations, in_turn, shifted, windows
from llm_from_scratch.training.loop import fit, next_token
from llm_from_scratch.training.plan import LessonParams, TrainParams
from stages.__main__ import read_yaml

Lessons = Callable[[Sequence[Document]], list[ChatRecord]]
CONDITIONS = ("none", "oracle")
CURVE = {"recipe": 1.0, "half the time": 0.5, "a quarter": 0.25, "an eighth": 0.125}
NOTES = [
    "All rows are the base model before any fine-tuning, asked evaluate's held-out questions; one seed, so a few points mean little.",
    "The first rows are the curve over time, each a whole training with a cooldown of its own; the picture (reading.png) draws them. "
    "The others have half the time too, and stand beside that row: the recipe without one ingredient. `seconds` are of one core while "
    "the other one was at work on something else; steps are the better clock.",
    "`by what it changes` chooses by how much the passage raised each choice's likelihood (pointwise mutual information), so that what was "
    "likely anyway does not count. `bits per byte` is of the held-out text: what the lessons cost the model as a writer.",
]

ABOUT = {
    "no copying start": "attention begins with random values and no output, as usual",
    "descriptions alone": "lessons ask nothing but what the entry is, and have no sentences to go on with and no words to name",
    "no strangers": "lessons with a second passage are left out",
    "loss on all of it": "passages and questions are learned to be written, too",
    "lessons not first": "as many lessons are spread evenly over the steps",
    "passages of 400 characters": f"in place of {PASSAGE_CHARACTERS}",
    "text alone": "no lessons",
}


@dataclass(frozen=True)
class Recipe:
    """How `base` is trained, from which lessons, and whether what is said in them counts alone."""

    rung: TrainParams
    lessons: Lessons
    answers_alone: bool = True

    def told(self, **changes: Any) -> Recipe:
        assert self.rung.lessons is not None
        return replace(self, rung=self.rung.model_copy(update={"lessons": self.rung.lessons.model_copy(update=changes)}))

    def with_model(self, **changes: Any) -> Recipe:
        return replace(self, rung=self.rung.model_copy(update={"model": self.rung.model.model_copy(update=changes)}))

    def shorter(self, share: float) -> Recipe:
        """As many of all its steps."""
        assert self.rung.lessons is not None
        made = self.told(first=round(self.rung.lessons.first * share))
        return replace(made, rung=made.rung.model_copy(update={"steps": round(self.rung.steps * share)}))


def exercises(documents: Sequence[Document], characters: int = PASSAGE_CHARACTERS) -> list[ChatRecord]:
    return lessons(documents, 1, characters)


def descriptions(documents: Sequence[Document]) -> list[ChatRecord]:
    """What fine-tuning has: a passage, and the one question what its entry is."""
    return [record for record in records(documents, 1) if record["kind"] == "read"]


def familiar(documents: Sequence[Document]) -> list[ChatRecord]:
    """Those lessons whose passage stands alone."""
    return [record for record in exercises(documents) if "\n\n" not in record["messages"][0]["content"]]


def variants(whole: Recipe) -> dict[str, Recipe]:
    """What the rows are, in their order."""
    ours = whole.shorter(CURVE["half the time"])
    taught = ours.rung.lessons
    assert isinstance(ours.rung.model, LlamaParams)
    assert taught is not None
    steps = taught.first + (ours.rung.steps - taught.first) * taught.share
    return {
        **{name: whole.shorter(share) for name, share in CURVE.items()},
        "no copying start": ours.with_model(copying=0.0),
        "descriptions alone": replace(ours, lessons=descriptions),
        "no strangers": replace(ours, lessons=familiar),
        "loss on all of it": replace(ours, answers_alone=False),
        "lessons not first": ours.told(first=0, share=steps / ours.rung.steps),
        "passages of 400 characters": replace(ours, lessons=partial(exercises, characters=400)),
        "text alone": ours.told(first=0, share=0.0),
    }


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--project", type=Path, required=True, metavar="FOLDER", help="where make repro has run")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="JSON of the rows that are done; those in it are not made again")
    arguments = parser.parse_args()
    params = config.parse(read_yaml(arguments.project / "params.yaml"), "params.yaml")
    rung = params.train["base"]
    assert isinstance(rung, TrainParams)
    if rung.lessons is None:
        parser.error("train.base of this project takes no lessons; give one whose params.yaml has them")
    if arguments.quick:
        few = LessonParams(first=2, share=0.5, batch=2)
        rung = rung.model_copy(update={"steps": 8, "batch": 2, "warmup_steps": 0, "lessons": few, "evaluate_tokens": 2000})
    evaluate = params.evaluate.model_copy(update={"questions": 8, "answer_tokens": 2}) if arguments.quick else params.evaluate

    tokens, corpus = arguments.project / "artifacts/tokens" / rung.tokens, arguments.project / "artifacts/raw" / params.index.documents
    bundle.verify(tokens, "tokens")
    shards, words = open_shards(tokens), tokenizer.load(tokens)
    train, held_out = (list(read_documents(corpus, split)) for split in ("train", "validation"))
    asked = questions(held_out, evaluate.questions, evaluate.choices, evaluate.seed)
    kept: dict[str, Any] = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.exists() else {}
    wanted = variants(Recipe(rung, exercises))
    for name, recipe in wanted.items():
        if name in kept or (arguments.variants and name not in arguments.variants):
            continue
        kept[name] = {"variant": name, **measured(recipe, shards, train, words, asked, evaluate)}
        if arguments.keep:
            arguments.keep.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    rows = [kept[name] for name in wanted if name in kept]
    table.write(
        arguments.out,
        "reading",
        "Reading: choosing the right of four descriptions without and with the passage, one ingredient taken out at a time",
        rows,
        {"questions": len(asked), "seed": rung.seed, "recipe": rung.model_dump(include={"steps", "batch", "context", "lessons", "model"})},
        [*NOTES, *(f"`{name}`: {about}{'' if name in kept else '. Not run here'}." for name, about in ABOUT.items())],
    )
    figures.reading(arguments.out, [row for row in rows if row["variant"] in CURVE], chance=1 / evaluate.choices)


def measured(
    recipe: Recipe, shards: Shards, documents: Sequence[Document], words: Tokenizer, asked: Sequence[Question], evaluate: EvaluateParams
) -> dict[str, float]:
    """One row: a model trained by the recipe, its text and its answers."""
    rung = recipe.rung
    torch.manual_seed(rung.seed)
    model = registry.build(rung.model, words.vocab_size)
    plan = rung.model_copy(update={"evaluate_every": rung.steps, "checkpoint_every": rung.steps})
    fitted = fit(model, batches(recipe, shards, documents, words), next_token, plan, progress=True)
    text = score(model, shards.val[: rung.evaluate_tokens or None], words.token_bytes(), rung.context, rung.batch)
    found = question_answering(model, words, None, asked, evaluate, CONDITIONS)
    none, oracle = found["none"], found["oracle"]
    return {
        "steps": rung.steps,
        "seconds": round(fitted.seconds, 1),
        "none": none["accuracy"],
        "with the passage": oracle["accuracy"],
        "lift": oracle["accuracy"] - none["accuracy"],
        "by what it changes": oracle["accuracy_pmi"],
        "F1": oracle["f1"],
        "bits per byte": text.val_bpb,
    }


def batches(recipe: Recipe, shards: Shards, documents: Sequence[Document], words: Tokenizer) -> Batches:
    """As stages/train.py makes them."""
    rung, taught = recipe.rung, recipe.rung.lessons
    text = windows(shards.train, rung.context, rung.batch, rung.seed)
    if taught is None or not taught.some:
        return text
    rendered = (render(record["messages"], words, prompt=False) for record in recipe.lessons(documents))
    pairs = [
        shifted(torch.tensor(ids), torch.tensor(learned) | (not recipe.answers_alone))
        for ids, learned in rendered
        if len(ids) <= rung.context + 1
    ]
    return in_turn(text, conversations(pairs, taught.batch, words.eot, rung.seed), taught.first, taught.share)


if __name__ == "__main__":
    main()
