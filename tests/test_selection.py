"""The rule that picks what is served, on numbers worked by hand, and the picture of what it chose from."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from llm_from_scratch.evaluation.selection import ServeRule, ServeWeights, choose
from llm_from_scratch.report import figures, pages


def rule(maximum: float, megabytes: float = 1.0, milliseconds: float = 1.0) -> ServeRule:
    return ServeRule(maximum_loss_increase=maximum, weights=ServeWeights(megabytes=megabytes, milliseconds=milliseconds))


def row(bits: float, megabytes: float, milliseconds: float) -> dict[str, float | str]:
    """Measured against an original of 2 bits per byte, 8 MB and 4 ms."""
    before = {"val_bpb_fp32": 2.0, "size_mb_fp32": 8.0, "p50_ms_fp32": 4.0}
    return {"model": "sft", "val_bpb": bits, "size_mb": megabytes, "p50_ms": milliseconds, **before}


ROWS = {
    "bf16": row(2.0, 4.0, 4.0),
    "int8": row(2.004, 2.0, 9.0),
    "int8_weight": row(2.002, 2.0, 2.0),
    "nf4": row(2.04, 1.0, 8.0),
}


def test_the_cheapest_of_those_that_lose_little_enough_is_served() -> None:
    choice = choose("sft", ROWS, rule(0.005))
    assert choice.name == "int8_weight"
    costs = {candidate.name: candidate.cost for candidate in choice.candidates}
    assert costs["sft"] == 1
    assert costs["bf16"] == pytest.approx(0.5**0.5)
    assert costs["int8_weight"] == pytest.approx((0.25 * 0.5) ** 0.5)
    assert costs["int8"] == pytest.approx((0.25 * 2.25) ** 0.5)
    assert costs["nf4"] == pytest.approx((0.125 * 2) ** 0.5)
    assert [candidate.name for candidate in choice.candidates] == ["int8_weight", "bf16", "int8", "sft", "nf4"]


def test_what_counts_is_said_by_the_weights() -> None:
    assert choose("sft", ROWS, rule(0.05, megabytes=1, milliseconds=0)).name == "nf4"
    assert choose("sft", ROWS, rule(0.05, megabytes=0, milliseconds=1)).name == "int8_weight"
    slow = {"int8": ROWS["int8"], "nf4": ROWS["nf4"]}
    assert choose("sft", slow, rule(0.05, megabytes=0, milliseconds=1)).name == "sft"
    cost = choose("sft", {"nf4": ROWS["nf4"]}, rule(0.05, megabytes=2, milliseconds=1)).candidates[0].cost
    assert cost == pytest.approx((0.125**2 * 2) ** (1 / 3))


def test_what_loses_too_much_is_refused_however_cheap_it_is_and_says_why() -> None:
    choice = choose("sft", ROWS, rule(0.0))
    assert choice.name == "bf16"
    reasons = {candidate.name: candidate.reason for candidate in choice.candidates}
    assert reasons["nf4"].startswith("loses +2.00% against the original: more than the 0.00% more bits per byte that the rule allows")
    assert reasons["bf16"].endswith("0.50 of its megabytes and 1.00 of its milliseconds cost 0.71")
    assert choose("sft", {"nf4": ROWS["nf4"]}, rule(0.0)).name == "sft"


def test_a_bundle_that_predicts_better_than_its_original_is_allowed_and_wins_a_tie() -> None:
    rows = {"worse": row(2.001, 4.0, 4.0), "better": row(1.999, 4.0, 4.0)}
    assert choose("sft", rows, rule(0.005)).name == "better"


def test_nothing_to_choose_from_and_missing_numbers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"nothing in params\.yaml: quantize is made from 'dpo'"):
        choose("dpo", {}, rule(0.005))
    lost = {key: value for key, value in ROWS["nf4"].items() if key != "p50_ms"}
    with pytest.raises(ValueError, match="measurements of 'nf4' have no 'p50_ms'; dvc repro quantize@nf4"):
        choose("sft", {"nf4": lost}, rule(0.005))
    with pytest.raises(ValueError, match="size_mb of 'nf4' is 0 and the original's 8; both must be above 0"):
        choose("sft", {"nf4": row(2.0, 0.0, 1.0)}, rule(0.005))


def test_a_rule_in_which_nothing_counts_is_refused() -> None:
    with pytest.raises(ValidationError, match="both 0, so nothing would tell candidates apart"):
        ServeWeights(megabytes=0.0, milliseconds=0.0)


def test_the_frontier_holds_what_nothing_else_beats_in_both() -> None:
    points = {"fp32": (8.0, 2.0), "bf16": (4.0, 2.0), "int8": (2.0, 2.004), "nf4": (1.0, 2.04), "int4": (1.0, 2.1), "bad": (3.0, 2.01)}
    assert figures.pareto(points) == ["nf4", "int8", "bf16"]  # fp32 is beaten: bf16 loses nothing and is smaller


def test_the_picture_has_a_row_of_panels_for_each_original(tmp_path: Path) -> None:
    one = figures.quantization(tmp_path / "one", ROWS)
    two = figures.quantization(tmp_path / "two", ROWS | {"base_nf4": row(2.1, 1.0, 8.0) | {"model": "base"}})
    again = figures.quantization(tmp_path / "again", ROWS)
    assert one.name == "quantization.png"
    assert one.read_bytes() == again.read_bytes()
    assert height(two) == 2 * height(one)


def test_the_report_says_on_how_much_of_the_text_the_schemes_were_scored() -> None:
    page = pages.environment().from_string('{% import "_tables.md.j2" as tables %}{{ tables.scored(params) }}')
    entries = {"int8": {"evaluate_tokens": 20_000}, "nf4": {"evaluate_tokens": 20_000}}
    said = page.render(params={"quantize": entries, "evaluate": {"kl_tokens": 4_000}})
    assert said.startswith("Bits per byte are of the first 20,000 tokens of the held-out text, KL and first choices of the first 4,000;")


def height(picture: Path) -> int:
    """Pixels, from the header of a PNG file."""
    return int.from_bytes(picture.read_bytes()[20:24], "big")
