"""DPO, PPO and GRPO from the same start with several seeds: does gold reward rise, how far from the start, and is language kept?"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from benchmarks import table
from benchmarks.table import middle
from llm_from_scratch.config import Params
from llm_from_scratch.data.corpora import Source
from llm_from_scratch.finetune import FinetuneParams
from stages import finetune
from stages.__main__ import read_yaml

POLICIES = ("dpo", "ppo", "grpo")


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--project", type=Path, default=Path(), help="a folder where make repro has run: params.yaml and artifacts/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    arguments = parser.parse_args()
    if not (arguments.project / "artifacts" / "models" / "base").exists():
        raise SystemExit(f"no artifacts/models/base in {arguments.project.resolve().name}; run make repro there first")
    found: list[dict[str, dict[str, Any]]] = []
    for seed in arguments.seeds:
        found.append(measured(arguments.project, seed, arguments.policies, arguments.quick))
        write(arguments, found)


def write(arguments: argparse.Namespace, found: list[dict[str, dict[str, Any]]]) -> None:
    """The table of the seeds so far, so that a run that is stopped leaves what it has."""
    table.write(
        arguments.out,
        "alignment",
        "Policies after alignment, by the gold judge, on held-out prompts",
        [row_of(policy, [one[policy] for one in found]) for policy in arguments.policies],
        {
            "seeds": arguments.seeds[: len(found)],
            "prompts": found[0]["reward"]["prompts"],
            "reward accuracy on held-out pairs": spelled([one["reward"]["accuracy"] for one in found]),
            "gold reward of the best of 16": spelled([one["reward"]["best_of"][-1]["gold"] for one in found]),
        },
        [
            "Each number is the median of the seeds, with the extremes behind it. A seed is that of the prompts, of the sampled answers, "
            "of the reward model, and of the policy; all start from the same base model.",
            "`gold` is the judge's mean on held-out prompts, which no method saw; `spreads` is how far it rose, in standard deviations of "
            "the start's gold reward over prompts.",
            "`kl` is in nats an answer, from the policy to the start; `perplexity` is that of held-out text against the start's.",
            "Best-of-16 draws 16 answers of the start and keeps the one that the reward model likes best: no training, 16 times the work.",
        ],
    )


def measured(project: Path, seed: int, policies: list[str], quick: bool) -> dict[str, dict[str, Any]]:
    """metrics.json of the reward model and of each policy, trained anew with `seed` beside the project's own bundles."""
    params = with_seed(project, seed, quick)
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        (root / "artifacts" / "models").mkdir(parents=True)
        (root / "artifacts" / "raw").symlink_to((project / "artifacts" / "raw").resolve())
        (root / "artifacts" / "models" / "base").symlink_to((project / "artifacts" / "models" / "base").resolve())
        for name in ("reward", *policies):
            finetune.run(params, name, root)
        logs = root / "artifacts" / "logs" / "finetune"
        found = {name: json.loads((logs / name / "metrics.json").read_text(encoding="utf-8")) for name in ("reward", *policies)}
    found["reward"]["prompts"] = params.finetune[policies[0]].questions
    return found


def with_seed(project: Path, seed: int, quick: bool) -> Params:
    """What the stage reads of a project's params, with another seed for all that aligns; what else is there may be of another age."""
    tree: Any = read_yaml(project / "params.yaml")
    small = read_yaml(Path(__file__).parent.parent / "profiles" / "smoke.yaml")["finetune"] if quick else {}
    told = {name: tree["finetune"][name] | small.get(name, {}) | {"seed": seed} for name in ("reward", *POLICIES)}
    entries = {name: TypeAdapter(FinetuneParams).validate_python(section) for name, section in told.items()}
    sources = {entry.records: TypeAdapter(Source).validate_python(tree["sources"][entry.records]) for entry in entries.values()}
    return Params.model_construct(sources=sources, finetune=entries)


def row_of(policy: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {
            "gold": one["gold"],
            "gold before": one["gold_before"],
            "spreads": (one["gold"] - one["gold_before"]) / one["gold_spread_before"],
            "learned": one["learned"],
            "kl": one["kl"],
            "perplexity": one["val_ppl"],
            "of the start's": one["val_ppl"] / one["val_ppl_before"],
            "distinct bigrams": one["distinct_2"],
            "before": one["distinct_2_before"],
            "seconds": one["seconds"],
        }
        for one in found
    ]
    return {"policy": policy, **{name: spelled([row[name] for row in rows]) for name in rows[0]}}


def spelled(values: list[float]) -> str:
    """The median, and the extremes behind it."""
    found = middle(values)
    return f"{found['median']:.4g} ({found['low']:.4g} … {found['high']:.4g})"


if __name__ == "__main__":
    main()
