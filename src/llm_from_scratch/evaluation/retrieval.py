"""Does reading help, and does search find what to read? Held-out questions with no, a random, the retrieved and the right passage.

The right passage is the most that search could give, a random one shows what mere length and style do, none shows what is known by heart.
Choosing among given answers by likelihood shows reading in models that are too small to write the answer, and writing it is scored as well.

A choice's score is its mean log probability a token, its <|end|> with it: a sum would favour short choices for being short, and a mean
over bytes has none to give to <|end|>. That is what fine-tuning minimised, too.

Prompts of about one length are read together and only once: all choices, and the answer, go on from the same keys and values.

Shapes: Q questions at once, C choices each, T tokens of the longest prompt, L of the longest choice, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from llm_from_scratch.data.questions import Question
from llm_from_scratch.evaluation import EvaluateParams
from llm_from_scratch.evaluation.generation import exact_match, token_f1
from llm_from_scratch.evaluation.multiple_choice import UNSCORED, bootstrap_interval, credit
from llm_from_scratch.inference.decoding import context_of, evaluating
from llm_from_scratch.inference.forward import Forward, forward_of
from llm_from_scratch.inference.kv_cache import SlotCache
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.retrieval.embed import Progress, quiet
from llm_from_scratch.retrieval.index import DEPTH, Index, Mode
from llm_from_scratch.retrieval.rag import TRAINED, Form, fit_passages, form_of
from llm_from_scratch.tokenizer.base import Tokenizer
from llm_from_scratch.tokenizer.chat import render

CONDITIONS = ("none", "random", "retrieved", "oracle")
TOGETHER = 16  # prompts read at once
WORTH_SHARING = 16  # tokens


@dataclass(frozen=True)
class Reply:
    """What a model makes of one prompt: the mean log probability a token of each choice, and what it writes itself, greedily."""

    scores: tuple[float, ...]
    text: str


def question_answering(
    model: nn.Module | NGram,
    tokenizer: Tokenizer,
    index: Index | None,
    questions: Sequence[Question],
    params: EvaluateParams,
    conditions: Sequence[str] = CONDITIONS,
) -> dict[str, dict[str, float]]:
    """For each condition: accuracy with the ends of its 95% bootstrap interval, f1 and exact_match of the written answer, and n.

    Where `none` is among them, also accuracy_pmi: the choice whose likelihood the passage raised most (pointwise mutual information,
    Holtzman et al. 2021), which leaves out how likely each choice was anyway.

    Raises ValueError as `replies_by_condition` does.
    """
    found = replies_by_condition(model, tokenizer, index, questions, params, conditions)
    return {condition: graded(questions, made, params.seed, found.get("none")) for condition, made in found.items()}


def replies_by_condition(
    model: nn.Module | NGram,
    tokenizer: Tokenizer,
    index: Index | None,
    questions: Sequence[Question],
    params: EvaluateParams,
    conditions: Sequence[str] = CONDITIONS,
    progress: Progress = quiet,
    form: Form | None = None,
) -> dict[str, list[Reply]]:
    """What `model` makes of the questions under each condition.

    The question meets its passages as in `form`, or as the model is served. `progress` is told of every prompt done. Raises ValueError for
    a model that has no cache, or as `passages_for`.
    """
    if isinstance(model, NGram) or not getattr(model, "supports_cache", False):
        raise ValueError(f"{type(model).__name__} keeps no keys and values, so it cannot be asked; ask a gpt or llama rung")
    form, choices = form or form_of(tokenizer), choice_ids(questions, tokenizer)
    room = context_of(model) - max(params.answer_tokens, max(len(ids) for offered in choices for ids in offered))
    found: dict[str, list[Reply]] = {}
    for condition in conditions:
        passages = passages_for(condition, questions, index, params, form)
        prompts = prompts_with(passages, questions, tokenizer, room, form)
        found[condition] = replies(model, tokenizer, prompts, choices, params.answer_tokens, progress)
    return found


def retrieval_quality(index: Index, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """For each way to search: how often the right document is first, or among five (recall_at_1, recall_at_5), the mean of 1 / rank (mrr),
    and ndcg_at_10, which with one right document is the mean of 1 / log2(1 + rank) (Järvelin & Kekäläinen 2002).
    """
    return {mode: rank_means(ranks_of_answers(index, questions, mode)) for mode in get_args(Mode)}


def ranks_of_answers(index: Index, questions: Sequence[Question], mode: Mode) -> list[int]:
    """The rank from 1 of the first passage of each question's document, 0 where it is not among the first hundred."""
    found = index.search_all([question.question for question in questions], DEPTH, mode)
    return [
        next((hit.rank for hit in hits if hit.passage.document == question.document), 0)
        for question, hits in zip(questions, found, strict=True)
    ]


