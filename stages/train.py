"""Tokens become a model: read, learn by steps or by counting, score on held-out text, write."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_from_scratch import bundle, model, progress, tokenizer, tracking, training
from llm_from_scratch.config import Params
from llm_from_scratch.data.rendered import CONVERSATIONS, read_conversations
from llm_from_scratch.data.shards import Ids, Shards, open_shards
from llm_from_scratch.evaluation.likelihood import Likelihood, score
from llm_from_scratch.evaluation.speed import size_mb
from llm_from_scratch.inference.sampling import Sampling, generate
from llm_from_scratch.model import registry
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.training.batches import Pair, conversations, in_turn, shifted, windows
from llm_from_scratch.training.distributed import ONLY, Parallel, Place, together
from llm_from_scratch.training.loop import Fitted, Log, fit, next_token, write_curve
from llm_from_scratch.training.plan import NgramTrainParams, TrainParams
from llm_from_scratch.training.resume import Journal, code_digest, run_folder

GLANCE = 30_000  # held-out bytes behind a point of the curve, the same for every tokenizer; the score at the end reads evaluate_tokens
PROMPT = 16
SAMPLE = Sampling(temperature=0.8, max_tokens=200, seed=1)

CARD = """\
# {name}

A language model of the architecture `{architecture}` with {parameters:,} parameters, trained from scratch on the tokens `{tokens}`.

It continues text in the manner of that corpus. It was not taught to follow instructions, and what it says is not to be relied on.

Load it with `llm_from_scratch.inference.engine.Engine.open(folder)`{elsewhere}. What it was made from is in `manifest.json`.
"""
ELSEWHERE = ", or with `transformers.AutoModelForCausalLM.from_pretrained(folder)`"


def run(params: Params, name: str, root: Path, place: Place = ONLY) -> None:
    """A killed run goes on where it was, on as many processes as there are now: its state is kept in runs/ until its bundle and its
    logs stand."""
    rung = params.train[name]
    with together(rung.parallel if isinstance(rung, TrainParams) else "none", place) as parallel:
        train(rung, name, root, parallel)


def train(rung: TrainParams | NgramTrainParams, name: str, root: Path, parallel: Parallel) -> None:
    """All processes read and learn; the first writes."""
    source = f"artifacts/tokens/{rung.tokens}"
    tokens = bundle.verify(root / source, "tokens")
    shards, words = open_shards(root / source), tokenizer.load(root / source)
    if shards.vocab_size != words.vocab_size:
        known = f"the shards have {shards.vocab_size} tokens, the tokenizer {words.vocab_size}"
        raise ValueError(f"{source}: {known}; rebuild it with: dvc repro --force --single-item {tokens.made_by}")
    journal = Journal(
        run_folder(root / "runs", rung.model_dump(exclude={"parallel"}), tokens.digest, code_digest(_code()), torch.__version__)
    )

    with tracking.stage_run("train", name, rung.model_dump(), [source]) as log:
        made: Rung | NGram
        if isinstance(rung, NgramTrainParams):
            made, fitted, found = count(rung, shards, words)
        else:
            made, fitted, found = learn(rung, shards, lessons(rung, root / source), words, journal, log, parallel)
        curve = fitted.curve or [{"step": 0, **found.metrics()}]
        log(int(curve[-1]["step"]), found.metrics())
    if not parallel.first:
        return

    folder = root / "artifacts/models" / name
    with bundle.writing(folder) as partial:
        registry.save_model(made, partial, words.eot)
        words.save(partial)
        facts: dict[str, Any] = {"architecture": rung.model.architecture, "parameters": registry.parameters(made)}
        (partial / "README.md").write_text(card(name, rung.tokens, facts), encoding="utf-8")
        facts["tokenizer_digest"] = tokenizer.digest(partial)
        kind = "ngram" if isinstance(made, NGram) else "model"
        bundle.seal(partial, kind, f"train@{name}", {"tokens": tokens.digest}, **facts)

    prompt = shards.val[:PROMPT].tolist()
    with bundle.writing(root / "artifacts/logs/train" / name) as partial:
        metrics = {**found.metrics(), **fitted.metrics(), **facts, "context": context_of(rung), "size_mb": round(size_mb(folder), 3)}
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (partial / "sample.txt").write_text(words.decode(prompt + list(generate(made, prompt, SAMPLE, words.eot))), encoding="utf-8")
        write_curve(partial / "curve.csv", curve)
    journal.remove()


def learn(
    rung: TrainParams, shards: Shards, taught: Sequence[Pair], words: Tokenizer, journal: Journal, log: Log, parallel: Parallel
) -> tuple[Rung, Fitted, Likelihood]:
    """A neural rung, trained by steps on the text and what it is `taught`, and what the held-out text costs it."""
    torch.manual_seed(rung.seed)
    made = registry.build(rung.model, words.vocab_size)
    batches = windows(shards.train, rung.context, rung.batch, rung.seed)
    if rung.lessons is not None and taught:
        asked = conversations(taught, rung.lessons.batch, words.eot, rung.seed)
        batches = in_turn(batches, asked, rung.lessons.first, rung.lessons.share)
    measure = functools.partial(score, token_bytes=words.token_bytes(), context=rung.context, batch=rung.batch)
    held_out = _held_out(rung, shards)
    seen = int(np.searchsorted(np.cumsum(words.token_bytes()[held_out[:GLANCE]]), GLANCE))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def glance(model: nn.Module) -> dict[str, float]:
        return measure(model, held_out[:seen]).metrics()

    fitted = fit(made, batches, next_token, rung, log, journal, glance, device, progress=True, parallel=parallel)
    found = measure(made, held_out, progress=functools.partial(progress.bar, desc="score", disable=not parallel.first))
    return made.cpu(), fitted, found


def lessons(rung: TrainParams, source: Path) -> list[Pair]:
    """The lessons of a tokens bundle that fit the rung's context, where it takes any. Raises ValueError where there are none."""
    if rung.lessons is None or not rung.lessons.some:
        return []
    if not (source / CONVERSATIONS).exists():
        raise ValueError(f"{source} has no lessons; set tokenize.{rung.tokens}.lessons to true, or take the rung's section lessons out")
    fitting = [shifted(ids, learned) for ids, learned in read_conversations(source) if len(ids) <= rung.context + 1]
    if not fitting:
        raise ValueError(f"no lesson of {source} fits a context of {rung.context} tokens; raise context")
    return fitting


