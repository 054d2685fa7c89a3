"""What a model took: the seconds that the stages measured, and, by three numbers that nobody measured, energy, carbon and money.

Power cannot be read where these models are made (a virtual machine shows no meter), so `power_watts` is assumed, and all that follows
from it is an estimate: seconds · watts / 3,600 watt-hours. Only the seconds are facts, and only of the work itself, not of its evaluation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pydantic import Field

from llm_from_scratch.section import Section


class EnergyParams(Section):
    """What the machine draws while it works, what a kilowatt-hour emits, and what an hour of such a machine costs; all assumed."""

    power_watts: float = Field(gt=0)
    grams_co2_per_kwh: float = Field(ge=0)
    dollars_per_hour: float = Field(ge=0)


def ancestry(name: str, parents: Mapping[str, Collection[str]]) -> set[str]:
    """`name` and all that it was made from, each once."""
    found, waiting = {name}, [name]
    while waiting:
        new = set(parents.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


def estimate(own: float, whole: float, params: EnergyParams) -> dict[str, float]:
    """From the `own` seconds of a model and the `whole` of its ancestry: `seconds` of both, and what the whole comes to."""
    hours = whole / 3600
    watt_hours = hours * params.power_watts
    return {
        "seconds": own,
        "seconds_with_ancestry": whole,
        "watt_hours": watt_hours,
        "grams_co2": watt_hours / 1000 * params.grams_co2_per_kwh,
        "dollars": hours * params.dollars_per_hour,
    }