def rank_means(ranks: Sequence[int]) -> dict[str, float]:
    """The measures of `retrieval_quality` for ranks from 1, and 0 for what was not found."""
    found = np.array(ranks, dtype=np.float64)
    return {
        "recall_at_1": float(np.mean(found == 1)),
        "recall_at_5": float(np.mean((found >= 1) & (found <= 5))),
        "mrr": float(np.mean(np.divide(1, found, out=np.zeros_like(found), where=found > 0))),
        "ndcg_at_10": float(np.mean(np.divide(1, np.log2(1 + found), out=np.zeros_like(found), where=(found >= 1) & (found <= 10)))),
    }


def passages_for(
    condition: str, questions: Sequence[Question], index: Index | None, params: EvaluateParams, form: Form = TRAINED
) -> list[list[str]]:
    """What is put before each question, best first. A random passage is another question's, so it is of the same making.

    All are told as the retrieved ones; a document that is not in the index goes by its id there. Raises ValueError for a condition that is
    none of CONDITIONS, and for retrieved ones without an index.
    """
    if condition == "none":
        return [[] for _ in questions]
    if condition in ("random", "oracle"):
        titles = {passage.document: passage.title for passage in index.passages} if index else {}
        right = questions if condition == "oracle" else _strangers(questions, params.seed)
        return [[form.told(titles.get(each.document, each.document), each.passage)] for each in right]
    if condition == "retrieved":
        if index is None:
            raise ValueError("retrieved passages come from an index; open one, or ask for none, random or oracle")
        found = index.search_all([question.question for question in questions], params.passages)
        return [[form.told(hit.passage.title, hit.passage.text) for hit in hits] for hits in found]
    raise ValueError(f"no condition '{condition}'; there is {', '.join(CONDITIONS)}")


def prompts_with(
    passages: Sequence[Sequence[str]], questions: Sequence[Question], tokenizer: Tokenizer, room: int, form: Form = TRAINED
) -> list[list[int]]:
    """Each question behind its passages as ids, at most `room` of them. Raises ValueError where a question alone does not fit."""
    prompts = []
    for question, texts in zip(questions, passages, strict=True):
        kept = fit_passages(question.question, texts, tokenizer, room, form)
        prompts.append(render(form.messages(question.question, kept), tokenizer, prompt=True)[0])
    return prompts


def choice_ids(questions: Sequence[Question], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Each choice as the assistant's whole answer, its end with it."""
    return [[[*tokenizer.encode(choice), tokenizer.end_of_turn] for choice in question.choices] for question in questions]


def replies(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    choices: Sequence[Sequence[list[int]]],
    answer_tokens: int,
    progress: Progress = quiet,
) -> list[Reply]:
    """What `model` makes of each prompt, `choices` being token ids that end in <|end|>, as many for every prompt."""
    made: dict[int, Reply] = {}
    forward = forward_of(model)
    ends = frozenset(tokenizer.special.values())
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for places in (order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)):
        scores, written = _read(
            model, forward, [prompts[place] for place in places], [choices[place] for place in places], answer_tokens, ends
        )
        for place, row, ids in zip(places, scores.tolist(), written, strict=True):
            made[place] = Reply(tuple(row), tokenizer.decode(ids).strip())
        progress(len(places))
    return [made[place] for place in range(len(prompts))]


