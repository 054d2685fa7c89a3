"""Too much of a good thing: policies that please reward models of few and of many pairs, and what the gold judge says meanwhile.

The experiment of Gao et al. 2023 (arXiv:2210.10760) at this project's size: the gold judge (VADER) labels pairs, a reward model learns
from some of them, and GRPO without any price for distance, or the choice of the best of n, goes as far as that model can lead.

python -m benchmarks.overoptimization --project PROJECT --keep FILE
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from torch import nn

from benchmarks import table
from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.data.preferences import Preference, read_preferences
from llm_from_scratch.evaluation.alignment import best_curve, divergences, learned_rewards
from llm_from_scratch.evaluation.splits import prompts_of
from llm_from_scratch.finetune import grpo, reward
from llm_from_scratch.finetune.grpo import GrpoParams
from llm_from_scratch.finetune.judge import Judge, judge
from llm_from_scratch.finetune.pairs import PairLesson, answers, encode_pairs
from llm_from_scratch.finetune.reward import PAIRS, RewardModel, RewardParams
from llm_from_scratch.finetune.rollouts import PromptLesson
from llm_from_scratch.model.registry import load_model
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.report import figures
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.training.loop import fit
from stages.__main__ import read_yaml

SMOKE = Path(__file__).parent.parent / "profiles" / "smoke.yaml"
PACE = 0.5  # of the rates in params.yaml: where nothing holds a policy back, the first looks would already be far away
HELD_OUT = 0.1  # of the pairs, for the reward models' accuracy; the same ones for all
NOTES = [
    "`proxy` is the reward model that is optimized, `gold` the judge that labelled its pairs and is not asked while training. Both are in "
    "standard deviations, over the start's answers, above the start's mean; `kl` is in nats an answer from the policy to the start.",
    "The policy is trained by GRPO from the same start, at half the rates of params.yaml, with no price for distance and no text beside "
    "it, so that nothing holds it back.",
    "`gold, peak` is the point of the curve where the gold reward of one half of the prompts is highest; what stands there is that of "
    "the other half, so the peak is no lucky draw. `fall` is from there to the end, on that half, with its standard error over prompts.",
    "Best-of-n draws from the start and takes what the proxy likes best; its numbers count every choice of n of those that were drawn.",
    "Where gold goes on up with the proxy, the answers below show what for: the judge is a lexicon, and a row of its words pleases it too.",
    "In the picture (overoptimization.png) lines are gold, by the left scale, and dashes the proxy, by the right one; the first seed.",
]


@dataclass(frozen=True)
class Scale:
    """`far` steps of GRPO and a look each `every`, on `prompts`; for `chosen_for` of them up to `most` answers are chosen from."""

    far: int
    every: int
    prompts: int
    chosen_for: int
    most: int


FULL = Scale(far=200, every=10, prompts=256, chosen_for=48, most=256)
QUICK = Scale(far=4, every=2, prompts=8, chosen_for=4, most=8)


@dataclass(frozen=True)
class Ground:
    """What all runs share: the start, the judge and its pairs, prompts to learn from and to be asked, prompts and answers of the start."""

    base: Rung
    words: Tokenizer
    told: RewardParams
    policy: GrpoParams
    judge: Judge
    learned: list[Preference]
    held_out: list[Preference]
    prompts: list[list[int]]
    asked: list[list[int]]
    drawn: tuple[list[list[int]], list[list[int]]]
    scale: Scale
    seed: int

    def judged(self, said: Sequence[list[int]]) -> np.ndarray:
        """(N,) gold rewards."""
        return np.array([self.judge(self.words.decode(answer)) for answer in said])


@dataclass(frozen=True)
class Start:
    """Mean and standard deviation of both rewards over answers of the start, by which all is scaled."""

    learned: float
    learned_spread: float
    gold: float
    gold_spread: float

    def scaled(self, point: Mapping[str, float]) -> dict[str, float]:
        gold, learned = (point["gold"] - self.gold) / self.gold_spread, (point["learned"] - self.learned) / self.learned_spread
        return {**point, "gold": gold, "learned": learned}


@dataclass(frozen=True)
class Run:
    """One reward model, what it was good for, and an answer of the policy at the end.

    `peak` is the place in the curve where one half of the prompts has its highest gold reward, `gold_peak` and `gold_end` what the other
    half has there and at the end, and `error` the standard error of the difference.
    """

    pairs: int
    seed: int
    accuracy: float
    policy: list[dict[str, float]]
    best_of: list[dict[str, float]]
    peak: int
    gold_peak: float
    gold_end: float
    error: float
    sample: str

    @property
    def name(self) -> str:
        return f"{self.pairs:,} pairs"


def main() -> None:
    parser = table.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--project", type=Path, default=Path(), help="a folder where make repro has run: params.yaml and artifacts/")
    parser.add_argument("--pairs", type=int, nargs="+", default=[150, 600, 2000, 0], help="how many pairs reward models learn from; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a file of finished runs, which are not made again")
    arguments = parser.parse_args()
    if not (arguments.project / "artifacts/models/reward" / PAIRS).exists():
        raise SystemExit(f"no artifacts/models/reward in {arguments.project.resolve().name}; run make repro there first")
    runs = earlier(arguments.keep)
    ground = None
    for pairs in arguments.pairs:
        if not any((run["asked"], run["seed"]) == (pairs, arguments.seed) for run in runs):
            ground = ground or prepared(arguments.project, arguments.quick, arguments.seed)
            runs.append({"asked": pairs, **asdict(measured(ground, pairs))})
            if arguments.keep:
                arguments.keep.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    made = [Run(**{key: value for key, value in run.items() if key != "asked"}) for run in runs]
    write(arguments, sorted(made, key=lambda run: (run.pairs, run.seed)))


def earlier(path: Path | None) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else []


def write(arguments: argparse.Namespace, runs: Sequence[Run]) -> None:
    settings: dict[str, Any] = {"judge": entries(arguments.project)["reward"]["judge"]["kind"], "seeds": sorted({run.seed for run in runs})}
    said = [f"With {run.name} (seed {run.seed}) the policy ends in answers like: {run.sample!r}" for run in runs]
    title = "Over-optimization: gold reward while a learned one is pleased"
    table.write(arguments.out, "overoptimization", title, [row_of(run) for run in runs], settings, [*NOTES, *said])
    drawn = {run.name: {"policy": run.policy, "best_of": run.best_of} for run in runs if run.seed == settings["seeds"][0]}
    figures.overoptimization(arguments.out, drawn)


def entries(project: Path) -> dict[str, Any]:
    """The section `finetune` of a project's params.yaml."""
    found: Any = read_yaml(project / "params.yaml")["finetune"]
    return found


