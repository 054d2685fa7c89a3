"""How large a vocabulary? The same model by the same minutes of training on the same text, in tokens of different sizes.

    python -m benchmarks.vocabulary

A row that a table of the same settings has already is kept, so the sweep can be made in parts: --sizes 0 261, then --sizes 1024.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import table
from llm_from_scratch import bundle
from llm_from_scratch.data.documents import Split, read_documents
from llm_from_scratch.data.shards import Shards, open_shards, write_shards
from llm_from_scratch.evaluation.likelihood import Likelihood, score
from llm_from_scratch.model import registry
from llm_from_scratch.tokenizer import SPECIAL, Tokenizer
from llm_from_scratch.tokenizer.bpe import BYTE_ORDER, train_bpe
from llm_from_scratch.tokenizer.char import train_char
from llm_from_scratch.training.batches import windows
from llm_from_scratch.training.loop import fit, next_token
from llm_from_scratch.training.plan import TrainParams
from stages.__main__ import read_yaml

ROOT = Path(__file__).parent.parent
TRIAL = 20  # steps by which the time of a step is measured
NOTES = [
    "Size 0 stands for characters, 261 for plain bytes (256 and the five special tokens); the others are byte pairs learned from the "
    "training documents.",
    "Each is the rung gpt_bpe of params.yaml with another vocabulary: same width, depth, context in tokens, batch and rates. How many "
    "steps fit into the time is measured on the first few, of a model that is thrown away; `seconds` is what the run then took.",
    "Bits per byte are over the same held-out bytes, every one of them: an end of text is put before the first document, so that its first "
    "token is predicted too. Characters never seen in training cost their bytes in a BPE; as characters they are in the alphabet, which "
    "is of all documents.",
    "A longer token shows a model more text per window and per step, but each is harder to predict, seen less often, and has its own row "
    "to learn: the best size is where the two meet, and moves up with more training and more text.",
    "One seed a size, so differences below about 0.02 mean nothing.",
]


@dataclass(frozen=True)
class Budget:
    """What every size gets."""

    seconds: float
    seed: int
    texts: dict[Split, list[str]]
    plan: TrainParams


def main() -> None:
    arguments = parser().parse_args()
    budget = toy() if arguments.quick else real(arguments)
    settings = {
        "seconds": budget.seconds,
        "seed": budget.seed,
        "held_out_bytes": sum(len(text.encode()) for text in budget.texts["validation"]),
        "training_bytes": sum(len(text.encode()) for text in budget.texts["train"]),
        "context": budget.plan.context,
        "batch": budget.plan.batch,
        "width": budget.plan.model.width,
        "layers": budget.plan.model.layers,
    }
    rows = {row["size"]: row for row in earlier(arguments.out, settings)}
    for size in [0, 261, 280] if arguments.quick else arguments.sizes:
        if size not in rows:
            rows[size] = measured(size, budget)
            table.write(arguments.out, "vocabulary", "Vocabulary size at equal training time", ordered(rows), settings, NOTES)


def parser() -> argparse.ArgumentParser:
    made = table.parser("Train one small GPT a vocabulary size for the same time, and score all on the same held-out bytes.")
    made.add_argument(
        "--corpus", type=Path, default=Path("artifacts/raw/shakespeare"), help="a corpus folder, as dvc repro download leaves it"
    )
    made.add_argument("--sizes", type=int, nargs="+", default=[0, 261, 512, 1024, 2048, 4096], help="tokens in all; 0: characters")
    made.add_argument("--seconds", type=float, default=40.0, help="training time of each")
    made.add_argument("--seed", type=int, default=1)
    return made


def real(arguments: Any) -> Budget:
    """The corpus and the rung that params.yaml describes. One line where the corpus is not there."""
    try:
        splits: tuple[Split, Split] = ("train", "validation")
        texts = {split: [document.text for document in read_documents(arguments.corpus, split)] for split in splits}
    except ValueError as error:
        raise SystemExit(f"benchmarks.vocabulary: {error}") from None
    tree: Any = read_yaml(ROOT / "params.yaml")
    return Budget(arguments.seconds, arguments.seed, texts, TrainParams.model_validate(tree["train"]["gpt_bpe"]))


def toy() -> Budget:
    topics = [text for text in pydoc_data.topics.topics.values() if len(text) < 2000]
    tree: Any = read_yaml(ROOT / "params.yaml")
    small = {"context": 32, "model": tree["train"]["gpt_bpe"]["model"] | {"context": 32, "width": 32, "layers": 1, "heads": 2}}
    plan = TrainParams.model_validate(tree["train"]["gpt_bpe"] | small)
    return Budget(0.5, 1, {"train": topics[5:30], "validation": topics[:3]}, plan)


def measured(size: int, budget: Budget) -> dict[str, Any]:
    """One size: learn the vocabulary, encode, train, score."""
    made = tokenizer_of(size, budget.texts)
    with tempfile.TemporaryDirectory() as scratch:
        shards = encoded(made, budget.texts, Path(scratch) / "tokens")
        trained, steps, seconds = learn(made, shards, budget)
        found = held_out(trained, made, shards, budget.plan)
        tokens = len(shards.val)
    assert found.bytes == sum(len(text.encode()) for text in budget.texts["validation"])
    return {
        "size": size,
        "vocabulary": made.vocab_size,
        "bytes a token": found.bytes / tokens,
        "parameters": registry.parameters(trained),
        "steps": steps,
        "seconds": seconds,
        "MB seen": steps * budget.plan.batch * budget.plan.context * found.bytes / tokens / 1e6,
        "nats a token": found.val_loss,
        "bits a byte": found.val_bpb,
    }


def tokenizer_of(size: int, texts: dict[Split, list[str]]) -> Tokenizer:
    if size == 0:
        return train_char([*texts["train"], *texts["validation"]])
    assert size >= len(BYTE_ORDER) + len(SPECIAL)
    return train_bpe(texts["train"], size)


def encoded(made: Tokenizer, texts: dict[Split, list[str]], folder: Path) -> Shards:
    with bundle.writing(folder) as partial:
        facts = write_shards(partial, texts, made.encode_batch, made.eot, made.vocab_size)
        bundle.seal(partial, "tokens", "benchmarks.vocabulary", **facts)
    return open_shards(folder)


def learn(made: Tokenizer, shards: Shards, budget: Budget) -> tuple[torch.nn.Module, int, float]:
    """A model trained for about the seconds of the budget; its steps and the seconds they took."""
    batches = windows(shards.train, budget.plan.context, budget.plan.batch, budget.seed)

    def run(steps: int) -> tuple[torch.nn.Module, float]:
        torch.manual_seed(budget.seed)
        model = registry.build(budget.plan.model, made.vocab_size)
        warmup = min(budget.plan.warmup_steps, steps // 5)
        changes = {"seed": budget.seed, "steps": steps, "warmup_steps": warmup, "evaluate_every": steps, "checkpoint_every": steps}
        plan = TrainParams.model_validate(budget.plan.model_dump() | changes)
        return model, fit(model, batches, next_token, plan).seconds

    run(2)
    step = run(TRIAL)[1] / TRIAL
    steps = max(TRIAL, round(budget.seconds / step))
    model, seconds = run(steps)
    return model, steps, seconds


def held_out(model: torch.nn.Module, made: Tokenizer, shards: Shards, plan: TrainParams) -> Likelihood:
    ids = np.concatenate([[made.eot], shards.val])
    return score(model, ids, made.token_bytes(), plan.context, batch=64)


def earlier(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table that is there already, if its settings are the same."""
    path = out / "vocabulary.json"
    if not path.is_file():
        return []
    facts = json.loads(path.read_text(encoding="utf-8"))
    return facts["rows"] if facts["settings"] == settings else []


def ordered(rows: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[size] for size in sorted(rows)]


if __name__ == "__main__":
    main()