def graded(questions: Sequence[Question], found: Sequence[Reply], seed: int, unread: Sequence[Reply] | None = None) -> dict[str, float]:
    """The means over all questions; `unread` are the replies to the same without a passage, for accuracy_pmi.

    A tie between choices counts as its chance, so a model that cannot tell them apart has just that.
    """
    places = [question.choices.index(question.answer) for question in questions]
    credits = np.array([credit(reply.scores, place) for reply, place in zip(found, places, strict=True)])
    low, high = bootstrap_interval(credits, seed)
    raised: dict[str, float] = {}
    if unread is not None:
        gains = [np.subtract(reply.scores, before.scores).tolist() for reply, before in zip(found, unread, strict=True)]
        raised["accuracy_pmi"] = float(np.mean([credit(scores, place) for scores, place in zip(gains, places, strict=True)]))
    pairs = [(reply.text, question.answer) for question, reply in zip(questions, found, strict=True)]
    return {
        "accuracy": float(credits.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        **raised,
        "f1": float(np.mean([token_f1(*pair) for pair in pairs])),
        "exact_match": float(np.mean([exact_match(*pair) for pair in pairs])),
        "n": len(questions),
    }


@torch.inference_mode()
def _read(
    model: nn.Module,
    forward: Forward,
    prompts: list[list[int]],
    choices: list[Sequence[list[int]]],
    answer_tokens: int,
    ends: Collection[int],
) -> tuple[Tensor, list[list[int]]]:
    """Q prompts to the score of each choice (Q, C), and the greedy answers."""
    longest = max(len(ids) for row in choices for ids in row)
    orders = [np.argsort([len(ids) for ids in row], kind="stable").tolist() for row in choices]
    by_length = [[row[place] for place in order] for row, order in zip(choices, orders, strict=True)]  # so that little is padding
    slots = SlotCache(model, len(prompts), max(map(len, prompts)) + max(answer_tokens, longest))
    with evaluating(model):
        after = _prompted(forward, slots, prompts)
        scores = torch.stack([_scored(forward, slots, after, offered) for offered in zip(*by_length, strict=True)], 1)
        places = torch.tensor(orders, device=scores.device)
        return torch.empty_like(scores).scatter_(1, places, scores), _greedy(forward, slots, after, answer_tokens, ends)


def _prompted(forward: Forward, slots: SlotCache, prompts: Sequence[list[int]]) -> Tensor:
    """Read every prompt into its slot; the logits (Q, V) after it. What pads a shorter one is overwritten by what comes after it."""
    shared = _shared(forward, slots, prompts)
    rest = [torch.tensor(prompt[shared:-1], dtype=torch.int64, device=slots.device) for prompt in prompts]
    before, everyone = pad_sequence(rest, batch_first=True), range(slots.slots)
    if before.size(1):
        forward(before, slots.rows(0, slots.slots, before.size(1), everyone), False)
    slots.lengths[:] = [len(prompt) - 1 for prompt in prompts]
    last = torch.tensor([prompt[-1:] for prompt in prompts], device=slots.device)
    return forward(last, slots.rows(0, slots.slots, 1, everyone), False)[:, -1]


def _shared(forward: Forward, slots: SlotCache, prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, read once and copied into every slot: the instructions, say. 0 where it would not pay."""
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*(prompt[:-1] for prompt in prompts), strict=False))
    shared = sum(1 for _ in alike)
    if len(prompts) == 1 or shared < WORTH_SHARING:
        return 0
    forward(torch.tensor([prompts[0][:shared]], device=slots.device), slots.rows(0, 1, shared, [0]), False)
    for stored in (*slots.keys, *slots.values):
        stored[1:, :shared] = stored[:1, :shared]
    slots.lengths[:] = [shared] * slots.slots
    return shared


def _scored(forward: Forward, slots: SlotCache, after: Tensor, offered: Sequence[list[int]]) -> Tensor:
    """Mean log probability a token (Q,) of a choice behind each prompt. The slots stay as they were."""
    targets = pad_sequence([torch.tensor(ids, device=slots.device) for ids in offered], batch_first=True, padding_value=UNSCORED)
    logits = after[:, None]
    if targets.size(1) > 1:
        nobody = slots.rows(0, slots.slots, targets.size(1) - 1, ())
        logits = torch.cat((logits, forward(targets[:, :-1].clamp(min=0), nobody, True)), 1)
    nats = cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=UNSCORED, reduction="none")
    return -nats.sum(1) / (targets != UNSCORED).sum(1)


def _greedy(forward: Forward, slots: SlotCache, after: Tensor, most: int, ends: Collection[int]) -> list[list[int]]:
    """The likeliest token again and again, until each row has come to an end or has `most` of them."""
    written: list[list[int]] = [[] for _ in after]
    going = set(range(len(written)))
    for _ in range(most):
        tokens = after.argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            if token in ends:
                going.discard(row)
            elif row in going:
                written[row].append(token)
        if not going:
            break
        after = forward(tokens[:, None], slots.rows(0, slots.slots, 1, range(slots.slots)), False)[:, -1]
    return written


def _strangers(questions: Sequence[Question], seed: int) -> list[Question]:
    """For each question the next one about another document, in a random order of all."""
    order = np.random.default_rng(seed).permutation(len(questions)).tolist()
    chosen: dict[int, Question] = {}
    for turn, place in enumerate(order):
        others = (questions[other] for other in order[turn + 1 :] + order[:turn])
        stranger = next((other for other in others if other.document != questions[place].document), None)
        if stranger is None:
            raise ValueError("random passages come from other documents, but all questions are about one; ask about two or more")
        chosen[place] = stranger
    return [chosen[place] for place in range(len(questions))]
