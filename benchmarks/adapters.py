"""All weights, or a few beside them? Full fine-tuning, LoRA at three ranks and QLoRA, by the same steps on the same conversations.

python -m benchmarks.adapters
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError

from benchmarks import table
from benchmarks.apart import DEVICE, peak
from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.data.chat import question_messages, records
from llm_from_scratch.data.documents import Document, read_documents, with_splits, write_documents
from llm_from_scratch.data.questions import Question, questions
from llm_from_scratch.evaluation.compare import compare
from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.evaluation.retrieval import graded, replies
from llm_from_scratch.finetune import lora, qlora, sft
from llm_from_scratch.finetune.lora import LoraFinetuneParams
from llm_from_scratch.finetune.qlora import QloraFinetuneParams
from llm_from_scratch.finetune.sft import Examples, SftParams, answer_loss, encode_records
from llm_from_scratch.inference.quantize import load_bundle, quantize, save_quantized
from llm_from_scratch.model import registry
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.retrieval.rag import fit_passages
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.tokenizer.bpe import train_bpe
from llm_from_scratch.tokenizer.chat import render
from llm_from_scratch.training.loop import fit
from stages.__main__ import read_yaml

ROOT = Path(__file__).parent.parent
Entry = SftParams | LoraFinetuneParams | QloraFinetuneParams
PARSE: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="method")])
METHODS: dict[str, Callable[[Rung, Examples, Any], sft.Job]] = {"sft": sft.job, "lora": lora.job, "qlora": qlora.job}
EQUAL = ("records", "context", "batch", "steps")
CHOICES, ANSWER_TOKENS = 4, 24
NOTES = [
    "Every row starts from `base` (QLoRA from the same weights in nf4) and takes the same steps on the same records in the same order; "
    "`gain` is how much of full fine-tuning's fall in answer loss it has. Optimizer and rates are each row's own, as in params.yaml.",
    "`answer loss` is nats a token of the answers to all held-out records; `accuracy` is choosing the right of four descriptions by "
    "likelihood, `F1` and `exact` are of the answer that it writes, both with the passage before the question.",
    "`text` is bits per byte of held-out text: what fine-tuning on short answers costs the model as a writer of text.",
    "Each run has a process of its own. `peak MB` is its highest resident memory in training, less what it held before the model was "
    "loaded; at this size most of that are activations, which all methods have. `kept MB` is what each must keep between steps: weights as "
    "they are stored, and gradients and moments of what is trained.",
    "`qlora, packed again` is its adapter merged into the weights and rounded to 4 bits once more, which nobody trained against.",
    "By chance `accuracy` would be 0.25, and with 400 questions it is known to about 5 points either way, so few of its differences are "
    "shown. The base has been taught to read already (week 6); what fine-tuning adds is the form of the answers, which the loss shows.",
    "Adapters need no less memory than full training at this size, but more: the detours have activations of their own.",
    "What is measured is the model with its adapter merged in float32, which gives the attached one's logits to 1e-5.",
]


@dataclass(frozen=True)
class Lesson:
    """What is learned, what of the held-out documents is answered and asked, and the held-out text."""

    train: Examples
    held_out: Examples
    asked: list[Question]
    text: np.ndarray
    words: Tokenizer


@dataclass(frozen=True)
class Run:
    """One entry with one seed."""

    entry: str
    seed: int
    trained: int
    total: int
    kept_mb: float
    peak_mb: float
    seconds: float
    loss: float
    accuracy: float
    f1: float
    exact: float
    text: float
    note: str = ""


def main() -> None:
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:
            toy(Path(scratch))
            arguments.models, arguments.corpus = Path(scratch) / "models", Path(scratch) / "corpus"
            arguments.text_tokens, arguments.questions, arguments.seeds = 500, 8, arguments.seeds[:1]
        entries = chosen(arguments)
        kept = earlier(arguments.keep)
        for seed in arguments.seeds:
            for name, entry in entries.items():
                if not any((run.entry, run.seed) == (name, seed) for run in kept):
                    told = None if entry is None else entry.model_copy(update={"seed": seed})
                    kept += apart(measured, name, told, seed, arguments)
                    keep(arguments.keep, kept)
    first = next(entry for entry in entries.values() if entry)
    settings = {
        "device": DEVICE,
        "seeds": " ".join(map(str, arguments.seeds)),
        **{name: getattr(first, name) for name in EQUAL},
        "questions": arguments.questions,
        "text_tokens": arguments.text_tokens,
        **table.packages("peft", "bitsandbytes"),
    }
    order = list(entries)
    rows = [
        row(name, entries, kept, arguments.seeds)
        for name in sorted({run.entry for run in kept}, key=lambda name: (order.index(name.split(",")[0]), name))
    ]
    said = [run.note for run in kept if run.note]
    table.write(arguments.out, "adapters", "All weights against adapters, by equal steps on equal data", rows, settings, [*NOTES, *said])


def parser() -> argparse.ArgumentParser:
    made = table.parser("Fine-tune one base fully, with LoRA at several ranks and with QLoRA, by equal steps on equal data.")
    made.add_argument("--params", type=Path, default=ROOT / "params.yaml", help="the file whose section finetune has the entries")
    made.add_argument(
        "--entries",
        nargs="+",
        default=["sft", "lora_r2", "lora", "lora_r16", "qlora"],
        help="the first is full fine-tuning; NAME_rN is NAME at rank N",
    )
    made.add_argument("--models", type=Path, default=Path("artifacts/models"), help="the folder with the bundles that they start from")
    made.add_argument("--corpus", type=Path, default=Path("artifacts/raw/wikipedia"), help="a corpus whose documents have descriptions")
    made.add_argument("--seeds", type=int, nargs="+", default=[1])
    made.add_argument("--questions", type=int, default=400)
    made.add_argument("--text-tokens", type=int, default=40_000)
    made.add_argument("--keep", type=Path, help="a file for finished runs: those in it are not made again")
    return made


def chosen(arguments: Any) -> dict[str, Entry | None]:
    """The entries by name, `base` (which learns nothing) before them. One line where they are not there or not equal."""
    tree: Any = read_yaml(arguments.params)["finetune"]
    small = {"steps": 6, "batch": 4, "context": 96, "warmup_steps": 1, "evaluate_every": 6, "checkpoint_every": 6}
    for name in arguments.entries:  # lora_r2 is the entry lora at a rank of 2
        entry, _, rank = name.rpartition("_r")
        if name not in tree and entry in tree and rank.isdigit():
            tree[name] = tree[entry] | {"lora": tree[entry]["lora"] | {"rank": int(rank)}}
    if missing := [name for name in arguments.entries if name not in tree]:
        raise SystemExit(f"benchmarks.adapters: no finetune.{missing[0]} in {arguments.params.name}; there is {', '.join(tree)}")
    try:
        entries = {name: PARSE.validate_python(tree[name] | (small if arguments.quick else {})) for name in arguments.entries}
    except ValidationError as error:
        raise SystemExit(f"benchmarks.adapters: {arguments.params.name}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
    first = entries[arguments.entries[0]]
    for name, entry in entries.items():
        if unlike := [field for field in EQUAL if getattr(entry, field) != getattr(first, field)]:
            raise SystemExit(f"benchmarks.adapters: finetune.{name}.{unlike[0]} is not that of {arguments.entries[0]}; make them equal")
    return {"base": None, **entries}


def apart(work: Callable[..., list[Run]], *given: Any) -> list[Run]:
    """`work` done in a new process, forked from one that has imported what is large and done nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["peft", "bitsandbytes", "benchmarks.apart"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *given).result()


