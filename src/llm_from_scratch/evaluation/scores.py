"""What each held-out unit costs a model: the numbers that a promotion is decided by.

All units come from the held-out documents of one corpus, whatever a model learned from, and are made of text alone: two versions with
other tokenizers, or another base, are asked the same. The means over them are near what the stages measured and not equal to it, since
these are fewer and cut in another way.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.nn.functional import cross_entropy

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.data.chat import ChatRecord, passage, records
from llm_from_scratch.data.documents import Document
from llm_from_scratch.data.preferences import Preference
from llm_from_scratch.data.questions import Question
from llm_from_scratch.evaluation.likelihood import token_nats
from llm_from_scratch.evaluation.promotion import Scores
from llm_from_scratch.evaluation.retrieval import ranks_of_answers
from llm_from_scratch.evaluation.splits import ids_of
from llm_from_scratch.evaluation.whole import open_whole
from llm_from_scratch.finetune.judge import JudgeParams, judge
from llm_from_scratch.finetune.pairs import answers, encode_pairs, encode_prompt
from llm_from_scratch.finetune.reward import RewardModel, load_reward, margins
from llm_from_scratch.inference.decoding import context_of, evaluating
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.tokenizer.base import Tokenizer
from llm_from_scratch.tokenizer.chat import render
from llm_from_scratch.training.batches import shifted, stacked
from llm_from_scratch.training.memory import UNSCORED

BATCH = 16
PROMPT_CHARACTERS = 60
"""Of a document's beginning, to be gone on with."""
CONTINUED_CHARACTERS = 120
"""Of what follows it, to be told from what follows another document's beginning."""

Units = dict[str, tuple[float, float]]
Judging = dict[str, object]
"""The params of a gold judge."""


@dataclass(frozen=True)
class Exam:
    """What every version is asked: held-out texts, and records made of them. `new` tokens are written to a prompt, drawn with `seed`."""

    texts: list[str]
    records: list[ChatRecord]
    judge: Judging
    new: int
    seed: int

    @classmethod
    def of(cls, held_out: Sequence[Document], units: int, judging: Judging, new: int, seed: int) -> Exam:
        """`units` at most of each, the same ones for the same documents and seed."""
        asked = random.Random(seed).sample(list(held_out), min(units, len(held_out)))
        made = records(held_out, seed)
        return cls([document.text for document in asked], random.Random(seed).sample(made, min(units, len(made))), judging, new, seed)


def scores_of(folder: Path, metric: str, exam: Exam, base: Path | None = None) -> Scores:
    """The scores by `metric` of the bundle in `folder`, which is a reward model's, a whole model's, or an adapter's beside its `base`.

    Raises BundleError for a damaged bundle, and ValueError for a metric that its kind does not have.
    """
    if bundle.read_manifest(folder).kind == "reward":
        bundle.verify(folder, "reward")
        return Scores(metric, pair_units(load_reward(folder), tokenizer.load(folder), exam))
    model, words = open_whole(folder, base)
    match metric:
        case "val_bpb":
            return Scores(metric, text_units(model, words, exam.texts))
        case "val_loss":
            return Scores(metric, answer_units(model, words, exam.records))
        case "gold_cost":
            return Scores(metric, gold_units(model, words, exam))
    raise ValueError(f"no metric '{metric}' to score {folder} by; there is val_bpb, val_loss and gold_cost")


def text_units(model: nn.Module, words: Tokenizer, texts: Sequence[str]) -> Units:
    """Bits of each text with its end, and the bytes that it has; the texts are read one after the other, as the ruler reads."""
    if not texts:
        return {}
    ids = ids_of(["", *texts], words)
    ends = np.flatnonzero(ids == words.eot)
    costs = np.add.reduceat(token_nats(model, ids, context_of(model), BATCH), ends[:-1]) / math.log(2)
    return {name(text): (cost, float(len(text.encode()))) for text, cost in zip(texts, costs.tolist(), strict=True)}


