"""A reward model: the base with one number for a head, taught by pairs which of two answers somebody liked better.

    loss = -log sigmoid(r(chosen) - r(rejected))

Bradley and Terry's model of comparisons (1952), as in Ouyang et al. 2022 (arXiv:2203.02155): only differences mean anything. What it
cannot do is judge what is unlike all that it saw, and a policy that is trained against it will look for just that. A saved one is a
`…ForSequenceClassification` with one label to transformers.

Shapes: B rows or pairs, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from llm_from_scratch.bundle import BundleError, save_tensors
from llm_from_scratch.data.preferences import write_preferences
from llm_from_scratch.finetune.judge import JudgeParams
from llm_from_scratch.finetune.pairs import Pair, PairLesson, pair_batches, stack
from llm_from_scratch.finetune.sft import Finetune, Job
from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.huggingface import WEIGHTS
from llm_from_scratch.model.llama import Llama
from llm_from_scratch.model.registry import CONFIG, config_of, export_state, from_config, import_state, read_config, read_tensors
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.training.loop import Batch, Batches
from llm_from_scratch.training.memory import UNSCORED

HEAD = "score.weight"
HEADLESS = {"ForCausalLM": "ForSequenceClassification", "LMHeadModel": "ForSequenceClassification"}
PAIRS = "pairs.jsonl"
"""Beside the weights: the pairs that it learned from, for who learns from them directly."""


class RewardParams(Finetune):
    """`prompts` of `prompt_tokens` are answered `answers_each` times in up to `answer_tokens`; `judge` pairs the better with the worse.

    Where the corpus holds preference files instead of documents, those are the pairs.
    """

    method: Literal["reward"]
    judge: JudgeParams
    prompts: Annotated[int, Field(ge=2)]
    answers_each: Annotated[int, Field(ge=2)]
    prompt_tokens: Annotated[int, Field(ge=1)]
    answer_tokens: Annotated[int, Field(ge=1)]


class RewardModel(nn.Module):
    """ids (B, T) and the place of each row's last token (B,) to a number each, (B,)."""

    def __init__(self, trunk: Gpt | Llama) -> None:
        super().__init__()
        self.trunk = trunk
        self.score = nn.Linear(trunk.shape.width, 1, bias=False)
        nn.init.zeros_(self.score.weight)
        self.context = trunk.context

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        x = self.trunk.normed(self.trunk.mix(self.trunk.embed(ids, 0), None))
        rewards: Tensor = self.score(x[torch.arange(len(x), device=x.device), last])[:, 0]
        return rewards


def reward_model(base: Rung) -> RewardModel:
    """`base`, with a head that starts at zero. Raises ValueError for a rung that is neither gpt nor llama."""
    if not isinstance(base, Gpt | Llama):
        raise ValueError(f"a reward model grows from a gpt or a llama, and this is a {type(base).__name__}; name another model")
    return RewardModel(base)


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Rewards (B,) of both sides to the mean loss."""
    return -F.logsigmoid(chosen - rejected).mean()


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Of ids (B, 2, T), chosen beside rejected; `last` (B, 2) comes third. Every pair counts once."""
    ids, _, last = batch
    rewards = model(ids.flatten(0, 1), last.flatten()).unflatten(0, (-1, 2))
    return bradley_terry(rewards[:, 0], rewards[:, 1])


def batches(pairs: Sequence[Pair], pad: int, params: RewardParams) -> Batches:
    """(ids (B, 2, T), a target a pair, places of the last tokens (B, 2)) of a step."""

    def make(places: list[int]) -> Batch:
        ids, targets = stack([pairs[place] for place in places], pad)
        return ids, torch.zeros(len(ids), 1, dtype=torch.long), last_places(targets)

    return pair_batches(len(pairs), params.batch, params.seed, make)


def last_places(targets: Tensor) -> Tensor:
    """Targets (..., T), unscored where no answer follows, to the place of the answer's last token (...)."""
    places = torch.arange(targets.size(-1), device=targets.device)
    return ((targets != UNSCORED) * (places + 1)).amax(-1)


def job(base: Rung, lesson: PairLesson, params: RewardParams) -> Job:
    """All weights and the head, by Bradley and Terry's loss; the pairs are saved beside them."""
    model = reward_model(base)

    def save(folder: Path, base_at: str) -> None:
        save_reward(model, folder, lesson.pad)
        write_preferences(folder / PAIRS, lesson.preferences)

    return Job(model, batches(lesson.pairs, lesson.pad, params), loss, "reward", lambda: model, save)


@torch.no_grad()
def margins(model: nn.Module, pairs: Sequence[Pair], pad: int, batch: int) -> Tensor:
    """(N,) how much more reward the chosen answer of each pair gets than the rejected one."""
    device, found = next(model.parameters()).device, []
    was_training = model.training
    model.eval()
    for start in range(0, len(pairs), batch):
        ids, targets = stack(pairs[start : start + batch], pad)
        rewards = model(ids.flatten(0, 1).to(device), last_places(targets).flatten().to(device)).unflatten(0, (-1, 2)).cpu()
        found.append(rewards[:, 0] - rewards[:, 1])
    model.train(was_training)
    return torch.cat(found)


def accuracy(gaps: Tensor) -> float:
    """The share of pairs (N,) that are told right; a tie is half right."""
    return float((gaps > 0).double().mean() + (gaps == 0).double().mean() / 2)


def calibration(gaps: Tensor, bins: int) -> list[dict[str, float]]:
    """For `bins` equal ranges of confidence, sigmoid(|gap|) from a half to one: what was said, how often it was right, and of how many."""
    said, right = torch.sigmoid(gaps.abs()), (gaps > 0).double()
    place = ((said - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [
        {"said": float(said[inside].mean()), "right": float(right[inside].mean()), "pairs": int(inside.sum())}
        for index in range(bins)
        if (inside := place == index).any()
    ]


def save_reward(model: RewardModel, folder: Path, eot: int) -> None:
    """config.json and model.safetensors, as transformers has a classifier with one label."""
    config: dict[str, Any] = config_of(model.trunk, eot)
    kind = config["architectures"][0]
    for old, new in HEADLESS.items():
        kind = kind.replace(old, new)
    config |= {"architectures": [kind], "id2label": {"0": "reward"}, "label2id": {"reward": 0}, "pad_token_id": eot}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(folder / WEIGHTS, export_state(model.trunk) | {HEAD: model.score.weight.detach()})


def load_reward(folder: Path) -> RewardModel:
    """The reward model in a folder, frozen and in evaluation mode. Raises BundleError for another kind of model."""
    tensors = read_tensors(folder)
    if HEAD not in tensors:
        raise BundleError(f"{folder} has no {HEAD}, so it is no reward model; name a bundle that the method reward made")
    trunk = from_config(read_config(folder))
    head = tensors.pop(HEAD)
    import_state(trunk, tensors)
    model = reward_model(trunk)
    model.score.weight.data.copy_(head)
    return model.requires_grad_(False).eval()