def measured(name: str, told: Entry | None, seed: int, arguments: Any) -> list[Run]:
    """Train as `told`, or not at all, and ask. QLoRA gives a second run: the same, packed again."""
    folder = arguments.models / ("base" if told is None else told.model)
    try:
        bundle.verify(folder, "model", "quantized")
        lesson = prepare(folder, arguments, told or chosen(arguments)[arguments.entries[0]], seed)
    except ValueError as error:
        raise SystemExit(f"benchmarks.adapters: {error}") from None
    if told is None:
        base = load_bundle(folder)
        return [Run(name, seed, 0, registry.parameters(base), 0.0, 0.0, 0.0, **standing(base, lesson))]
    total = registry.parameters(load_bundle(arguments.models / "base"))
    with peak() as memory:
        memory.start()
        model = load_bundle(folder)
        assert isinstance(model, Rung)
        job = METHODS[told.method](model, lesson.train, told)
        fitted = fit(job.model, job.batches, job.loss, told, device=DEVICE)
        memory.stop()
    trained = sum(weight.numel() for weight in job.model.parameters() if weight.requires_grad)
    job.model.cpu()
    sizes = (trained, total, kept_mb(job.model, told.optimizer), memory.mib * 1.048576, fitted.seconds)
    found = Run(name, seed, *sizes, **standing(job.plain(), lesson))
    return [found, packed_again(job.model, found, lesson)] if told.method == "qlora" else [found]


def packed_again(attached: Any, found: Run, lesson: Lesson) -> Run:
    rounded = qlora.merge_quantized(attached)
    agreement = compare(qlora.merge(attached), rounded.model, lesson.text, rounded.model.context, 8)
    note = f"Packed again (seed {found.seed}): {rounded}. KL to what was trained: {agreement.kl:.2g} nats a token of held-out text."
    return Run(**asdict(found) | standing(rounded.model, lesson) | {"entry": f"{found.entry}, packed again", "note": note})


def prepare(folder: Path, arguments: Any, told: Any, seed: int) -> Lesson:
    """As the stage does it: as many training records as the steps can show, here with all the held-out ones to measure on."""
    words = tokenizer.load(folder)
    train, held_out = (list(read_documents(arguments.corpus, split)) for split in ("train", "validation"))
    learnable = records(train, seed)
    shown = random.Random(seed).sample(learnable, min(told.steps * told.batch, len(learnable)))
    text = np.concatenate([[words.eot, *ids] for ids in words.encode_batch([document.text for document in held_out])])
    return Lesson(
        encode_records(shown, words, told.context),
        encode_records(records(held_out, seed), words, told.context),
        questions(held_out, arguments.questions, CHOICES, seed),
        text[: arguments.text_tokens],
        words,
    )