def prepared(project: Path, quick: bool, seed: int) -> Ground:
    """Reads a project, and draws the answers of its start that all reward models choose from."""
    models, scale = project / "artifacts/models", QUICK if quick else FULL
    sections = entries(project)
    small: Any = read_yaml(SMOKE)["finetune"] if quick else {"reward": {}, "grpo": {}}
    far = {"steps": scale.far, "evaluate_every": scale.every, "checkpoint_every": scale.far, "beta": 0.0, "text_weight": 0.0}
    far |= {name: sections["grpo"][name] * PACE for name in ("learning_rate", "embedding_learning_rate")}
    told = TypeAdapter(RewardParams).validate_python(sections["reward"] | small["reward"] | {"seed": seed})
    policy = TypeAdapter(GrpoParams).validate_python(sections["grpo"] | small["grpo"] | far | {"seed": seed})
    bundle.verify(models / "reward", "reward")
    base, words = load_model(models / "base"), tokenizer.load(models / "base")
    assert isinstance(base, Rung)
    corpus = project / "artifacts/raw" / told.records
    prompts, tested = prompts_of(corpus, words, told.prompt_tokens, seed, None, scale.prompts)
    learned, held_out = parted(read_preferences(models / "reward" / PAIRS))
    repeated = [prompt for prompt in tested[: scale.chosen_for] for _ in range(scale.most)]
    said = answers(base, repeated, told.answer_tokens, words, seed)
    return Ground(base, words, told, policy, judge(told.judge), learned, held_out, prompts, tested, (repeated, said), scale, seed)


def parted(found: Sequence[Preference]) -> tuple[list[Preference], list[Preference]]:
    """(to learn from, to measure on): the pairs of one prompt on the same side."""
    prompts = list(dict.fromkeys(str(one.prompt) for one in found))
    last = set(prompts[round(len(prompts) * (1 - HELD_OUT)) :])
    sides = [[one for one in found if (str(one.prompt) in last) == held_out] for held_out in (False, True)]
    return sides[0], sides[1]


