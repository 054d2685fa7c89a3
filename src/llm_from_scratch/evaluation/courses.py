"""What the preference methods are taught with and measured by: from a corpus to prompts and pairs, and from a model to its numbers.

`RewardCourse` is that of the reward model, `PolicyCourse` that of whoever is trained by one. Prompts to learn from come from the training
side of the corpus, those to measure on from the side that is held out, so nothing that is measured was practised.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from torch import nn

from llm_from_scratch import bundle
from llm_from_scratch.data.documents import DOCUMENTS, Document, Split, read_documents, with_splits
from llm_from_scratch.data.preferences import Preference, read_preferences
from llm_from_scratch.evaluation.alignment import Exam, best_of, examine, glance
from llm_from_scratch.finetune.dpo import DpoParams
from llm_from_scratch.finetune.grpo import GrpoParams
from llm_from_scratch.finetune.judge import Judge, JudgeParams, judge
from llm_from_scratch.finetune.pairs import Pair, PairLesson, Progress, encode_pairs, encode_prompt, judged, openings
from llm_from_scratch.finetune.ppo import ActorCritic, PpoParams
from llm_from_scratch.finetune.reward import PAIRS, RewardModel, RewardParams, accuracy, bradley_terry, calibration, load_reward, margins
from llm_from_scratch.finetune.rollouts import Course
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.tokenizer.base import END_OF_TURN, Tokenizer

SPLITS: tuple[Split, Split] = ("train", "validation")
BINS = 10
BEST_OF = 16
GLANCED = 128  # prompts behind a point of a curve
TEXT = 20_000  # tokens of held-out text for the perplexity


Following = DpoParams | PpoParams | GrpoParams
"""The methods that follow a reward model, or its pairs."""


@dataclass(frozen=True)
class Standing:
    """Where a model stands: its numbers, and what it wrote."""

    metrics: dict[str, Any]
    answers: list[str]


class RewardCourse:
    """Pairs: where the corpus holds preference files, those; where it holds documents, `base` goes on with them and is judged."""

    columns: tuple[str, ...] = ("accuracy",)

    def __init__(self, corpus: Path, told: RewardParams, base: Rung, words: Tokenizer, share: float, bars: Progress) -> None:
        self.bars = bars
        self.told, self.words, self.base = told, words, copy.deepcopy(base)
        self.prompts: list[list[int]] = []
        self.judge = judge(told.judge)
        learned, tested = self._preferences(corpus, share)
        pairs, skipped = encode_pairs(learned, words, told.context)
        self.held_out, _ = encode_pairs(tested, words, told.context)
        self.lesson = PairLesson(learned, pairs, np.empty(0), words.eot, words.special[END_OF_TURN])
        self.facts = {"records": len(pairs), "judge": told.judge.model_dump()}
        self.effort = {"pairs_held_out": len(self.held_out), "records_skipped": skipped}

    def measure(self, model: nn.Module) -> Standing:
        """Held-out pairs told right, and how sure it was; the loss of a model without a head is that of a coin."""
        gaps = margins(model, self.held_out, self.words.eot, self.told.batch) if isinstance(model, RewardModel) else None
        if gaps is None:
            return Standing({"val_loss": float(np.log(2)), "accuracy": 0.5}, [])
        found = {"val_loss": float(bradley_terry(gaps, gaps * 0)), "accuracy": accuracy(gaps)}
        return Standing(found, [f"{gap:+.2f}" for gap in gaps[: self.told.samples].tolist()])

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

    def show(self, before: Standing, after: Standing) -> list[dict[str, Any]]:
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

    def __init__(
        self,
        corpus: Path,
        guide: Path,
        told: Following,
        base: Rung,
        words: Tokenizer,
        share: float,
        bars: Progress,
    ) -> None:
        self.told, self.words, self.bars = told, words, bars
        manifest = bundle.verify(guide, "reward")
        gold: Judge = judge(TypeAdapter(JudgeParams).validate_python(manifest.facts["judge"]))
        if (corpus / DOCUMENTS).exists():
            asked, tested = prompts_of(corpus, words, told.prompt_tokens, told.seed, None, told.questions)
            sides_of_text = [[document.text for document in read_documents(corpus, split)] for split in SPLITS]
        else:
            sides = split_preferences(corpus, share)
            asked, tested = ([encode_prompt(one.prompt, words)[0] for one in side] for side in sides)
            tested, sides_of_text = tested[: told.questions], [[one.chosen for one in side] for side in sides]
        practice, text = (ids_of(texts, words) for texts in sides_of_text)
        text = text[:TEXT]
        self.exam = Exam(tested, told.answer_tokens, words, gold, copy.deepcopy(base), load_reward(guide), text, told.seed)
        self.few = replace(self.exam, prompts=tested[:GLANCED])
        ends = frozenset(words.special.values())
        self.lesson: PairLesson | Course
        if isinstance(told, DpoParams):
            preferences = read_preferences(guide / PAIRS)
            pairs, _ = encode_pairs(preferences, words, told.context)
            self.lesson = PairLesson(preferences, pairs, practice, words.eot, words.special[END_OF_TURN])
            self.facts = {"records": len(pairs)}
        else:
            self.lesson = Course(asked, practice, load_reward(guide), ends, words.eot, words.special[END_OF_TURN])
            self.facts = {"records": len(asked)}
        self.effort: dict[str, Any] = {}

    def measure(self, model: nn.Module) -> Standing:
        found = examine(model, self.exam, self.bars)
        return Standing(found.metrics(), found.answers)

    def glance(self, model: nn.Module) -> dict[str, float]:
        return glance(model.policy if isinstance(model, ActorCritic) else model, self.few)

    def extras(self, model: nn.Module) -> dict[str, Any]:
        return {}

    def show(self, before: Standing, after: Standing) -> list[dict[str, Any]]:
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


def split_preferences(corpus: Path, share: float) -> tuple[list[Preference], list[Preference]]:
    """(to learn, held out): the preferences in a corpus' files, those to one prompt on the same side. Raises RecordError for a bad line."""
    found = [one for path in sorted(corpus.rglob("*.jsonl")) for one in read_preferences(path)]
    prompts = {json.dumps(one.prompt): None for one in found}
    split = with_splits([Document(prompt, "", "") for prompt in prompts], share)
    held_out = {document.id for document in split if document.split == "validation"}
    sides: tuple[list[Preference], list[Preference]] = ([], [])
    for one in found:
        sides[json.dumps(one.prompt) in held_out].append(one)
    return sides