@torch.no_grad()
def answer_units(model: nn.Module, words: Tokenizer, asked: Sequence[ChatRecord]) -> Units:
    """Bits of each record's answers with their ends, and the bytes that they have. Records that do not fit the context are left out."""
    rows = [(record, *render(record["messages"], words, prompt=False)) for record in asked]
    fitting = sorted((row for row in rows if len(row[1]) <= context_of(model)), key=lambda row: len(row[1]))
    units: Units = {}
    with evaluating(model):
        for first in range(0, len(fitting), BATCH):
            batch = fitting[first : first + BATCH]
            pairs = [shifted(torch.tensor(ids), torch.tensor(learned)) for _, ids, learned in batch]
            inputs, targets = stacked(pairs, words.eot)
            costs = cross_entropy(model(inputs).float().transpose(1, 2), targets, ignore_index=UNSCORED, reduction="none").double().sum(1)
            for (record, *_), nats in zip(batch, costs.tolist(), strict=True):
                said = "".join(message["content"] for message in record["messages"] if message["role"] == "assistant")
                units[name(*(message["content"] for message in record["messages"]))] = (nats / math.log(2), float(len(said.encode())))
    return units


def gold_units(model: nn.Module, words: Tokenizer, exam: Exam) -> Units:
    """Minus what the gold judge gives for what the model writes behind the beginning of each text."""
    judged = judge(TypeAdapter(JudgeParams).validate_python(exam.judge))
    beginnings = [passage(text, PROMPT_CHARACTERS) for text in exam.texts]
    said = answers(model, [encode_prompt(text, words)[0] for text in beginnings], exam.new, words, exam.seed)
    kind = repr(sorted(exam.judge.items()))
    return {name(kind, text): (-judged(words.decode(ids)), 1.0) for text, ids in zip(beginnings, said, strict=True)}


def pair_units(model: RewardModel, words: Tokenizer, exam: Exam) -> Units:
    """Bradley and Terry's loss on pairs of continuations that people wrote, of which the judge likes one better."""
    if not (asked := human_pairs(exam.texts, exam.judge)):
        return {}
    pairs, skipped = encode_pairs(asked, words, model.context)
    assert not skipped, "a hundred characters fit any context"
    gaps = margins(model, pairs, words.eot, BATCH)
    kind = repr(sorted(exam.judge.items()))
    names = [name(kind, str(pair.prompt), pair.chosen, pair.rejected) for pair in asked]
    return {unit: (loss, 1.0) for unit, loss in zip(names, (-nn.functional.logsigmoid(gaps)).tolist(), strict=True)}


def human_pairs(texts: Sequence[str], judging: Judging) -> list[Preference]:
    """What follows a text's beginning, beside what follows the next one's; what the judge finds equally good makes no pair.

    No model writes them, so they stay the same when the base does not.
    """
    judged = judge(TypeAdapter(JudgeParams).validate_python(judging))
    parted = [(start, passage(text[len(start) :], CONTINUED_CHARACTERS)) for text in texts if (start := passage(text, PROMPT_CHARACTERS))]
    made = []
    for (start, own), (_, other) in pairwise([(start, rest) for start, rest in parted if rest]):
        better, worse = sorted((own, other), key=judged, reverse=True)
        if judged(better) > judged(worse):
            made.append(Preference(start, better, worse))
    return made


def search_units(index: Index, asked: Sequence[Question]) -> Units:
    """One minus the reciprocal rank of the right document, 1 where it was not found: their mean is 1 - MRR."""
    ranks = ranks_of_answers(index, asked, "fused")
    costs = [1 - 1 / rank if rank else 1.0 for rank in ranks]
    return {name(question.question, question.document): (cost, 1.0) for question, cost in zip(asked, costs, strict=True)}


def name(*asked: str) -> str:
    """A unit's name: a digest of what is asked, and of nothing that a model has to do with."""
    return hashlib.sha256("\0".join(asked).encode()).hexdigest()[:12]