def count(rung: NgramTrainParams, shards: Shards, words: Tokenizer) -> tuple[NGram, Fitted, Likelihood]:
    """The n-gram, which reads the text once, and what the held-out text costs it."""
    started = perf_counter()
    made = NGram.train(shards.train, words.vocab_size, rung.model.order)
    fitted = Fitted(tokens=len(shards.train), seconds=perf_counter() - started, resumed_at=0, curve=[])
    return made, fitted, score(made, _held_out(rung, shards), words.token_bytes(), rung.model.order)


def card(name: str, tokens: str, facts: Mapping[str, Any]) -> str:
    """The model card's stub; the report has the numbers."""
    elsewhere = ELSEWHERE if facts["architecture"] in ("gpt", "llama") else ""
    return CARD.format(name=name, tokens=tokens, elsewhere=elsewhere, **facts)


def context_of(rung: TrainParams | NgramTrainParams) -> int:
    """How many tokens the next one is predicted from, at most."""
    return rung.model.order - 1 if isinstance(rung, NgramTrainParams) else rung.context


def _held_out(rung: TrainParams | NgramTrainParams, shards: Shards) -> Ids:
    return shards.val[: rung.evaluate_tokens or None]


def _code() -> list[Path]:
    """Whatever decides the weights beside params and tokens: the same sources resume, others start anew."""
    packages = [Path(package.__path__[0]) for package in (model, training)]
    return [Path(__file__), *(path for package in packages for path in package.glob("*.py"))]
