"""What pays in our recipe for tinyshakespeare, and what does not: one thing changed at a time, equal time, several seeds."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean, stdev
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import shakespeare, table
from benchmarks.recipe import MODEL, Recipe
from llm_from_scratch.evaluation.likelihood import token_nats
from llm_from_scratch.model.llama import Block, Llama
from llm_from_scratch.model.rung import Rung


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--text", type=table.Path, required=True, metavar="FILE", help="tinyshakespeare, 1,115,394 characters")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, for each variant and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    text = shakespeare.read(arguments.text, arguments.quick)
    seconds, seeds = (0.0, [1]) if arguments.quick else (arguments.seconds, arguments.seeds)
    found: dict[str, list[float]] = {}
    steps: dict[str, list[int]] = {}
    for seed in seeds:  # all variants of a seed together, so that a slow minute of the machine hits all of them
        for name, recipe in VARIANTS.items():
            fitting = 4 if arguments.quick else recipe.steps_in(seconds, text.train, text.vocab_size)
            model = recipe.train(text.train, text.vocab_size, seed, fitting).model
            nats = token_nats(model, text.val[: 500 if arguments.quick else None], recipe.plan.context)
            found.setdefault(name, []).append(float(nats.mean()))
            steps.setdefault(name, []).append(fitting)
    ours = found["our recipe"]
    rows = []
    for name, values in found.items():
        gaps = [value - base for value, base in zip(values, ours, strict=True)]
        spread = stdev(gaps) if len(gaps) > 1 else 0.0
        verdict = (
            ""
            if name == "our recipe"
            else "worse"
            if mean(gaps) > 2 * spread
            else "better"
            if mean(gaps) < -2 * spread
            else "no difference shown"
        )
        rows.append(
            {
                "variant": name,
                "steps": round(mean(steps[name])),
                "val loss": mean(values),
                "against ours": mean(gaps),
                "spread": spread,
                "": verdict,
            }
        )
    table.write(
        arguments.out,
        "ablation",
        f"tinyshakespeare characters: {seconds:g} s of training each, one thing changed at a time; nats a character",
        sorted(rows, key=lambda row: float(str(row["val loss"]))),
        {"seeds": seeds, "seconds": seconds, "model": MODEL.model_dump()},
        [
            "Validation loss over the whole validation set, in windows of the context that overlap by half; mean of the seeds.",
            "`against ours` is the mean, over the seeds, of the gap to our recipe with the same seed, and `spread` its standard deviation. "
            "A gap within twice the spread is called no difference: with so few seeds that is a rule of thumb, not a test.",
            "Equal time, not equal steps: the steps that fit are told from 40 timed before each run, so a variant pays for what it costs.",
            "At a longer time the order can change; nothing here was tuned again for a variant but AdamW's rate.",
        ],
    )


def learned_positions(model: Rung) -> None:
    """Positions added to the embeddings, and no turning."""
    assert isinstance(model, Llama)
    model.positions = nn.Embedding(model.context, MODEL.width)
    nn.init.normal_(model.positions.weight, std=0.02)
    model.model.cos.fill_(1.0)
    model.model.sin.fill_(0.0)

    def embed(self: Llama, ids: Tensor, past: int) -> Tensor:
        places = torch.arange(past, past + ids.size(1))
        added: Tensor = self.model.embed_tokens(ids) + self.positions(places)
        return added

    model.embed = MethodType(embed, model)


def layer_norm(model: Rung) -> None:
    """LayerNorm with its mean and its bias, in every place of an RMSNorm."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.RMSNorm):
                setattr(parent, name, nn.LayerNorm(child.normalized_shape))


class Gelu(nn.Module):
    """GPT-2's feed-forward of as many weights as the gated one."""

    def __init__(self) -> None:
        super().__init__()
        hidden = MODEL.hidden * 3 // 2
        self.up_proj = nn.Linear(MODEL.width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, MODEL.width, bias=False)
        nn.init.normal_(self.up_proj.weight, std=MODEL.width**-0.5)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        thought: Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return thought


def gelu(model: Rung) -> None:
    for block in model.modules():
        if isinstance(block, Block):
            block.mlp = Gelu()


OURS = Recipe()
VARIANTS = {
    "our recipe": OURS,
    "AdamW (rate 0.003)": OURS.with_plan(optimizer="adamw", learning_rate=0.003, embedding_learning_rate=0.003),
    "learned positions": replace(OURS, alter=learned_positions),
    "LayerNorm": replace(OURS, alter=layer_norm),
    "GELU instead of SwiGLU": replace(OURS, alter=gelu),
    "QK-norm": replace(OURS, model=MODEL.model_copy(update={"qk_norm": True})),
    "4 key-value heads": replace(OURS, model=MODEL.model_copy(update={"kv_heads": 4})),
    "no cooldown": OURS.with_plan(cooldown_share=0.0),
    "short cooldown (0.2)": OURS.with_plan(cooldown_share=0.2),
    "batch 6": OURS.with_plan(batch=6),
    "batch 24": OURS.with_plan(batch=24),
    "context 32, batch 24": OURS.with_plan(context=32, batch=24),
    "context 128, batch 6": replace(OURS, model=MODEL.model_copy(update={"context": 128})).with_plan(context=128, batch=6),
}


if __name__ == "__main__":
    main()
