"""GPT-2 and a Llama-shaped model of its size by the profile `gpu`, for equal time on one card: who is ahead, and how busy is the card?"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import table
from llm_from_scratch import config, progress
from llm_from_scratch.data import streams
from llm_from_scratch.data.shards import Ids, write_shards
from llm_from_scratch.data.workers import across_processes
from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.evaluation.multiple_choice import multiple_choice, read_problems
from llm_from_scratch.evaluation.speed import flops_per_token, mfu, peak_flops, peak_memory_mb
from llm_from_scratch.inference.sampling import Sampling, generate
from llm_from_scratch.model.registry import build, parameters
from llm_from_scratch.tokenizer import BpeTokenizer, read_gpt2
from llm_from_scratch.tokenizer.bpe import train_bpe
from llm_from_scratch.training.batches import windows
from llm_from_scratch.training.loop import Fitted, fit, next_token
from llm_from_scratch.training.plan import TrainParams
from stages.__main__ import read_yaml

ROOT = Path(__file__).parent.parent
MODELS = {"gpt2": ("gpt_bpe", "GPT-2, AdamW"), "llama": ("base", "Llama-shaped, Muon")}
CALIBRATION = 60  # steps, of which the last 20 are timed: compiling is over by then
GLANCE = 200_000  # held-out tokens behind a point of the curve
VOCABULARY = 32_768
PROMPT, SAMPLE = 32, Sampling(temperature=0.8, top_p=0.95, max_tokens=500, seed=1)
TOY: dict[str, Any] = {
    "context": 32, "batch": 4, "micro_batch": 2, "warmup_steps": 2, "precision": "fp32", "compile": False, "evaluate_every": 4,
    "evaluate_tokens": 2_000,
}  # fmt: skip
TOY_MODEL = {"context": 32, "width": 32, "layers": 2, "heads": 2}
TOY_STEPS = 8


@dataclass(frozen=True)
class Corpus:
    """The same text for both models: ids of each split, their tokenizer, and what there is to say of it."""

    train: Ids
    val: Ids
    words: BpeTokenizer
    facts: dict[str, Any]


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument(
        "--text", type=Path, help="a text file, or a folder of .txt, .md, .jsonl(.zst) and .parquet; the README with --quick"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help=f"the folder of GPT-2's vocab.bpe and encoder.json; else {VOCABULARY:,} byte pairs of --text"
    )
    parser.add_argument("--hellaswag", type=Path, help="HellaSwag's validation file; else it is left out")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each model")
    parser.add_argument("--validation", type=float, default=0.02, help="the share of documents held out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=MODELS, help="train this one; with --parts, the other in another run")
    parser.add_argument(
        "--parts", type=Path, help="keep each model's result here, and take it from here where it is: a card may be lent for minutes"
    )
    arguments = parser.parse_args()
    if arguments.quick and arguments.text is None:
        arguments.text = ROOT / "README.md"
    with tempfile.TemporaryDirectory() as work:
        parts = arguments.parts or Path(work)
        parts.mkdir(parents=True, exist_ok=True)
        wanted = [arguments.only] if arguments.only else list(MODELS)
        if any(not (parts / f"{name}.json").exists() for name in wanted):
            if not arguments.quick and not torch.cuda.is_available():
                parser.error("no CUDA card here, and two models of 124 M need one; --quick shows at toy size that it runs")
            if arguments.text is None:
                parser.error("--text: found nothing, wanted a file or folder of text to train on")
            text = cache(partial(prepared, arguments, Path(work)))
            for name in wanted:
                if not (path := parts / f"{name}.json").exists():
                    path.write_text(json.dumps(trained(name, text(), arguments), indent=2) + "\n", encoding="utf-8")
        if missing := [name for name in MODELS if not (parts / f"{name}.json").exists()]:
            print(f"no table yet: {', '.join(missing)} is to come, with --only {missing[0]} and the same --parts")
            return
        report(arguments.out, {name: json.loads((parts / f"{name}.json").read_text(encoding="utf-8")) for name in MODELS})


def prepared(arguments: argparse.Namespace, folder: Path) -> Corpus:
    """The text in tokens, its held-out share apart."""
    share = 0.3 if arguments.quick else arguments.validation

    def texts(split: str) -> Any:
        found = streams.folder_documents(arguments.text, share)
        return (document.text for document in progress.bar(found, desc=split, unit=" documents") if document.split == split)

    learned = 300 if arguments.quick else VOCABULARY
    words = read_gpt2(arguments.tokenizer) if arguments.tokenizer else train_bpe(texts("train"), learned)
    run = partial(across_processes, processes=os.cpu_count() or 1)
    split_texts = {split: texts(split) for split in ("train", "validation")}
    facts = write_shards(folder, split_texts, words.encode_batch, words.eot, words.vocab_size, run)
    train, val = (np.memmap(folder / f"{name}.bin", facts["dtype"], "r") for name in ("train", "val"))
    said = {
        "text": arguments.text.name,
        "sha256": streams.tree_digest(arguments.text),
        "train bytes": facts["train_bytes"],
        "train tokens": len(train),
        "held-out tokens": len(val),
        "tokenizer": "GPT-2's" if arguments.tokenizer else "byte pairs of the text",
        "vocabulary": words.vocab_size,
    }
    return Corpus(train, val, words, said)


def trained(name: str, corpus: Corpus, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model, trained for its minutes and measured; plain JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rung = planned(MODELS[name][0], arguments.seed, arguments.quick)
    tokens = rung.batch * rung.context
    steps = TOY_STEPS
    if not arguments.quick:
        rate = learned(rung, corpus, CALIBRATION, device, looks=False)[1].curve[-1]["tok_per_s"]
        steps = round(60 * arguments.minutes * rate / tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model, fitted = learned(rung, corpus, steps, device, looks=True)
    memory = peak_memory_mb(device)
    speed = median([row["tok_per_s"] for row in fitted.curve[1:]] or [fitted.tok_per_s])
    found = score(
        model, corpus.val[: rung.evaluate_tokens], corpus.words.token_bytes(), rung.context, 16, partial(progress.bar, desc="score")
    )
    flops, peak = flops_per_token(model, rung.context), peak_flops(device)
    row = {
        "model": MODELS[name][1],
        "parameters": parameters(model),
        "steps": fitted.tokens // tokens,
        "tokens": fitted.tokens,
        "training minutes": fitted.seconds / 60,
        "tokens/s": speed,
        "MFU": mfu(speed, flops, peak),
        "peak memory, GB": memory / 1000,
        **found.metrics(),
        **hellaswag(model, corpus.words, arguments),
    }
    said = {"flops a token": flops, "peak FLOP/s": peak, "device": device_name(device), "plan": rung.model_dump() | {"steps": steps}}
    return {"row": row, "settings": corpus.facts | said, "curve": fitted.curve, "sample": sample(model, corpus), "machine": table.machine()}


def learned(rung: TrainParams, corpus: Corpus, steps: int, device: torch.device, looks: bool) -> tuple[nn.Module, Fitted]:
    """A fresh model after that many steps of its plan, and what it took; `looks` at held-out text on the way."""
    torch.manual_seed(rung.seed)
    model = build(rung.model, corpus.words.vocab_size)
    plan = rung.model_copy(update={"steps": steps, "warmup_steps": min(rung.warmup_steps, steps)})
    batches = windows(corpus.train, rung.context, rung.batch, rung.seed)

    def glance(model: nn.Module) -> Mapping[str, float]:
        return score(model, corpus.val[:GLANCE], corpus.words.token_bytes(), rung.context, 16).metrics()

    return model, fit(model, batches, next_token, plan, evaluate=glance if looks else None, device=str(device), progress=True)


def planned(entry: str, seed: int, quick: bool) -> TrainParams:
    """An entry of params.yaml under the profile `gpu`; at toy size, the same shape."""
    tree = laid(read_yaml(ROOT / "params.yaml"), read_yaml(ROOT / "profiles/gpu.yaml"))
    rung = config.parse(tree, "profiles/gpu.yaml").train[entry]
    assert isinstance(rung, TrainParams)
    if quick:
        small = TOY_MODEL | ({"kv_heads": 2, "hidden": 64} if rung.model.architecture == "llama" else {})
        rung = rung.model_copy(update=TOY | {"model": rung.model.model_copy(update=small)})
    return rung.model_copy(update={"seed": seed})


def laid(under: Any, over: Any) -> Any:
    """An overlay on what lies under it."""
    return under | {key: laid(under.get(key), value) for key, value in over.items()} if isinstance(over, dict) else over


def hellaswag(model: nn.Module, words: BpeTokenizer, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.hellaswag is None:
        return {}
    problems = read_problems(arguments.hellaswag)
    with progress.bar(desc="hellaswag", total=len(problems)) as bar:
        found = multiple_choice(model, words, problems, arguments.seed, progress=bar.update)
    low, high = found["accuracy_norm_low"], found["accuracy_norm_high"]
    return {
        f"HellaSwag accuracy, {len(problems):,} questions": found["accuracy"],
        "accuracy_norm": found["accuracy_norm"],
        "95% of it": f"{low:.3f} to {high:.3f}",
    }


def sample(model: nn.Module, corpus: Corpus) -> str:
    """What the model makes of the beginning of the held-out text."""
    prompt = corpus.val[:PROMPT].tolist()
    wanted = SAMPLE if len(corpus.val) > GLANCE else Sampling(temperature=0.8, max_tokens=20, seed=1)
    return corpus.words.decode(prompt) + "⟨…⟩" + corpus.words.decode(list(generate(model, prompt, wanted, corpus.words.eot)))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def report(out: Path, parts: Mapping[str, dict[str, Any]]) -> None:
    """gpu_pretraining.json and .md, the curves beside them, and the samples."""
    rows = [part["row"] for part in parts.values()]
    gpt2, llama = (part["row"]["val_bpb"] for part in parts.values())
    ahead = f"{abs(gpt2 - llama):.4f} bits a byte {'ahead of' if llama < gpt2 else 'behind'}"
    shared = {key: value for key, value in parts["gpt2"]["settings"].items() if key not in ("plan", "flops a token")}
    plans = {f"plan of {name}": part["settings"]["plan"] for name, part in parts.items()}
    table.write(
        out,
        "gpu_pretraining",
        "GPT-2 with AdamW and a Llama-shaped model with Muon, of one size and for one time",
        rows,
        shared | {"trained on": parts["gpt2"]["machine"]} | plans,
        [
            f"The Llama-shaped model is {ahead} GPT-2 at equal time. One seed each, rates not tuned.",
            "Training minutes are those of the steps, with the loader and what torch.compile takes in the first of them; tokens/s is the "
            "median of the curve's rows without the first. How many steps fit was timed beforehand, on a model that was thrown away.",
            "MFU: (6 · parameters that are multiplied + 12 · layers · context · width) operations a token · tokens/s, over the card's "
            "dense bf16 by its data sheet (on a CPU, over the fastest fp32 product of two matrices of 1,024).",
            "val_bpb is over the bytes of the held-out documents, each token scored once with at least half a context before it.",
            "HellaSwag: accuracy by the sum of an ending's log probabilities, accuracy_norm by the sum over its bytes; chance is 0.25.",
        ],
    )
    curves = {name: part["curve"] for name, part in parts.items()}
    (out / "gpu_pretraining_curves.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    samples = "\n\n".join(f"## {part['row']['model']}\n\n{part['sample']}" for part in parts.values())
    (out / "gpu_pretraining_samples.md").write_text(
        f"# After the same time: the prompt, ⟨…⟩, and what the model made of it\n\n{samples}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
