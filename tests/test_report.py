"""From numbers to pages: nothing typed, nothing blank, and the same numbers always give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import numpy as np
import pytest
from ruamel.yaml import YAML

from llm_from_scratch.report import book, cards, compared, figures, gather, pages

ROOT = Path(__file__).parent.parent
TEMPLATES = Path(pages.__file__).parent / "templates"


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
    [
        ("{{ 0.1234 | percent }}", "12.3%"),
        ("{{ 1234567.8 | number }}", "1,234,568"),
        ("{{ 1.23456 | fixed }}", "1.235"),
        ("{{ -0.1234 | signed }}", "-12.3%"),
        ("{{ 0.00012 | signed(3) }}", "+0.012%"),
        ("{{ 8 | log2 }}", "3.0"),
    ],
)
def test_numbers_are_written_for_people(template: str, said: str) -> None:
    assert pages.environment().from_string(template).render() == said


@pytest.mark.parametrize(
    ("cell", "said"),
    [(0.17860912, "0.1786"), (29352.9, "29,353"), (16691, "16,691"), (None, ""), ("2.46 … 2.47", "2.46 … 2.47"), (True, "True")],
)
def test_a_cell_measured_by_hand_is_written_for_people_whatever_it_is(cell: object, said: str) -> None:
    assert pages.short(cell) == said


def test_a_table_measured_by_hand_has_the_columns_that_were_asked_for_and_says_by_what() -> None:
    told = {
        "title": "Speed",
        "machine": {"cpu": "Z80", "cores": 1, "torch": "0", "bf16_units": True},
        "rows": [{"what": "ours", "ms": 1.5}, {"what": "theirs"}],
    }
    source = '{% import "_tables.md.j2" as tables %}{{ tables.measured("speed", told, ["what", "ms"]) }}'
    said = pages.environment().from_string(source).render(told=told).splitlines()
    assert said[:4] == ["| what | ms |", "|---|---:|", "| ours | 1.5 |", "| theirs |  |"]
    assert "`python -m benchmarks.speed` (Z80, 1 cores with units for bf16, torch 0)" in said[-1]
    assert "[Speed](../benchmarks/speed.md)" in said[-1]


def test_an_encoding_is_told_by_its_length_and_its_beginning(tmp_path: Path) -> None:
    tokens = [{"piece": "a", "id": place, "bytes": 1} for place in range(20)]
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe" / "encoding.json").write_text(json.dumps([{"title": "English", "characters": 20, "tokens": tokens}]))
    [row] = gather.encodings(tmp_path, ["bpe"])["bpe"]
    assert (row["title"], row["tokens"], row["first"]) == ("English", 20, tokens[:12])


def test_benchmarks_are_read_by_name_and_none_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text('{"rows": []}')
    (tmp_path / "speed.md").write_text("# Speed")
    assert gather.benchmarks(tmp_path) == {"speed": {"rows": []}}
    assert gather.benchmarks(tmp_path / "none") == {}


@pytest.mark.parametrize("week", range(1, book.WEEKS + 1))
def test_every_week_says_what_the_idea_is_what_it_cannot_do_and_what_changed(week: int) -> None:
    source = (TEMPLATES / "weeks" / f"week_{week:02}.md.j2").read_text(encoding="utf-8")
    headings = [line for line in source.splitlines() if line.startswith("## ")]
    assert {"## The idea", "## What it can't do", "## What changed since last week"} <= set(headings)
    assert any(heading.startswith("## This run") for heading in headings) or week in (11, 12)
    assert "src/llm_from_scratch/" in source
    assert "```" in source, "an equation or a few lines of code"


def test_the_metadata_of_a_card_names_its_results_for_the_hub() -> None:
    [bits, accuracy] = cards.results({"val_bpb": 1.9, "accuracy": 0.8, "seconds": 3}, "wikipedia")
    assert (bits.metric_type, bits.metric_value, bits.dataset_name) == ("bits_per_byte", 1.9, "wikipedia, held out")
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.8)


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


def test_what_rebuilds_are_compared_by_has_no_clock_in_it() -> None:
    """`dvc metrics diff` used to list some two hundred times that differ from run to run."""
    metrics = json.loads((ROOT / "reports" / "metrics.json").read_text(encoding="utf-8"))
    kept = compared.headline(metrics)
    names = {name for section in kept.values() for row in section.values() for name in row}
    assert kept["ladder"]["gpt"] == {"val_bpb": metrics["ladder"]["gpt"]["val_bpb"]}
    assert not [name for name in names if "seconds" in name or "_s" in name or "ms" in name]
    assert all(row for section in kept.values() for row in section.values())


def test_every_bar_that_dvc_draws_is_in_its_table() -> None:
    metrics = json.loads((ROOT / "reports" / "metrics.json").read_text(encoding="utf-8"))
    drawn = [plot for entry in YAML(typ="safe").load(ROOT / "dvc.yaml")["plots"] for plot in entry.values()]
    bars = [(file, plot["x"], label) for plot in drawn if plot["template"] == "bars" for file, label in plot["y"].items()]
    made = {f"artifacts/plots/{name}.json": rows for name, rows in compared.tables(metrics).items()}
    assert {file for file, _, _ in bars} == made.keys()
    for file, value, label in bars:
        assert all(isinstance(row[value], float) and row[label] for row in made[file])
    assert all(plot["x_label"] and plot["y_label"] for plot in drawn)
