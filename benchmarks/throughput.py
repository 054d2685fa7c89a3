"""Training speed on nanoGPT's own shapes, and what logging costs: tokens a second, loader and logging in them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from benchmarks import shakespeare, table
from benchmarks.recipe import PLAN, Recipe
from llm_from_scratch import tracking
from llm_from_scratch.model.gpt import GptParams

SHAPE = GptParams(
    architecture="gpt",
    context=shakespeare.CONTEXT,
    width=shakespeare.WIDTH,
    layers=shakespeare.LAYERS,
    heads=shakespeare.HEADS,
    dropout=0.0,
)
AS_NANOGPT = Recipe(
    SHAPE, PLAN.model_copy(update={"optimizer": "adamw", "learning_rate": 1e-3, "embedding_learning_rate": 1e-3, "weight_decay": 0.1})
)
RECIPES = {"ours, the same GPT with AdamW": AS_NANOGPT, "ours, the Llama-shaped one with Muon": Recipe()}


def main() -> None:
    parser = table.parser(__doc__ or "")
    shakespeare.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured, in turn")
    parser.add_argument("--steps", type=int, default=200, help="steps of one measurement")
    arguments = parser.parse_args()
    rounds, steps = (1, 6) if arguments.quick else (arguments.rounds, arguments.steps)
    text = shakespeare.read(arguments.text, arguments.quick)
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as work:
        tracking.connect(f"sqlite:///{work}/mlflow.db", rebuild="benchmark", revision="", digests={})
        for turn in range(rounds):
            peer = shakespeare.train_nanogpt(arguments.nanogpt, text, Path(work) / f"nanogpt{turn}", seed=turn, iterations=steps)
            speeds.setdefault("nanoGPT", []).append(peer.tok_per_s)
            for name, recipe in RECIPES.items():
                speeds.setdefault(name, []).append(recipe.train(text.train, text.vocab_size, turn, steps).tok_per_s)
                with tracking.stage_run("train", name, {}) as log:
                    speeds.setdefault(f"{name}, logged to MLflow", []).append(
                        recipe.train(text.train, text.vocab_size, turn, steps, log).tok_per_s
                    )
    rows = [
        {
            "what": name,
            "tokens/s": median(values),
            "low": min(values),
            "high": max(values),
            "against nanoGPT": median(ours / theirs for ours, theirs in zip(values, speeds["nanoGPT"], strict=True)),
        }
        for name, values in speeds.items()
    ]
    table.write(
        arguments.out,
        "throughput",
        "Training on nanoGPT's shapes (4 layers, 128 wide, context 64, batch 12, fp32, eager): tokens a second",
        rows,
        {"rounds": rounds, "steps": steps},
        [
            "In turn, round after round; medians. nanoGPT's time is what it prints for its iterations, those that evaluate left out; ours "
            "is the whole of fit, with drawing the batches, logging a row every 20 steps and, in the rows that say so, MLflow on sqlite.",
            "The first row to compare is the same GPT with AdamW; Muon does more arithmetic a step, and learns more (nanogpt.md).",
        ],
    )


if __name__ == "__main__":
    main()
