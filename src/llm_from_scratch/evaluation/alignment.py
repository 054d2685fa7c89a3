"""Whether a policy got better at what was wanted, and what that cost: gold reward against distance from the start.

A learned reward goes up in any case, since that is what was trained; only the gold judge, which no training saw, says whether it is worth
anything (Gao et al. 2022, arXiv:2210.10760). The distance is KL(policy ‖ reference), a mean over what the policy writes. Two more
rulers show how it can be got cheaply: distinct-n falls when all answers become one, and the perplexity of held-out text rises when
language is lost. Best-of-n needs no training at all, so it is the frontier to hold the others against.

Shapes: N prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import torch
from torch import nn

from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.finetune.judge import Judge
from llm_from_scratch.finetune.pairs import Progress, answers
from llm_from_scratch.finetune.policy import log_probs
from llm_from_scratch.finetune.reward import RewardModel
from llm_from_scratch.inference.batched import by_length
from llm_from_scratch.inference.decoding import evaluating
from llm_from_scratch.tokenizer.base import Tokenizer
from llm_from_scratch.training.memory import UNSCORED

ROWS = 64


@dataclass(frozen=True)
class Exam:
    """Held-out prompts, how much is answered to each, who judges, and where all started; `text` are ids of held-out text."""

    prompts: list[list[int]]
    new: int
    words: Tokenizer
    judge: Judge
    reference: nn.Module
    reward: RewardModel
    text: np.ndarray
    seed: int


@dataclass(frozen=True)
class Standing:
    """Means over the prompts: gold and learned reward, KL in nats an answer, distinct bigrams; and the perplexity of held-out text.

    `spread` is the standard deviation of the gold reward over prompts, `answers` are what was written.
    """

    gold: float
    spread: float
    learned: float
    kl: float
    distinct_2: float
    val_loss: float
    answers: list[str]

    def metrics(self) -> dict[str, float]:
        ruler = {"gold": self.gold, "gold_spread": self.spread, "learned": self.learned, "kl": self.kl, "distinct_2": self.distinct_2}
        return {**ruler, "val_loss": self.val_loss, "val_ppl": math.exp(self.val_loss)}


def examine(policy: nn.Module, exam: Exam, progress: Progress = iter) -> Standing:
    """Where `policy` stands; the same seed draws the same numbers for every policy."""
    said = answers(policy, exam.prompts, exam.new, exam.words, exam.seed, progress)
    texts = [exam.words.decode(answer) for answer in said]
    gold = [exam.judge(text) for text in texts]
    return Standing(
        gold=fmean(gold),
        spread=stdev(gold),
        learned=fmean(learned_rewards(exam.reward, exam.prompts, said, exam.words.eot)),
        kl=fmean(divergences(policy, exam.reference, exam.prompts, said, exam.words.eot)),
        distinct_2=distinct([text.split() for text in texts], 2),
        val_loss=score(policy, exam.text, exam.words.token_bytes(), int(policy.context)).val_loss,  # type: ignore[arg-type]
        answers=texts,
    )


def glance(policy: nn.Module, exam: Exam) -> dict[str, float]:
    """Gold and learned reward and KL, for a point of a curve."""
    said = answers(policy, exam.prompts, exam.new, exam.words, exam.seed)
    return {
        "gold": fmean(exam.judge(exam.words.decode(answer)) for answer in said),
        "learned": fmean(learned_rewards(exam.reward, exam.prompts, said, exam.words.eot)),
        "kl": fmean(divergences(policy, exam.reference, exam.prompts, said, exam.words.eot)),
    }


@torch.no_grad()
def divergences(policy: nn.Module, reference: nn.Module, prompts: Sequence[list[int]], said: Sequence[list[int]], pad: int) -> list[float]:
    """(N,) log p(answer) - log p0(answer) of what the policy said: an unbiased estimate of KL(policy ‖ reference), each with much noise."""
    found = [0.0] * len(prompts)
    device = next(policy.parameters()).device
    with evaluating(policy), evaluating(reference.to(device)):
        for places, ids, targets in _rows(prompts, said, pad):
            inside = targets.to(device)
            gap = [log_probs(model(ids.to(device)), inside).double().sum(1) for model in (policy, reference)]
            for place, nats in zip(places, (gap[0] - gap[1]).tolist(), strict=True):
                found[place] = nats
    return found


@torch.no_grad()
def learned_rewards(reward: RewardModel, prompts: Sequence[list[int]], said: Sequence[list[int]], pad: int) -> list[float]:
    """(N,) the reward model's number for each answer."""
    found = [0.0] * len(prompts)
    device = next(reward.parameters()).device
    for places, ids, _ in _rows(prompts, said, pad):
        last = torch.tensor([len(prompts[place]) + len(said[place]) - 1 for place in places])
        for place, value in zip(places, reward(ids.to(device), last.to(device)).tolist(), strict=True):
            found[place] = value
    return found


def best_of(exam: Exam, most: int, progress: Progress = iter) -> list[dict[str, float]]:
    """The start, and of 2, 4, … up to `most` of its answers to each prompt the one that the reward model likes best."""
    repeated = [prompt for prompt in exam.prompts for _ in range(most)]
    said = answers(exam.reference, repeated, exam.new, exam.words, exam.seed, progress)
    learned = np.array(learned_rewards(exam.reward, repeated, said, exam.words.eot)).reshape(-1, most)
    gold = np.array([exam.judge(exam.words.decode(answer)) for answer in said]).reshape(-1, most)
    return best_curve(learned, gold)


def best_curve(learned: np.ndarray, gold: np.ndarray) -> list[dict[str, float]]:
    """Rewards (N, M) of M answers to each prompt to those of the best of 1, 2, 4, … M of them by `learned`, means over the prompts.

    All M count for each n: the one of rank i is the best of a choice of n in comb(i - 1, n - 1) of comb(M, n) cases (Nakano et al. 2021,
    arXiv:2112.09332, appendix I). The KL of best-of-n is at most log n - (n - 1) / n nats, and that bound is what stands here (Beirami et
    al. 2024, arXiv:2401.01879).
    """
    ranked, most = learned.argsort(1, kind="stable"), learned.shape[1]
    means = {name: np.take_along_axis(values, ranked, 1).mean(0) for name, values in (("gold", gold), ("learned", learned))}
    rows = []
    for n in (2**power for power in range(most.bit_length())):
        chance = np.array([math.comb(below, n - 1) / math.comb(most, n) for below in range(most)])
        rows.append({"n": n, "kl": math.log(n) - (n - 1) / n, **{name: float(chance @ mean) for name, mean in means.items()}})
    return rows


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """The share of all runs of `n` words that are different ones (Li et al. 2016); 0 where there are none."""
    runs = [tuple(words[place : place + n]) for words in texts for place in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def _rows(prompts: Sequence[list[int]], said: Sequence[list[int]], pad: int) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Places, ids (B, T) and targets (B, T), those of answers: in batches of prompts of one length, padded behind the answers."""
    batches = []
    for places in by_length(prompts, ROWS):
        whole = [torch.tensor([*prompts[place], *said[place]]) for place in places]
        ids = nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=pad)
        targets = torch.full_like(ids, UNSCORED)
        for row, place in enumerate(places):
            start, end = len(prompts[place]), len(whole[row])
            targets[row, start - 1 : end - 1] = ids[row, start:end]
        batches.append((places, ids, targets))
    return batches
