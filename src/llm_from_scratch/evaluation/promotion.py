"""Is a new version better than the champion, or was it luck? A paired bootstrap over what both were asked.

Both stand on the same held-out units: documents, records, prompts, pairs or questions. What a unit costs the one is taken from what it
costs the other, so how hard it is drops out. Units drawn again and again with replacement give the interval of the gain (Efron 1979; for
language Koehn 2004, "Statistical significance tests for machine translation evaluation"), and the alias moves only where the whole
interval lies above `minimum_gain`.

It says which of two models is better on text like this. It does not say which recipe is: that takes other seeds, trained anew.

Shapes: U units that both have, R resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_from_scratch.evaluation import EvaluateParams

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """What the verdict says to whoever applies it. A gain counts only if it is more than `minimum_gain` of the metric's unit."""

    minimum_gain: float
    minimum_units: int
    resamples: int
    confidence: float
    seed: int

    @classmethod
    def of(cls, params: EvaluateParams) -> Rule:
        told = params.promotion
        return cls(told.minimum_gain, told.minimum_units, told.resamples, told.confidence, params.seed)


@dataclass(frozen=True)
class Scores:
    """What each unit costs a model, and its weight: the metric is the sum of costs over the sum of weights, and lower is better.

    A unit is named by a digest of what is asked, so units of two versions with one name are the same question, whatever became of the data.
    """

    metric: str
    units: Mapping[str, tuple[float, float]]

    @property
    def mean(self) -> float:
        costs, weights = zip(*self.units.values(), strict=True)
        return float(sum(costs) / sum(weights))

    def to_json(self) -> str:
        units = {name: [float(f"{cost:.6g}"), weight] for name, (cost, weight) in sorted(self.units.items())}
        return json.dumps({"metric": self.metric, "units": units}, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Raises ValueError for what is no file of scores."""
        try:
            tree = json.loads(text)
            return cls(tree["metric"], {name: (float(cost), float(weight)) for name, (cost, weight) in tree["units"].items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"these are no scores of held-out units ({error}); dvc repro evaluate writes them") from None


@dataclass(frozen=True)
class Decision:
    """Whether the challenger takes over, and why, in one line."""

    promoted: bool
    reason: str


@dataclass(frozen=True)
class Gain:
    """By how much the challenger's metric is lower than the champion's on the units of both, with the ends of its interval."""

    value: float
    low: float
    high: float
    units: int


def decide(champion: Scores, challenger: Scores, rule: Rule) -> Decision:
    """Challenger against champion. What cannot be compared is not promoted, and the reason says so."""
    if champion.metric != challenger.metric:
        return Decision(False, f"the champion was measured by {champion.metric}, this one by {challenger.metric}: nothing to compare")
    shared = len(champion.units.keys() & challenger.units.keys())
    if shared < rule.minimum_units:
        return Decision(False, f"{shared} held-out units are the champion's too, and the rule wants {rule.minimum_units}")
    gain = paired_gain(champion, challenger, rule)
    interval = f"{rule.confidence:.0%} interval {gain.low:+.4f} to {gain.high:+.4f}"
    measured = f"the gain in {challenger.metric} is {gain.value:+.4f} ({interval}) on {gain.units} units"
    if gain.low > rule.minimum_gain:
        return Decision(True, f"{measured}, all of it above {rule.minimum_gain:g}")
    if gain.high < 0:
        return Decision(False, f"{measured}: worse beyond the noise")
    return Decision(False, f"{measured}, which reaches down to {rule.minimum_gain:g} or below: inside the noise")


def paired_gain(champion: Scores, challenger: Scores, rule: Rule) -> Gain:
    """The gain on the units of both, with its percentile interval. Raises ValueError where they share none."""
    names = sorted(champion.units.keys() & challenger.units.keys())
    if not names:
        raise ValueError("the two share no held-out unit, so there is no gain to tell; score both on the same data")
    saved = np.array([champion.units[name][0] - challenger.units[name][0] for name in names])
    weights = np.array([challenger.units[name][1] for name in names])
    low, high = _interval(saved, weights, rule)
    return Gain(float(saved.sum() / weights.sum()), low, high, len(names))


def _interval(saved: Floats, weights: Floats, rule: Rule) -> tuple[float, float]:
    """Of the ratio of sums, over resamples of `saved` and `weights` (U,) together."""
    drawn = np.random.default_rng(rule.seed).integers(len(saved), size=(rule.resamples, len(saved)))
    gains = saved[drawn].sum(1) / weights[drawn].sum(1)
    tail = (1 - rule.confidence) / 2
    low, high = np.quantile(gains, (tail, 1 - tail))
    return float(low), float(high)
