"""Drafting: an 8-bit copy of the model writes some tokens ahead, and the model checks all of them in little more than the time of one.

A token for one request is bound by reading every weight once; several tokens of one text read them once for all. The copy reads a quarter
of the bytes, and as it is the same model but for a rounding, nearly all that it writes is right. Both share one cache: what the copy puts
there is written over when the model reads the same tokens (Leviathan et al. 2023; with a quantization as the draft: Zhao et al. 2024,
QSpec). A draft draws with the numbers that the request would draw with next, so seeded texts are guessed as well as greedy ones.

It pays where the weights do not fit into the caches of the processor (benchmarks/open_model.py says by how much). With more tokens ahead, a
wrong one spoils more work; the newest and three guesses are one tile for the kernels. It costs a quarter of the model's memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from llm_from_scratch.inference.decoding import choosing
from llm_from_scratch.inference.forward import forward_of
from llm_from_scratch.inference.kv_cache import SlotCache
from llm_from_scratch.inference.quantize import quantize
from llm_from_scratch.inference.sampling import Sampling, pick
from llm_from_scratch.model.llama import Llama


class Draft:
    """Guesses for the texts in `cache`, which is the model's own. Raises ValueError for what is no plain llama."""

    def __init__(self, model: nn.Module, cache: SlotCache) -> None:
        if type(model) is not Llama:
            raise ValueError(f"batching.draft: a {type(model).__name__} has no 8-bit copy that is quicker; 0 is off")
        copy = quantize(model, "int8_weight")
        assert isinstance(copy, Llama)
        copy.model.embed_tokens = model.model.embed_tokens
        self._model, self._cache, self._forward = copy, cache, forward_of(copy)

    def guess(
        self, slot: int, ids: Sequence[int], prompt: int, sampling: Sampling, generator: torch.Generator, ends: Collection[int], most: int
    ) -> list[int]:
        """Up to `most` tokens after `ids`, the first `prompt` of which were not generated; none that ends the text.

        All of `ids` but the last are in the `slot`, which stays as long as it was, and `generator` stays where it was.
        """
        ahead = torch.Generator().set_state(generator.get_state())
        said, length = list(ids), self._cache.lengths[slot]
        for _ in range(most):
            rows = self._cache.rows(slot, 1, 1, [slot])
            logits = self._forward(torch.tensor([said[-1:]], device=self._cache.device), rows, False)[0, -1]
            with choosing(logits):
                token = pick(logits, sampling, ahead, said, prompt)
            if token in ends:
                break
            said.append(token)
        self._cache.lengths[slot] = length
        return said[len(ids) :]
