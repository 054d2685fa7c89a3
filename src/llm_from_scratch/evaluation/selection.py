"""Which of a model's quantizations is served: a bound on what it may lose, and then the best trade of room for time.

    cost = (MB / the original's MB) ** a * (ms / the original's ms) ** b, all to the power 1 / (a + b)

is a weighted geometric mean, so a scheme of half the size and twice the time costs what the original costs where a = b, and units do not
matter. Everything is held against the original as it was measured in the same run, which leaves out how busy the machine was. The
original is a candidate itself, at cost 1: where nothing is cheaper and good enough, it is served as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from llm_from_scratch.section import Section


class ServeWeights(Section):
    """The exponents a and b above: what a factor in room counts against the same factor in time."""

    megabytes: float = Field(ge=0)
    milliseconds: float = Field(ge=0)

    @model_validator(mode="after")
    def something_counts(self) -> ServeWeights:
        if self.megabytes + self.milliseconds == 0:
            raise ValueError("megabytes and milliseconds are both 0, so nothing would tell candidates apart; raise one")
        return self


class ServeRule(Section):
    """`maximum_loss_increase`: by what share of the original's bits per byte a candidate's may be higher (0.005: half a percent)."""

    maximum_loss_increase: float = Field(ge=0)
    weights: ServeWeights


@dataclass(frozen=True)
class Candidate:
    """Held against the original: the share by which it loses more, and its megabytes and milliseconds as shares of the original's."""

    name: str
    loss_increase: float
    megabytes: float
    milliseconds: float
    cost: float
    allowed: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """The name to serve, and what was thought of each candidate, the best first."""

    name: str
    candidates: tuple[Candidate, ...]


def choose(original: str, rows: Mapping[str, Mapping[str, Any]], rule: ServeRule) -> Choice:
    """The allowed candidate of the lowest cost; of equal ones the one that loses less.

    `rows` are the measurements of the quantizations of `original`, by name: `size_mb`, `p50_ms`, `val_bpb`, and each with `_fp32` of the
    original. Raises ValueError where there are none, or a number is missing.
    """
    if not rows:
        raise ValueError(f"serve_rule: nothing in params.yaml: quantize is made from {original!r}, so there is nothing to choose from")
    found = [_candidate(original, 0.0, 1.0, 1.0, rule), *(_measured(name, row, rule) for name, row in rows.items())]
    ranked = sorted(found, key=lambda candidate: (not candidate.allowed, candidate.cost, candidate.loss_increase))
    return Choice(ranked[0].name, tuple(ranked))


def _measured(name: str, row: Mapping[str, Any], rule: ServeRule) -> Candidate:
    bits, megabytes, milliseconds = (_share(name, row, key) for key in ("val_bpb", "size_mb", "p50_ms"))
    return _candidate(name, bits - 1, megabytes, milliseconds, rule)


def _candidate(name: str, loss_increase: float, megabytes: float, milliseconds: float, rule: ServeRule) -> Candidate:
    a, b = rule.weights.megabytes, rule.weights.milliseconds
    cost = (megabytes**a * milliseconds**b) ** (1 / (a + b))
    allowed = loss_increase <= rule.maximum_loss_increase
    bound = f"{rule.maximum_loss_increase:.2%} more bits per byte that the rule allows"
    trade = f"{megabytes:.2f} of its megabytes and {milliseconds:.2f} of its milliseconds cost {cost:.2f}"
    reason = f"loses {loss_increase:+.2%} against the original: {'within' if allowed else 'more than'} the {bound}; {trade}"
    return Candidate(name, loss_increase, megabytes, milliseconds, cost, allowed, reason)


def _share(name: str, row: Mapping[str, Any], key: str) -> float:
    """A measurement of `row` as a share of the original's."""
    try:
        ours, theirs = float(row[key]), float(row[f"{key}_fp32"])
    except KeyError as error:
        raise ValueError(f"serve_rule: the measurements of {name!r} have no {error}; dvc repro quantize@{name} makes them") from None
    if not (ours > 0 and theirs > 0):
        raise ValueError(f"serve_rule: {key} of {name!r} is {ours:g} and the original's {theirs:g}; both must be above 0, measure again")
    return ours / theirs
