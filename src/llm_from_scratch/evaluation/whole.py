"""A bundle that writes, opened as one plain model: what an adapter adds is put into the model that it was trained beside.

Serving has no need of it, since what is served is whole already. Whoever holds versions of every kind side by side does.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import nn

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.finetune import lora, qlora
from llm_from_scratch.inference.packed import MARKS
from llm_from_scratch.inference.quantize import load_bundle
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.tokenizer import Tokenizer


def open_whole(folder: Path, base: Path | None = None) -> tuple[Rung, Tokenizer]:
    """The model in `folder` and its tokenizer; an adapter's is merged with its `base`, in plain weights.

    Raises BundleError where a bundle is damaged or the base another one, and ValueError for an adapter without a base.
    """
    manifest = bundle.verify(folder, "model", "quantized", "adapter")
    if manifest.kind != "adapter":
        return cast(Rung, load_bundle(folder)), tokenizer.load(folder)
    if base is None:
        raise ValueError(f"{folder} holds an adapter, which says nothing alone; name the folder of its base too")
    bundle.require_parent(manifest, "base", bundle.verify(base, "model", "quantized"))
    beside = load_bundle(base)
    assert isinstance(beside, nn.Module), "an adapter is never trained beside an n-gram"
    packed = any(getattr(beside, mark, False) for mark in MARKS.values())
    attached = lora.load_adapter(beside, folder)
    return (qlora.merge if packed else lora.merge)(attached), tokenizer.load(folder)
