"""From numbers to pages: nothing typed, nothing blank, and the same numbers always give the same bytes."""

from __future__ import annotations

from pathlib import Path

import jinja2
import numpy as np
import pytest

from llm_from_scratch.report import figures, gather, pages


def test_a_marked_block_is_filled_and_the_rest_is_left_as_it_was() -> None:
    text = "before\n<!-- begin ladder -->\nold\nlines\n<!-- end ladder -->\nafter\n<!-- begin other -->\n<!-- end other -->\n"
    filled = pages.fill_blocks(text, lambda name: f"new {name}\n\n")
    assert filled == (
        "before\n<!-- begin ladder -->\nnew ladder\n<!-- end ladder -->\nafter\n<!-- begin other -->\nnew other\n<!-- end other -->\n"
    )
    assert pages.fill_blocks(filled, lambda name: f"new {name}") == filled


def test_a_number_the_run_does_not_have_is_an_error_and_never_a_blank() -> None:
    with pytest.raises(jinja2.UndefinedError):
        pages.environment().from_string("{{ m.ladder.gpt.val_bpb | fixed }}").render(m={"ladder": {}})


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ 0.1234 | percent }}", "12.3%"), ("{{ 1234567.8 | number }}", "1,234,568"), ("{{ 1.23456 | fixed }}", "1.235")],
)
def test_numbers_are_written_for_people(template: str, said: str) -> None:
    assert pages.environment().from_string(template).render() == said


def test_a_sample_cannot_close_the_fence_around_it() -> None:
    said = pages.environment().from_string("{{ text | fenced }}").render(text="a\n```\n# not a heading")
    assert said.count("```") == 2


def test_floats_are_cut_to_six_digits_wherever_they_stand() -> None:
    tree = {"a": 1.23456789, "b": [0.000123456789, 3], "c": {"d": "text", "e": True, "f": 123456789.0}}
    assert gather.rounded(tree) == {"a": 1.23457, "b": [0.000123457, 3], "c": {"d": "text", "e": True, "f": 123457000.0}}


def test_the_rungs_that_do_not_beat_the_one_before_are_admitted_and_the_ngram_is_no_rung_to_beat() -> None:
    bits = {"ngram": 2.0, "bigram": 3.6, "mlp": 2.5, "attention": 2.6, "gpt": 2.2, "gpt_bpe": 2.2}
    assert gather.ladder_faults(bits, honest="ngram") == ["attention", "gpt_bpe"]


def test_a_stage_that_left_no_measurements_is_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dvc repro train@gpt makes them"):
        gather.measurements(tmp_path, "train", ["gpt"])


def test_a_curve_is_read_with_its_gaps(tmp_path: Path) -> None:
    (tmp_path / "curve.csv").write_text("step,val_bpb\n20,\n40,2.5\n")
    rows = gather.curve(tmp_path / "curve.csv")
    assert np.isnan(rows[0]["val_bpb"])
    assert rows[1] == {"step": 40.0, "val_bpb": 2.5}


def test_equal_numbers_give_equal_pictures(tmp_path: Path) -> None:
    bits = {"ngram": 2.0, "bigram": 3.6, "mlp": 2.5}
    first = figures.ladder(tmp_path / "one", bits, honest="ngram").read_bytes()
    assert figures.ladder(tmp_path / "two", bits, honest="ngram").read_bytes() == first
    assert figures.ladder(tmp_path / "three", {**bits, "mlp": 2.4}, honest="ngram").read_bytes() != first


def test_a_heatmap_is_drawn_for_tokens_of_any_script(tmp_path: Path) -> None:
    maps = np.tril(np.ones((2, 3, 4, 4), dtype=np.float32)) / np.arange(1, 5)[:, None]
    picture = figures.heatmaps(tmp_path, "gpt", maps, ["a", " ", "\n", "é"])
    assert picture.read_bytes().startswith(b"\x89PNG")
