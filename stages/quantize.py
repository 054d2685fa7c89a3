"""A model becomes a smaller one: read, quantize, write, and measure what was written against what it was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial as with_arguments
from pathlib import Path

from torch import nn

from llm_from_scratch import bundle, progress, tokenizer, tracking
from llm_from_scratch.config import Params
from llm_from_scratch.data.shards import Ids, open_shards
from llm_from_scratch.evaluation.compare import compare
from llm_from_scratch.evaluation.latency import batch_latency, latency, prefill
from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.evaluation.speed import resident_mb, size_mb
from llm_from_scratch.inference.decoding import context_of
from llm_from_scratch.inference.quantize import QuantizeParams, linear_mb, load_bundle, quantize, quantized_layers, save_quantized
from llm_from_scratch.inference.sampling import Sampling, generate
from llm_from_scratch.model import registry
from llm_from_scratch.tokenizer import Tokenizer

PROMPT = 16
BATCH = 8
REQUESTS = 16  # answered in step, for the latency under load
SAMPLE = Sampling(temperature=0.8, max_tokens=120, seed=1)  # the same draws for both, so what differs is the quantization's doing

EIGHT_BITS = "in int8, row by row (LLM.int8()'s tensors); embedding and head are as they were. "
HOW = {
    "bf16": "in bfloat16, and so is all the rest. Loading widens them to float32: the file is smaller, the model in memory is not.",
    "int8": EIGHT_BITS + "bitsandbytes multiplies by them.",
    "int8_dynamic": EIGHT_BITS
    + "Here the MLPs' are multiplied by activations rounded token by token (kernel `int8.Dynamic`), attention's by activations in "
    "bfloat16 (`int8.WeightOnly`), in an engine in float32 where tokens are few; `transformers` runs them as LLM.int8(), so its logits are "
    "near these, not equal.",
    "int8_weight": EIGHT_BITS
    + "Here they are multiplied by activations in bfloat16 (kernel `int8.WeightOnly`), in an engine in float32 where tokens are few; "
    "`transformers` runs them as LLM.int8(), so its logits are near these, not equal.",
    "nf4": "in nf4 with double quantization (bitsandbytes); embedding and head are as they were.",
}
CARD = """\
# {name}

`{model}` with the {layers} linear layers of its blocks {how}

Load it with `llm_from_scratch.inference.engine.Engine.open(folder)`, or with `transformers.AutoModelForCausalLM.from_pretrained(folder)`.
What it is good for and what it is not stands in the card of `{model}`. What it was made from is in `manifest.json`.
"""


@dataclass(frozen=True)
class Ruler:
    """What both models are measured with: held-out ids, the tokenizer that spells them, and how much a window shows."""

    held_out: Ids
    words: Tokenizer
    context: int


def run(params: Params, name: str, root: Path) -> None:
    """The folder that was written is opened again and measured, not the model in memory."""
    entry = params.quantize[name]
    sources = [f"artifacts/models/{entry.model}", f"artifacts/tokens/{entry.tokens}"]
    source, folder = root / sources[0], root / "artifacts/models" / name
    origin = bundle.verify(source, "model")
    plain = load_bundle(source)
    assert isinstance(plain, nn.Module)
    ruler = _ruler(entry, context_of(plain), source, root / sources[1])

    with bundle.writing(folder) as partial:
        small = quantize(plain, entry.scheme)
        save_quantized(small, source, partial)
        facts = {
            "architecture": type(plain).__name__.lower(),
            "parameters": registry.parameters(plain),
            "scheme": entry.scheme,
            "replaced_layers": len(quantized_layers(small)),
            "tokenizer_digest": tokenizer.digest(partial),
        }
        card = CARD.format(name=name, model=entry.model, layers=facts["replaced_layers"], how=HOW[entry.scheme])
        (partial / "README.md").write_text(card, encoding="utf-8")
        bundle.seal(partial, "quantized", f"quantize@{name}", {"model": origin.digest}, **facts)

    written = load_bundle(folder)
    assert isinstance(written, nn.Module)
    with tracking.stage_run("quantize", name, entry.model_dump(), sources) as log:
        metrics = measure(plain, written, ruler, params)
        metrics |= {"size_mb": round(size_mb(folder), 4), "size_mb_fp32": round(size_mb(source), 4)}
        log(0, metrics)

    with bundle.writing(root / "artifacts/logs/quantize" / name) as partial:
        (partial / "metrics.json").write_text(json.dumps({"model": entry.model, **metrics, **facts}, indent=2) + "\n", encoding="utf-8")
        samples = [f"{title}:\n{sample(model, ruler)}\n" for title, model in ((entry.model, plain), (name, written))]
        (partial / "sample.txt").write_text("\n".join(samples), encoding="utf-8")


def measure(plain: nn.Module, small: nn.Module, ruler: Ruler, params: Params) -> dict[str, float]:
    """What quantizing gained in room and time, and what it cost in likelihood. Names ending in _fp32 are of the model before."""
    metrics: dict[str, float] = {}
    for ending, model in (("_fp32", plain), ("", small)):
        bar = with_arguments(progress.bar, desc=f"score{ending}")
        found = score(model, ruler.held_out, ruler.words.token_bytes(), ruler.context, BATCH, bar)
        row = found.metrics() | timed(model, ruler, params) | {"resident_mb": round(resident_mb(model), 4)}
        metrics |= {key + ending: value for key, value in row.items()}
    agreement = compare(plain, small, ruler.held_out[: params.evaluate.kl_tokens], ruler.context, BATCH)
    packed, unpacked = linear_mb(small)
    return metrics | {"kl": agreement.kl, "top1": agreement.top1, "linear_mb": round(packed, 4), "linear_mb_fp32": round(unpacked, 4)}


def timed(model: nn.Module, ruler: Ruler, params: Params) -> dict[str, float]:
    """A token for one request and for several in step, and a whole context read at once."""
    prompt, tokens, repeats = ruler.held_out[:PROMPT].tolist(), params.evaluate.latency_tokens, params.evaluate.latency_repeats
    one = latency(model, prompt, tokens, repeats)
    several = batch_latency(model, prompt, min(tokens, ruler.context - PROMPT), repeats, REQUESTS)
    return {
        "p50_ms": round(one.p50_ms, 3),
        "tok_per_s": round(one.tok_per_s, 1),
        f"p50_ms_batch{REQUESTS}": round(several.p50_ms, 3),
        f"tok_per_s_batch{REQUESTS}": round(several.tok_per_s, 1),
        "prefill_tok_per_s": round(prefill(model, ruler.held_out[: ruler.context].tolist(), repeats), 1),
    }


def sample(model: nn.Module, ruler: Ruler) -> str:
    """The beginning of the held-out text and what the model makes of it."""
    prompt = ruler.held_out[:PROMPT].tolist()
    return ruler.words.decode(prompt + list(generate(model, prompt, SAMPLE, ruler.words.eot)))


def _ruler(entry: QuantizeParams, context: int, source: Path, tokens: Path) -> Ruler:
    """Raises ValueError where `tokens` are of another tokenizer than the model's."""
    made_by = bundle.verify(tokens, "tokens").made_by
    if tokenizer.digest(source) != tokenizer.digest(tokens):
        raise ValueError(f"{source} has another tokenizer than {tokens}, which {made_by} made; dvc repro rebuilds what is stale")
    return Ruler(open_shards(tokens).val[: entry.evaluate_tokens or None], tokenizer.load(tokens), context)