def prompts_of(
    corpus: Path, words: Tokenizer, tokens: int, seed: int, most: int | None, tested: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(to learn from, to measure on): beginnings of the documents of each side, `most` (None: all) and `tested` of them at most.

    Raises ValueError where a side has none that is long enough.
    """
    rng = random.Random(seed)
    sides: list[list[list[int]]] = []
    for split, wanted in zip(SPLITS, (most, tested), strict=True):
        found = openings((document.text for document in read_documents(corpus, split)), words, tokens)
        if not found:
            raise ValueError(f"no {split} document of {corpus.name} is longer than {tokens} tokens; lower prompt_tokens")
        sides.append(rng.sample(found, min(len(found), wanted or len(found))))
    return sides[0], sides[1]


def ids_of(texts: Sequence[str], words: Tokenizer) -> np.ndarray:
    """The texts as one row of ids, each behind its end."""
    ends = np.array([words.eot], dtype=np.uint32)
    return np.concatenate([part for ids in words.encode_batch(texts) for part in (ids, ends)]).astype(np.int64)


def _texts(pair: Pair, words: Tokenizer) -> dict[str, str]:
    return {
        "prompt": words.decode(pair.chosen.ids[: pair.chosen.start]),
        "chosen": words.decode(pair.chosen.ids[pair.chosen.start :]),
        "rejected": words.decode(pair.rejected.ids[pair.rejected.start :]),
    }
