"""The one ruler: how many bits a byte of held-out text costs a model that has to predict it.

Loss and perplexity count in tokens, so they compare only models with one tokenizer; bits per byte compares them all. It says how well a
model predicts, not whether what it writes is true.

Shapes: N tokens, B windows at once, T context, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from llm_from_scratch.model.ngram import NGram

Progress = Callable[[Sequence[int]], Iterable[int]]
"""Goes through the batches as they are scored: tqdm, say."""


@dataclass(frozen=True)
class Likelihood:
    """The cost of a text: `nats` over `tokens`, which spell `bytes`."""

    nats: float
    tokens: int
    bytes: int

    @property
    def val_loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def val_bpb(self) -> float:
        """Bits per byte."""
        return self.nats / math.log(2) / self.bytes

    @property
    def val_ppl(self) -> float:
        """Perplexity: among how many equally likely tokens the model is choosing."""
        return math.exp(self.val_loss)

    def metrics(self) -> dict[str, float]:
        return {"val_loss": self.val_loss, "val_bpb": self.val_bpb, "val_ppl": self.val_ppl}


def silent(batches: Sequence[int]) -> Iterable[int]:
    """The default progress shows none."""
    return batches


def score(
    model: nn.Module | NGram, ids: np.ndarray, token_bytes: np.ndarray, context: int, batch: int = 8, progress: Progress = silent
) -> Likelihood:
    """What `ids` (N,) cost, each token but the first scored once; `token_bytes` (V,) says how many bytes each spells.

    The end of a document is a token that spells nothing: it costs nats and adds no byte. `context` and `batch` are for neural rungs;
    see `token_nats`. Raises ValueError where the tokens do not fit the model or spell no byte.
    """
    _require_fitting(model, ids, token_bytes)
    spelled = int(token_bytes[ids[1:]].sum())
    if spelled == 0:
        raise ValueError(f"the {len(ids)} held-out tokens spell no byte, so no bits per byte; hold out more text")
    nats = token_nats(model, ids, context, batch, progress) if isinstance(model, nn.Module) else model.token_nats(ids)[1:]
    return Likelihood(math.fsum(nats), len(ids) - 1, spelled)


def token_nats(model: nn.Module, ids: np.ndarray, context: int, batch: int = 8, progress: Progress = silent) -> np.ndarray:
    """(N - 1,) float64: what each token of `ids` (N,) after the first costs, given up to `context` tokens before it.

    Windows overlap by half, and each scores what no window before it did: past the first `context`, every token has at least half a
    context before it. Raises ValueError where the model cannot see that far.
    """
    if context > (longest := int(getattr(model, "context", context))):
        raise ValueError(f"cannot score with a context of {context}: {type(model).__name__} sees {longest} tokens; lower context")
    length = min(context, len(ids) - 1)
    starts, fresh = _windows(len(ids) - 1, length)
    nats = np.full(len(ids) - 1, np.nan)
    training = model.training
    model.eval()
    for first in progress(range(0, len(starts), batch)):
        places = starts[first : first + batch, None] + np.arange(length)
        new = places >= fresh[first : first + batch, None]
        nats[places[new]] = _costs(model, ids[places], ids[places + 1], new)
    model.train(training)
    return nats


def _windows(places: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each window starts and the first place it scores. The last is pushed back to be as long as the others."""
    stride = max(1, length // 2)
    starts = np.minimum(np.arange(0, places - length + stride, stride), places - length)
    return starts, np.concatenate([[0], starts[:-1] + length])


@torch.no_grad()
def _costs(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Nats of the targets (B, T) where `new` (B, T), in one row."""
    device = next(model.parameters()).device
    logits: Tensor = model(torch.from_numpy(inputs.astype(np.int64)).to(device))
    wanted = torch.from_numpy(targets[new].astype(np.int64)).to(device)
    chosen = logits[torch.from_numpy(new).to(device)].float()
    return F.cross_entropy(chosen, wanted, reduction="none").double().cpu().numpy()


def _require_fitting(model: nn.Module | NGram, ids: np.ndarray, token_bytes: np.ndarray) -> None:
    vocab_size = model.vocab_size
    assert isinstance(vocab_size, int)
    if vocab_size != (known := len(token_bytes)):
        raise ValueError(f"the model has {vocab_size} tokens, the tokenizer {known}; score a model with the tokenizer of its own bundle")
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} held-out tokens, wanted at least 2; hold out more text or raise evaluate_tokens")
    if (highest := int(ids.max())) >= vocab_size:
        raise ValueError(f"token {highest} is outside the model's vocabulary of {vocab_size}; tokenize the text again with its tokenizer")
