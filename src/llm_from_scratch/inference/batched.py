"""Many texts at once, drawn from prompts of one length: what rollouts and best-of-n need, and nothing waits for anybody.

Each prompt is read once and remembered (`KVCache`), and a step adds one token to every text. Prompts of other lengths go in a batch of
their own (`by_length`), so nothing is padded on the left and no position is off.

Shapes: B texts, P prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from llm_from_scratch.inference.decoding import context_of, evaluating
from llm_from_scratch.inference.kv_cache import KVCache


@torch.inference_mode()
def draw(
    model: nn.Module, prompts: Tensor, new: int, ends: Collection[int], generator: torch.Generator, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(ids, drawn), each (B, N): what follows prompts (B, P), and where it was drawn; behind one of `ends`, rows repeat it undrawn.

    The end itself counts as drawn. `temperature` 0 takes the likeliest token. Raises ValueError where the context has no room for `new`.
    """
    rows, length = prompts.shape
    if length + new > (context := context_of(model)):
        raise ValueError(f"{length} prompt tokens and {new} new ones are more than the model's context of {context}; lower one of them")
    device = next(model.parameters()).device
    ids = torch.empty(rows, new, dtype=torch.long)
    drawn = torch.zeros(rows, new, dtype=torch.bool)
    ended = torch.zeros(rows, dtype=torch.bool)
    last = torch.tensor(sorted(ends))
    cache = KVCache.of(model, length + new, rows)
    step = prompts
    with evaluating(model):
        for place in range(new):
            logits: Tensor = model(step.to(device), cache)[:, -1].float().cpu()
            token = _pick(logits, temperature, generator)
            ids[:, place] = token if place == 0 else torch.where(ended, ids[:, place - 1], token)
            drawn[:, place] = ~ended
            ended |= torch.isin(ids[:, place], last)
            if ended.all():
                ids[:, place + 1 :] = ids[:, place : place + 1]
                break
            step = ids[:, place : place + 1]
    return ids, drawn


def by_length(prompts: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """The places of `prompts` in groups of equal length, at most `rows` in each; in order of length, and as they stood within one."""
    groups: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(place)
    return [same[start : start + rows] for _, same in sorted(groups.items()) for start in range(0, len(same), rows)]


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """(B, V) to (B,), each row drawn from its own distribution: where a uniform number falls in the sums of its probabilities.

    torch.multinomial does the same in more time than the model takes for its step.
    """
    if temperature == 0:
        return logits.argmax(-1)
    sums = (logits / temperature).softmax(-1).cumsum(-1)
    places = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True)[:, 0].clamp(max=logits.size(-1) - 1)
