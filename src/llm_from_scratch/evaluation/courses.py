"""What a method is taught with and measured by: from a corpus to what is learned, and from a model to its numbers.

`AnswerCourse` is for those that learn answers of people, `RewardCourse` for the reward model, `PolicyCourse` for whoever is trained by one.
What is learned comes from the training side of the corpus, what is measured on from the side that is held out, so nothing that is
measured was practised.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter
from torch import nn

from llm_from_scratch import bundle
from llm_from_scratch.data.documents import DOCUMENTS, read_documents
from llm_from_scratch.data.preferences import Preference, read_preferences
from llm_from_scratch.evaluation import generation
from llm_from_scratch.evaluation.alignment import Exam, best_of, examine, glance
from llm_from_scratch.evaluation.generation import fitting
from llm_from_scratch.evaluation.splits import SPLITS, answerable, conversations, ids_of, prompts_of, split_preferences
from llm_from_scratch.finetune.dpo import DpoParams
from llm_from_scratch.finetune.grpo import GrpoParams
from llm_from_scratch.finetune.judge import Judge, JudgeParams, judge
from llm_from_scratch.finetune.pairs import Pair, PairLesson, encode_pairs, judged
from llm_from_scratch.finetune.ppo import ActorCritic, PpoParams
from llm_from_scratch.finetune.reward import PAIRS, RewardModel, RewardParams, accuracy, bradley_terry, calibration, load_reward, margins
from llm_from_scratch.finetune.rollouts import PromptLesson
from llm_from_scratch.finetune.sft import Examples, Finetune, answer_loss, encode_records
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.tokenizer.base import Tokenizer

BINS = 10
BEST_OF = 16
GLANCED = 128  # prompts behind a point of a curve
TEXT = 20_000  # tokens of held-out text for the perplexity
ANSWER_TOKENS = 32

Following = DpoParams | PpoParams | GrpoParams
"""The methods that follow a reward model, or its pairs."""

Bars = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps what is gone through, as tqdm does."""


@dataclass(frozen=True)
class Measured:
    """A model's numbers, and what it wrote."""

    metrics: dict[str, Any]
    answers: list[str]


class Course(Protocol):
    """What the stage asks of every method's: something to learn, and what to say of a model before, while and after it learns.

    `facts` go into the manifest, with the number of `records`; `effort` is counted beside them, and `columns` are what a glance adds to
    the curve.
    """

    columns: tuple[str, ...]
    facts: dict[str, Any]
    effort: dict[str, Any]

    @property
    def lesson(self) -> Examples | PairLesson | PromptLesson: ...

    def measure(self, model: nn.Module) -> Measured:
        """All that is held against each other before and after."""

    def glance(self, model: nn.Module) -> dict[str, float]:
        """A point of the curve: some of it, soon."""

    def extras(self, model: nn.Module) -> dict[str, Any]:
        """What is measured of the trained model alone."""

    def show(self, before: Measured, after: Measured) -> list[dict[str, Any]]:
        """`samples` of what it was asked, with what it said before and after."""