def standing(model: Any, lesson: Lesson) -> dict[str, float]:
    """Where a model stands on what was held out."""
    words, end = lesson.words, lesson.words.end_of_turn
    choices = [[[*words.encode(choice), end] for choice in question.choices] for question in lesson.asked]
    room = model.context - max(ANSWER_TOKENS, *(len(ids) for offered in choices for ids in offered))
    prompts = [asked(question, words, room) for question in lesson.asked]
    marks = graded(lesson.asked, replies(model, words, prompts, choices, ANSWER_TOKENS), seed=1)
    return {
        "loss": answer_loss(model, lesson.held_out, 64),
        "accuracy": marks["accuracy"],
        "f1": marks["f1"],
        "exact": marks["exact_match"],
        "text": score(model, lesson.text, words.token_bytes(), model.context).val_bpb,
    }


def asked(question: Question, words: Tokenizer, room: int) -> list[int]:
    """The prompt with the right passage, which loses its end where there is no room."""
    passages = fit_passages(question.question, [question.passage], words, room)
    return render(question_messages(question.question, passages), words, prompt=True)[0]


def kept_mb(model: torch.nn.Module, optimizer: str) -> float:
    """Weights as stored (a tied one once), and for each trained one its gradient and moments: two for AdamW, one for Muon's matrices."""
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    state = 8 if optimizer == "muon" else 12
    return (sum(stored.values()) + sum(state * weight.numel() for weight in model.parameters() if weight.requires_grad)) / 1e6


def row(name: str, entries: dict[str, Entry | None], runs: Sequence[Run], seeds: Sequence[int]) -> dict[str, Any]:
    """The middle of each number over the seeds."""
    own = [run for run in runs if run.entry == name and run.seed in seeds]
    full = next(key for key, entry in entries.items() if entry)
    gains = [gained(run, runs) / gained(next(each for each in runs if (each.entry, each.seed) == (full, run.seed)), runs) for run in own]

    def of(field: str) -> float:
        return table.middle([getattr(run, field) for run in own])["median"]

    entry = entries.get(name)
    rank = entry.lora.rank if isinstance(entry, LoraFinetuneParams | QloraFinetuneParams) else ""
    made = [None, None, None] if entry is None else [round(of("kept_mb"), 2), round(of("peak_mb"), 1), round(of("seconds"), 1)]
    return {
        "what": name,
        "rank": rank,
        "updated": own[0].trained if entry else "",
        "of all": f"{own[0].trained / own[0].total:.1%}" if entry else "",
        **dict(zip(("kept MB", "peak MB", "seconds"), made, strict=True)),
        "answer loss": of("loss"),
        "gain": f"{table.middle(gains)['median']:.1%}",
        "accuracy": of("accuracy"),
        "F1": of("f1"),
        "exact": of("exact"),
        "text": of("text"),
    }


def gained(run: Run, runs: Sequence[Run]) -> float:
    return next(each.loss for each in runs if (each.entry, each.seed) == ("base", run.seed)) - run.loss


def earlier(path: Path | None) -> list[Run]:
    if path is None or not path.is_file():
        return []
    return [Run(**each) for each in json.loads(path.read_text(encoding="utf-8"))]


def keep(path: Path | None, runs: Sequence[Run]) -> None:
    if path is not None:
        path.write_text(json.dumps([asdict(run) for run in runs], indent=1), encoding="utf-8")


def toy(folder: Path) -> None:
    """A corpus of Python's own help and an untrained base, plain and in nf4, under the names that the entries use."""
    (folder / "corpus").mkdir()
    topics = [(title, text) for title, text in pydoc_data.topics.topics.items() if len(text) < 1500][:40]
    documents = [Document(title, title, text, description=" ".join(text.split()[:6]), topic="Python") for title, text in topics]
    write_documents(folder / "corpus" / "documents.jsonl", with_splits(documents, 0.4))
    torch.manual_seed(0)
    words = train_bpe([text for _, text in topics], 300)
    shape = LlamaParams(
        architecture="llama",
        context=256,
        width=64,
        layers=1,
        heads=2,
        kv_heads=1,
        hidden=64,
        rope_theta=10000.0,
        qk_norm=False,
        copying=0.0,
    )
    model = registry.build(shape, words.vocab_size).eval()
    with bundle.writing(folder / "models" / "base") as new:
        registry.save_model(model, new, words.eot)
        words.save(new)
        bundle.seal(new, "model", "benchmarks.adapters")
    with bundle.writing(folder / "models" / "base_nf4") as new:
        save_quantized(quantize(model, "nf4"), folder / "models" / "base", new)
        bundle.seal(new, "quantized", "benchmarks.adapters")


if __name__ == "__main__":
    main()
