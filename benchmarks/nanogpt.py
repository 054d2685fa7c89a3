"""Against nanoGPT's recipe for a CPU: how soon our best small rung is where nanoGPT ends, and where it is when nanoGPT ends."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from torch import nn

from benchmarks import shakespeare, table
from benchmarks.recipe import CALIBRATION, MODEL, PLAN, Recipe
from llm_from_scratch.evaluation.likelihood import token_nats
from llm_from_scratch.evaluation.mixture import DEGREES, degrees, fit_weights, mixed_nats
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.registry import parameters

ORDER = 7
# Of train, at its start: neither the rung nor the n-gram of the fit sees it, so the weights are fitted on text new to both. Not at its end,
# which is of the play that validation goes on with: without that a rung is 0.03 nats behind after 200 steps.
SLICE = 0.05
QUARTER, WHOLE = 0.23, 0.96  # of nanoGPT's time; the rest is for the machine's moods
MIXED = 0.80  # of nanoGPT's time; the rest is for counting, fitting and scoring the mixture


def main() -> None:
    parser = table.parser(__doc__ or "")
    shakespeare.add_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    text = shakespeare.read(arguments.text, arguments.quick)
    unseen, seen = np.split(text.train, [int(len(text.train) * SLICE)])
    recipe = Recipe()
    per_seed: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as work:
            peer = shakespeare.train_nanogpt(arguments.nanogpt, text, Path(work) / "nanogpt", seed, 20 if arguments.quick else 2000)
            theirs = shakespeare.Nanogpt(arguments.nanogpt, peer.checkpoint)
            row = {"seconds": peer.seconds, "share of nanoGPT's time": 1.0, "tokens/s": peer.tok_per_s, **measured(theirs, text, 64)}
            per_seed.setdefault("nanoGPT", []).append(row)
        for name, share in (("ours, a quarter of its time", QUARTER), ("ours, its time", WHOLE)):
            ours = recipe.train(text.train, text.vocab_size, seed, recipe.steps_in(share * peer.seconds, text.train, text.vocab_size))
            row = {"seconds": ours.seconds, "share of nanoGPT's time": ours.seconds / peer.seconds, "tokens/s": ours.tok_per_s}
            per_seed.setdefault(name, []).append(row | measured(ours.model, text, PLAN.context))
        partner = recipe.train(seen, text.vocab_size, seed, recipe.steps_in(MIXED * peer.seconds, seen, text.vocab_size))
        started = perf_counter()
        together = mixture(partner.model, text, unseen, seen)
        row = {"seconds": partner.seconds + perf_counter() - started, "tokens/s": partner.tok_per_s, **together}
        row["share of nanoGPT's time"] = row["seconds"] / peer.seconds
        per_seed.setdefault(f"ours, less training, with a {ORDER}-gram", []).append(row)
    table.write(
        arguments.out,
        "nanogpt",
        "tinyshakespeare characters: nanoGPT's CPU recipe and ours, nats a character on the whole validation set",
        [{"what": name, **shakespeare.middle_of(rows)} for name, rows in per_seed.items()],
        {
            "seeds": arguments.seeds,
            "nanoGPT": "4 layers, 128 wide, context 64, batch 12, 2,000 iterations, dropout 0, eager",
            "ours": f"{parameters(recipe.build(text.vocab_size, 0)):,} parameters, {MODEL.model_dump()}, {PLAN.model_dump()}",
        },
        [
            "Each number is the median of the seeds, with the extremes behind it.",
            "Seconds are those of training alone: of nanoGPT's iterations without those that evaluate, of our steps with loader and log.",
            f"Ours runs for {QUARTER:.0%}, {WHOLE:.0%} and {MIXED:.0%} of that time, in steps, from {CALIBRATION} steps timed before it.",
            "Every character of the validation set but the first is scored once. Disjoint windows: the text cut into windows of the "
            "context, which is what nanoGPT's estimate samples. Half-overlapping: each scores what the one before did not.",
            f"The mixture's weights (one for each of {DEGREES} degrees of its doubt) are fitted on the first {SLICE:.0%} of train, "
            "which its rung, another one, was not trained on and the n-gram of the fit did not count. Its row's time has counting, fitting "
            "and scoring in it.",
        ],
    )


def measured(model: nn.Module, text: shakespeare.Text, context: int) -> dict[str, float]:
    return shakespeare.scores(model, text.val, context)


def mixture(model: nn.Module, text: shakespeare.Text, unseen: np.ndarray, seen: np.ndarray) -> dict[str, float]:
    """Nats a character of `model` with the n-gram, in both protocols; fitted on `unseen`, in the protocol that is scored."""
    counted, all_counted = (NGram.train(ids, text.vocab_size, ORDER) for ids in (seen, text.train))
    found = {}
    for name, neural_nats in (("disjoint windows", shakespeare.disjoint_nats), ("half-overlapping", token_nats)):
        weights = fit_weights(
            neural_nats(model, unseen, PLAN.context), counted.token_nats(unseen)[1:], degrees(counted.doubt(unseen)[1:]), DEGREES
        )
        neural = neural_nats(model, text.val, PLAN.context)
        nats = mixed_nats(neural, all_counted.token_nats(text.val)[1:], weights[degrees(all_counted.doubt(text.val)[1:])])
        found[name] = float(np.mean(nats))
    return found


if __name__ == "__main__":
    main()