class AnswerCourse:
    """Records to learn, some held out for the loss, and questions that are asked."""

    columns: tuple[str, ...] = ()

    def __init__(self, corpus: Path, told: Finetune, base: Rung, words: Tokenizer, share: float, bars: Bars) -> None:
        self.told, self.words, self.bars = told, words, bars
        learnable, held_out, tasks = conversations(corpus, share, told.seed)
        if not held_out:
            raise ValueError(f"no record of {told.records} is held out to measure on; raise sources.{told.records}.validation, now {share}")
        rng = random.Random(told.seed)
        shown = rng.sample(learnable, min(told.steps * told.batch, len(learnable)))
        tested = rng.sample(held_out, min(told.questions, len(held_out)))
        self.tasks = fitting(tasks, Engine(base, words), ANSWER_TOKENS)[: told.questions]
        self.held_out, self.lesson = encode_records(tested, words, told.context), encode_records(shown, words, told.context)
        self.facts: dict[str, Any] = {"records": len(self.lesson.pairs)}
        skipped = {"records_cut": self.lesson.cut, "records_skipped": self.lesson.skipped}
        self.effort: dict[str, Any] = {"questions": len(self.tasks), **skipped}

    def measure(self, model: nn.Module) -> Measured:
        """Nats per answer token on what was held out, and the answers to what is asked."""
        exam = generation.examine(Engine(model, self.words), self.tasks, ANSWER_TOKENS, self.bars)
        return Measured({**self.glance(model), "exact_match": exam.exact_match, "f1": exam.f1}, exam.answers)

    def glance(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": answer_loss(model, self.held_out, self.told.batch)}

    def extras(self, model: nn.Module) -> dict[str, Any]:
        return {}

    def show(self, before: Measured, after: Measured) -> list[dict[str, Any]]:
        """Some questions, what was answered to them before and after, and what was wanted."""
        rows = zip(self.tasks[: self.told.samples], before.answers, after.answers, strict=False)
        return [{"prompt": task.messages[-1]["content"], "before": old, "after": new, "wanted": task.wanted} for task, old, new in rows]


class RewardCourse:
    """Pairs: where the corpus holds preference files, those; where it holds documents, `base` goes on with them and is judged."""

    columns: tuple[str, ...] = ("accuracy",)

    def __init__(self, corpus: Path, told: RewardParams, base: Rung, words: Tokenizer, share: float, bars: Bars) -> None:
        self.bars = bars
        self.told, self.words, self.base = told, words, copy.deepcopy(base)
        self.prompts: list[list[int]] = []
        self.judge = judge(told.judge)
        learned, tested = self._preferences(corpus, share)
        pairs, skipped = encode_pairs(learned, words, told.context)
        self.held_out, _ = encode_pairs(tested, words, told.context)
        self.lesson = PairLesson(learned, pairs, np.empty(0), words.eot, words.end_of_turn)
        self.facts = {"records": len(pairs), "judge": told.judge.model_dump()}
        self.effort = {"pairs_held_out": len(self.held_out), "records_skipped": skipped}

    def measure(self, model: nn.Module) -> Measured:
        """Held-out pairs told right, and how sure it was; the loss of a model without a head is that of a coin."""
        gaps = margins(model, self.held_out, self.words.eot, self.told.batch) if isinstance(model, RewardModel) else None
        if gaps is None:
            return Measured({"val_loss": float(np.log(2)), "accuracy": 0.5}, [])
        found = {"val_loss": float(bradley_terry(gaps, gaps * 0)), "accuracy": accuracy(gaps)}
        return Measured(found, [f"{gap:+.2f}" for gap in gaps[: self.told.samples].tolist()])

    def glance(self, model: nn.Module) -> dict[str, float]:
        found = self.measure(model).metrics
        return {"val_loss": found["val_loss"], "accuracy": found["accuracy"]}

    def extras(self, model: nn.Module) -> dict[str, Any]:
        """The calibration, and, where prompts are to be had, what choosing the best of n by this model brings."""
        assert isinstance(model, RewardModel)
        found: dict[str, Any] = {"calibration": calibration(margins(model, self.held_out, self.words.eot, self.told.batch), BINS)}
        if self.prompts:
            exam = Exam(self.prompts, self.told.answer_tokens, self.words, self.judge, self.base, model, np.empty(0), self.told.seed)
            found["best_of"] = best_of(exam, BEST_OF, self.bars)
        return found

    def show(self, before: Measured, after: Measured) -> list[dict[str, Any]]:
        """Some held-out pairs, and by how much the model prefers the one that the judge does."""
        rows = zip(self.held_out, after.answers, strict=False)
        return [{**_texts(pair, self.words), "margin": margin} for pair, margin in rows]

    def _preferences(self, corpus: Path, share: float) -> tuple[list[Preference], list[Preference]]:
        """(to learn, held out)."""
        told = self.told
        if not (corpus / DOCUMENTS).exists():
            return split_preferences(corpus, share)
        asked, self.prompts = prompts_of(corpus, self.words, told.prompt_tokens, told.seed, told.prompts, told.questions)
        sides = [
            judged(self.base, prompts, told.answer_tokens, told.answers_each, self.words, self.judge, told.seed + side, self.bars)
            for side, prompts in enumerate((asked, self.prompts))
        ]
        return sides[0], sides[1]


class PolicyCourse:
    """Prompts and a reward model, or that model's pairs; and the gold judge, who is asked only to measure."""

    columns: tuple[str, ...] = ("gold", "learned", "kl")

    def __init__(self, corpus: Path, guide: Path, told: Following, base: Rung, words: Tokenizer, share: float, bars: Bars) -> None:
        self.told, self.words, self.bars = told, words, bars
        manifest = bundle.verify(guide, "reward")
        gold: Judge = judge(TypeAdapter(JudgeParams).validate_python(manifest.facts["judge"]))
        if (corpus / DOCUMENTS).exists():
            asked, tested = prompts_of(corpus, words, told.prompt_tokens, told.seed, None, told.questions)
            sides_of_text = [[document.text for document in read_documents(corpus, split)] for split in SPLITS]
        else:
            sides = split_preferences(corpus, share)
            asked, tested = (answerable(side, words, told.context - told.answer_tokens) for side in sides)
            tested, sides_of_text = tested[: told.questions], [[one.chosen for one in side] for side in sides]
        practice, text = (ids_of(texts, words) for texts in sides_of_text)
        text = text[:TEXT]
        self.exam = Exam(tested, told.answer_tokens, words, gold, copy.deepcopy(base), load_reward(guide), text, told.seed)
        self.few = replace(self.exam, prompts=tested[:GLANCED])
        ends = frozenset(words.special.values())
        self.lesson: PairLesson | PromptLesson
        if isinstance(told, DpoParams):
            preferences = read_preferences(guide / PAIRS)
            pairs, _ = encode_pairs(preferences, words, told.context)
            self.lesson = PairLesson(preferences, pairs, practice, words.eot, words.end_of_turn)
            self.facts = {"records": len(pairs)}
        else:
            self.lesson = PromptLesson(asked, practice, load_reward(guide), ends, words.eot, words.end_of_turn)
            self.facts = {"records": len(asked)}
        self.effort: dict[str, Any] = {}

    def measure(self, model: nn.Module) -> Measured:
        found = examine(model, self.exam, self.bars)
        return Measured(found.metrics(), found.answers)

    def glance(self, model: nn.Module) -> dict[str, float]:
        return glance(model.policy if isinstance(model, ActorCritic) else model, self.few)

    def extras(self, model: nn.Module) -> dict[str, Any]:
        return {}

    def show(self, before: Measured, after: Measured) -> list[dict[str, Any]]:
        """Some held-out prompts, and how they were gone on with before and after, with what the gold judge says of it."""
        rows = zip(self.exam.prompts, before.answers, after.answers, strict=True)
        return [
            {
                "prompt": self.words.decode(prompt),
                "before": old,
                "after": new,
                "gold_before": self.exam.judge(old),
                "gold": self.exam.judge(new),
            }
            for prompt, old, new in list(rows)[: self.told.samples]
        ]


def enrol(told: Any, corpus: Path, guide: Path, base: Rung, words: Tokenizer, share: float, bars: Bars) -> Course:
    """The course of a method: `told` is its params, `share` of the corpus is held out, `guide` the reward bundle where it follows one."""
    match told:
        case RewardParams():
            return RewardCourse(corpus, told, base, words, share, bars)
        case DpoParams() | PpoParams() | GrpoParams():
            return PolicyCourse(corpus, guide, told, base, words, share, bars)
        case _:
            return AnswerCourse(corpus, told, base, words, share, bars)


def _texts(pair: Pair, words: Tokenizer) -> dict[str, str]:
    return {
        "prompt": words.decode(pair.chosen.ids[: pair.chosen.start]),
        "chosen": words.decode(pair.chosen.ids[pair.chosen.start :]),
        "rejected": words.decode(pair.rejected.ids[pair.rejected.start :]),
    }