def measured(ground: Ground, pairs: int) -> Run:
    """One reward model, of the first `pairs` (0: all), and as far as it leads."""
    learned = ground.learned[: pairs or None]
    proxy, accuracy = taught(ground, learned)
    scores = np.array(learned_rewards(proxy, *ground.drawn, ground.words.eot)).reshape(-1, ground.scale.most)
    golds = ground.judged(ground.drawn[1]).reshape(-1, ground.scale.most)
    start = Start(float(scores.mean()), float(scores.std()), float(golds.mean()), float(golds.std()))
    policy, looks = trained(ground, proxy, start)

    first, second = ([gold[half::2] for _, gold in looks] for half in (0, 1))
    peak = int(np.argmax([gold.mean() for gold in first]))
    fall = second[peak] - second[-1]
    said = answers(policy, ground.asked[:1], ground.told.answer_tokens, ground.words, ground.seed)[0]
    return Run(
        pairs=len(learned),
        seed=ground.seed,
        accuracy=accuracy,
        policy=[point for point, _ in looks],
        best_of=[start.scaled(point) for point in best_curve(scores, golds)],
        peak=peak,
        gold_peak=float(second[peak].mean()),
        gold_end=float(second[-1].mean()),
        error=float(fall.std(ddof=1) / len(fall) ** 0.5),
        sample=ground.words.decode(said),
    )


def trained(ground: Ground, proxy: RewardModel, start: Start) -> tuple[nn.Module, list[tuple[dict[str, float], np.ndarray]]]:
    """The policy, and what was seen on its way: a point of the curve, and the scaled gold reward for each prompt."""
    policy, looks = copy.deepcopy(ground.base), []

    def look(model: nn.Module) -> dict[str, float]:
        said = answers(model, ground.asked, ground.told.answer_tokens, ground.words, ground.seed)
        gold = ground.judged(said)
        away = fmean(divergences(model, ground.base, ground.asked, said, ground.words.eot))
        liked = fmean(learned_rewards(proxy, ground.asked, said, ground.words.eot))
        looks.append((start.scaled({"kl": away, "gold": float(gold.mean()), "learned": liked}), (gold - start.gold) / start.gold_spread))
        return {}

    look(policy)
    text = np.zeros(ground.policy.text_tokens + 2, dtype=np.int64)  # of no weight
    ends = frozenset(ground.words.special.values())
    lesson = PromptLesson(ground.prompts, text, proxy, ends, ground.words.eot, ground.words.end_of_turn)
    job = grpo.job(policy, lesson, ground.policy)
    fit(job.model, job.batches, job.loss, ground.policy, evaluate=look)
    return policy, looks


def taught(ground: Ground, learned: list[Preference]) -> tuple[RewardModel, float]:
    """A reward model of these pairs, frozen, and the share of the held-out ones that it tells right."""
    pairs, _ = encode_pairs(learned, ground.words, ground.told.context)
    tested, _ = encode_pairs(ground.held_out, ground.words, ground.told.context)
    lesson = PairLesson(learned, pairs, np.empty(0), ground.words.eot, ground.words.end_of_turn)
    job = reward.job(copy.deepcopy(ground.base), lesson, ground.told)
    fit(job.model, job.batches, job.loss, ground.told)
    model = job.model
    assert isinstance(model, RewardModel)
    accuracy = reward.accuracy(reward.margins(model, tested, ground.words.eot, ground.told.batch))
    return model.requires_grad_(False).eval(), accuracy


def row_of(run: Run) -> dict[str, Any]:
    peak, end, last = run.policy[run.peak], run.policy[-1], run.best_of[-1]
    best = max(run.best_of, key=lambda point: point["gold"])
    return {
        "pairs": run.pairs,
        "seed": run.seed,
        "told right": run.accuracy,
        "gold, peak": run.gold_peak,
        "kl there": peak["kl"],
        "proxy there": peak["learned"],
        "gold, end": run.gold_end,
        "kl": end["kl"],
        "proxy": end["learned"],
        "fall": run.gold_peak - run.gold_end,
        "± error": run.error,
        f"gold, best of {last['n']:.0f}": last["gold"],
        "its proxy": last["learned"],
        "gold, best of any n": best["gold"],
        "that n": int(best["n"]),
    }


if __name__ == "__main__":
    main()
