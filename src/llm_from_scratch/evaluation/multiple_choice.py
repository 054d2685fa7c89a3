"""Which ending does the model find likeliest? HellaSwag (Zellers et al. 2019), and any file in its form.

The right ending of four was written by a person, the others by a model, and picked for looking right to models. Nothing is taught or asked:
each ending is scored by its log probability behind the context, as it is (`accuracy`) and divided by its bytes (`accuracy_norm`), because a
sum favours short endings for being short. Bytes are the same for every tokenizer, so models with different ones compare.

It does not say whether a model can write the ending. Texts are used as they stand, brackets included, and nothing is put before them.

Contexts of one length are read together and only once: all endings go on from the same keys and values.

Shapes: Q contexts of one length, C endings each, L tokens of the longest ending, V vocabulary.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from llm_from_scratch.evaluation.likelihood import token_nats
from llm_from_scratch.inference.decoding import context_of, evaluating
from llm_from_scratch.inference.kv_cache import KVCache
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.tokenizer.base import Tokenizer

RESAMPLES = 2000
UNSCORED = -100
TIE = 1e-6  # nearer than this is rounding

Progress = Callable[[int], object]
"""Told how many contexts are done each time some are: the `update` of a bar, say."""


@dataclass(frozen=True)
class Problem:
    """A context, endings to choose from, and the place of the right one."""

    context: str
    endings: tuple[str, ...]
    right: int


def quiet(done: int) -> None:
    """Nobody is told."""


def read_problems(path: Path) -> list[Problem]:
    """Of a .jsonl of `ctx`, `endings`, `label`, as HellaSwag is published, or a .json of `question`, `choices` by letter, `answer`.

    Raises ValueError naming the row that is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else _listed(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{path.name}: not JSON ({error}); fetch it again") from None
    return [_problem(row, f"{path.name}: row {number}") for number, row in enumerate(rows, start=1)]


def multiple_choice(
    model: nn.Module | NGram, tokenizer: Tokenizer, problems: Sequence[Problem], seed: int, batch: int = 16, progress: Progress = quiet
) -> dict[str, float]:
    """accuracy and accuracy_norm with the ends of their 95% bootstrap intervals (`seed` draws the resamples), chance, and n.

    `batch` contexts of one length are read at once. Works for every rung, and for texts longer than its context. Raises ValueError without
    problems.
    """
    if not problems:
        raise ValueError("no problems to choose endings for; give a file with at least one")
    prompts = [tokenizer.encode(problem.context.strip()) or [tokenizer.eot] for problem in problems]
    endings = [[tokenizer.encode(f" {ending.strip()}") for ending in problem.endings] for problem in problems]
    sums = ending_log_probabilities(model, prompts, endings, batch, progress)
    means = [
        [score / len(ending.strip().encode()) for score, ending in zip(scores, problem.endings, strict=True)]
        for scores, problem in zip(sums, problems, strict=True)
    ]
    found: dict[str, float] = {}
    for name, scores_of_all in (("accuracy", sums), ("accuracy_norm", means)):
        credits = np.array([credit(scores, problem.right) for scores, problem in zip(scores_of_all, problems, strict=True)])
        low, high = bootstrap_interval(credits, seed)
        found |= {name: float(credits.mean()), f"{name}_low": low, f"{name}_high": high}
    return {**found, "chance": float(np.mean([1 / len(problem.endings) for problem in problems])), "n": len(problems)}


def ending_log_probabilities(
    model: nn.Module | NGram,
    prompts: Sequence[list[int]],
    endings: Sequence[Sequence[list[int]]],
    batch: int = 16,
    progress: Progress = quiet,
) -> list[list[float]]:
    """The log probability (natural, summed over its tokens) of each ending behind its prompt; all are token ids, and none is empty."""
    made: dict[int, list[float]] = {}
    keys = [_together(model, prompt, offered) for prompt, offered in zip(prompts, endings, strict=True)]
    for key, places in alike(keys, batch):
        if key is None or isinstance(model, NGram):
            for place in places:
                made[place] = [_alone(model, prompts[place], ending) for ending in endings[place]]
        else:
            scores = _read(model, [prompts[place] for place in places], [endings[place] for place in places])
            made |= zip(places, scores.tolist(), strict=True)
        progress(len(places))
    return [made[place] for place in range(len(prompts))]


def continuations(model: nn.Module, after: Tensor, read: KVCache, endings: Sequence[Sequence[list[int]]]) -> Tensor:
    """Log probability (Q, C) of C texts behind each of the Q prompts that `read` holds, and whose last logits are `after` (Q, V).

    `read` is left as it was. Padding is on the right, where no scored token looks.
    """
    offered = [torch.tensor(ids, device=after.device) for row in endings for ids in row]
    each = len(offered) // len(endings)
    targets = pad_sequence(offered, batch_first=True, padding_value=UNSCORED)
    branches = _branched(model, read, each, targets.size(1))
    later = model(targets[:, :-1].clamp(min=0), branches)
    logits = torch.cat((after.repeat_interleave(each, 0)[:, None], later), 1).float()
    nats = cross_entropy(logits.transpose(1, 2), targets, ignore_index=UNSCORED, reduction="none")
    return -nats.sum(1).view(len(endings), each)


def alike(keys: Sequence[Hashable], most: int) -> Iterator[tuple[Any, list[int]]]:
    """Each key with the places that have it, at most `most` at a time: prompts of one length need no padding on the left."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        groups[key].append(place)
    for key, places in groups.items():
        yield from ((key, places[start : start + most]) for start in range(0, len(places), most))


def credit(scores: Sequence[float], right: int) -> float:
    """1 where the right one scores highest, else 0. A tie counts as its chance: a model that cannot tell them apart has just that."""
    best = [place for place, score in enumerate(scores) if max(scores) - score <= TIE]
    return float(right in best) / len(best)


def bootstrap_interval(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Where the mean of `values` lies in 95% of 2,000 resamples with replacement (Efron's percentile interval)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _together(model: nn.Module | NGram, prompt: list[int], endings: Sequence[list[int]]) -> tuple[int, int] | None:
    """What must be equal for prompts to be read at once; None where the model has no cache, or the text does not fit its context."""
    if isinstance(model, NGram) or not getattr(model, "supports_cache", False):
        return None
    fits = len(prompt) + max(map(len, endings)) <= context_of(model)
    return (len(prompt), len(endings)) if fits else None


@torch.inference_mode()
def _read(model: nn.Module, prompts: list[list[int]], endings: list[Sequence[list[int]]]) -> Tensor:
    """Prompts (Q, T) of one length to the log probability of each of their endings (Q, C)."""
    read = KVCache.of(model, len(prompts[0]), batch=len(prompts))
    with evaluating(model):
        after = model(torch.tensor(prompts, device=read.keys.device), read)[:, -1]
        return continuations(model, after, read, endings)


def _branched(model: nn.Module, read: KVCache, each: int, room: int) -> KVCache:
    """Every row of `read` `each` times, side by side, with room for that many more tokens."""
    length = read.length
    branches = KVCache.of(model, length + room, batch=read.keys.size(1) * each)
    branches.keys[:, :, :, :length] = read.keys[:, :, :, :length].repeat_interleave(each, 1)
    branches.values[:, :, :, :length] = read.values[:, :, :, :length].repeat_interleave(each, 1)
    branches.length = length
    return branches


def _alone(model: nn.Module | NGram, prompt: list[int], ending: list[int]) -> float:
    """The slow way, for any model and any length: the whole text scored as held-out text is."""
    ids = np.array([*prompt, *ending])
    nats = model.token_nats(ids) if isinstance(model, NGram) else token_nats(model, ids, min(context_of(model), len(ids) - 1))
    return -float(nats[-len(ending) :].sum())


def _listed(content: Any) -> list[Any]:
    """The rows of a JSON file: a list, or the lists in an object, as a file with several splits has them."""
    return content if isinstance(content, list) else [row for rows in content.values() if isinstance(rows, list) for row in rows]


def _problem(row: Mapping[str, Any], where: str) -> Problem:
    try:
        if "ctx" in row:
            endings, right = tuple(row["endings"]), int(row["label"])
            context = row["ctx"]
        else:
            letters = sorted(row["choices"])
            endings, right = tuple(row["choices"][letter] for letter in letters), letters.index(row["answer"])
            context = row["question"]
        if not 0 <= right < len(endings) or not all(ending.strip() for ending in endings):
            raise ValueError(f"{len(endings)} endings, the right one {right}")
        return Problem(context, endings, right)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        wanted = "ctx, endings and label, or question, choices and answer"
        raise ValueError(f"{where}: wanted {wanted}, found {type(error).__name__}: {error}; take HellaSwag's validation file") from None
