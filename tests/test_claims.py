"""Every number that a reader meets is one of reports/metrics.json: the committed pages are made again from it, and compared.

README.md's marked blocks, SUMMARY.md and the posts need nothing else but the benchmarks' tables: what was measured by hand lies in
reports/benchmarks, as JSON, and fills tables of weeks and README in the same way. A card has its bundle's facts too, and a page of a week
shows what models wrote; neither is in git, so a card's facts are taken from the card and checked where metrics.json has them, and a page
may say anything where it shows a sample. All else must be there, to the letter.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from ruamel.yaml import YAML

from llm_from_scratch import config
from llm_from_scratch.report import book, cards, gather, pages

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "reports"
STALE = "was typed, or metrics.json is newer: dvc repro, then python -m stages readme"
WEEKS = [f"week_{week:02}" for week in range(1, book.WEEKS + 1)]
CARDS = sorted(path.stem for path in (REPORTS / "cards").glob("*.md") if path.stem != "retriever")
POSTS = sorted(path.stem for path in (ROOT / "docs" / "posts").glob("*.md"))
BLOCKS = re.findall(r"<!-- begin ([\w-]+) -->", (ROOT / "README.md").read_text(encoding="utf-8"))
QUESTIONS = 8
"""As many as `evaluate` shows."""
GAP = "\0"
MEASURED = re.compile(r"(?<![\w.@-])(?:\d+\.\d+|\d{1,3}(?:,\d{3})+)(?![\w.-]*\w)|\d+ ?%")
"""A number with a decimal point, with thousands, or a share: such a one was measured."""
TYPED = {"README.md": {"3.11"}, "_tables.md.j2": {"95%", "50%"}}
"""Numbers that are no measurements: a version, an interval's name, a coin."""


class Sample(str):
    """Stands where a page shows what a model wrote, or a number of that text."""

    __slots__ = ()

    def __format__(self, form: str) -> str:
        return GAP


def row_of(names: str) -> dict[str, Any]:
    return {name: Sample(GAP) for name in names.split()}


@cache
def params() -> config.Params:
    return config.parse(YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8")), "params.yaml")


@cache
def values() -> dict[str, Any]:
    """What the templates know, with gaps for what is not in git."""
    metrics = json.loads((REPORTS / "metrics.json").read_text(encoding="utf-8"))
    told = row_of("prompt before after wanted gold_before gold")
    samples: dict[str, Any] = {name: Sample(GAP) for name in (*params().train, *params().quantize)}
    samples |= {name: [told] * settings.samples for name, settings in params().finetune.items()}
    asked = [row_of("question text wanted") | {"citations": []}] * QUESTIONS
    return book.Story(metrics, params().model_dump(), {}, samples, asked, gather.benchmarks(REPORTS / "benchmarks")).values()


def astray(said: str, rendered: str) -> list[str]:
    """The lines that `rendered` has and `said` does not have in their place; a gap in `rendered` may be any text."""
    at, parts = 0, rendered.split(GAP)
    for number, part in enumerate(parts):
        found = said.find(part, at)
        if number == len(parts) - 1:
            found = len(said) - len(part) if said.endswith(part) and len(said) - len(part) >= at else -1
        if found < 0 or (number == 0 and found > 0):
            return [line for line in part.splitlines() if line not in said] or [part]
        at = found + len(part)
    return []


def typed(name: str, text: str) -> list[str]:
    """Measurements in what a person wrote, each with what is before it; code, addresses and what a template fills in left out."""
    for left_out in (r"```.*?```", r"`[^`]*`", r"\{[{%].*?[%}]\}", r"\]\([^)]*\)", r"\b\d+(?:\.\d+){3}(?::\d+)?"):
        text = re.sub(left_out, " ", text, flags=re.DOTALL)
    found = (number for number in MEASURED.finditer(text) if number[0] not in TYPED.get(name, ()))
    return [text[max(0, number.start() - 30) : number.end()] for number in found]


# What is committed.


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_the_readme_is_what_the_template_makes_of_the_numbers(block: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = next(found[0] for found in pages.BLOCK.finditer(readme) if found["name"] == block)
    filled = pages.fill_blocks(said, lambda name: pages.render(f"readme_{name}.md.j2", values()))

    assert astray(said, filled) == [], f"README.md, {block}: {STALE}"


def test_the_summary_is_what_the_template_makes_of_the_numbers() -> None:
    assert astray((ROOT / "SUMMARY.md").read_text(encoding="utf-8"), pages.render("summary.md.j2", values())) == [], f"SUMMARY.md: {STALE}"


@pytest.mark.parametrize("post", POSTS)
def test_a_post_is_what_its_template_makes_of_the_numbers(post: str) -> None:
    said = (ROOT / "docs" / "posts" / f"{post}.md").read_text(encoding="utf-8")
    assert astray(said, pages.render(f"posts/{post}.md.j2", values())) == [], f"docs/posts/{post}.md: {STALE}"


def test_every_post_that_is_written_is_there_to_be_read() -> None:
    assert [f"posts/{post}.md.j2" for post in POSTS] == pages.environment().list_templates(
        filter_func=lambda name: name.startswith("posts/")
    )


@pytest.mark.parametrize("page", ["report", *WEEKS])
def test_a_page_of_the_report_is_what_its_template_makes_of_the_numbers_but_for_the_samples(page: str) -> None:
    place = "weeks/" if page in WEEKS else ""
    said = (REPORTS / f"{place}{page}.md").read_text(encoding="utf-8")

    assert astray(said, pages.render(f"{place}{page}.md.j2", values())) == [], f"{page}.md: {STALE}"


@pytest.mark.parametrize("model", CARDS)
def test_a_card_is_what_its_template_makes_of_the_numbers(model: str, tmp_path: Path) -> None:
    said = (REPORTS / "cards" / f"{model}.md").read_text(encoding="utf-8")
    manifest = told_by(said)
    cards.write_model(tmp_path / "card.md", values(), model, manifest)

    assert astray(said, (tmp_path / "card.md").read_text(encoding="utf-8")) == [], f"cards/{model}.md: {STALE}"
    metrics = values()["m"]
    assert manifest.digest == metrics["digests"][model]
    rows = [metrics[part][model] for part in ("ladder", "finetune", "alignment", "quantize") if model in metrics[part]]
    measured = {name.replace("_", " "): str(value) for name, value in rows[0].items()}
    assert [name for name, value in manifest.facts.items() if measured.get(name, value) != value] == []
    assert [
        role for role in {"base", "model", "guide"} & set(manifest.parents) if manifest.parents[role] not in metrics["digests"].values()
    ] == []


def test_the_retrievers_card_is_what_its_template_makes_of_the_numbers(tmp_path: Path) -> None:
    said = (REPORTS / "cards" / "retriever.md").read_text(encoding="utf-8")
    cards.write_retriever(tmp_path / "card.md", values())
    assert astray(said, (tmp_path / "card.md").read_text(encoding="utf-8")) == [], f"cards/retriever.md: {STALE}"


def told_by(card: str) -> SimpleNamespace:
    """The manifest of a bundle as its card has it."""
    kind = ModelCard(card).data.tags[-1]
    table = card.partition("|---|---|\n")[2].partition("\n\n")[0]
    rows = dict(line.strip("| ").split(" | ", 1) for line in table.splitlines())
    made_by, digest = (rows.pop(name).strip("`") for name in ("made by", "digest"))
    parents = {name.removeprefix("from "): rows.pop(name).strip("`") for name in list(rows) if name.startswith("from ")}
    return SimpleNamespace(kind=kind, made_by=made_by.removeprefix("dvc repro "), digest=digest, parents=parents, facts=rows)


def test_nobody_types_a_measurement_into_the_readme() -> None:
    by_hand = pages.fill_blocks((ROOT / "README.md").read_text(encoding="utf-8"), lambda name: "")
    assert typed("README.md", by_hand) == []


@pytest.mark.parametrize("template", pages.environment().list_templates(["j2"]))
def test_nobody_types_a_measurement_into_a_template(template: str) -> None:
    assert pages.environment().loader is not None
    source, _, _ = pages.environment().loader.get_source(pages.environment(), template)
    assert typed(template, source) == []


# That this would notice.


def test_one_digit_of_any_number_in_a_block_is_noticed() -> None:
    for block in BLOCKS:
        made = pages.render(f"readme_{block}.md.j2", values())
        assert astray(made, made) == []
        for found in re.finditer(r"\d", made):
            other = made[: found.start()] + str((int(found[0]) + 1) % 10) + made[found.end() :]
            assert astray(other, made), f"{block}: {other[found.start() - 20 : found.end() + 20]}"


def test_one_digit_between_samples_is_noticed_and_a_sample_may_say_anything() -> None:
    made = pages.render("weeks/week_04.md.j2", values())
    said = made.replace(GAP, "To be, or\n\n## 3.14 to be")
    assert astray(said, made) == []
    number = f"{values()['m']['ladder']['gpt']['val_bpb']:.3f}"
    assert number in made
    assert astray(said.replace(number, "0.001"), made)


def test_one_digit_of_what_was_measured_by_hand_is_noticed() -> None:
    made = pages.render("weeks/week_07.md.j2", values())
    rows = values()["benchmarks"]["precision"]["rows"]
    number = f"{rows[0]['loss']:.4g}"
    assert number in made
    assert astray(made.replace(number, number[:-1] + str((int(number[-1]) + 1) % 10)), made)


@pytest.mark.parametrize("said", ["It takes 12.5 seconds.", "It has 852,864 parameters.", "Right in 31% of them.", "a **2.013**"])
def test_a_measurement_in_prose_is_noticed(said: str) -> None:
    assert typed("README.md", said)


@pytest.mark.parametrize(
    "said", ["Python 3.11", "see `1.5`", "127.0.0.1:3000", "```\n1.5\n```", "[all](week_1.5.md)", "{{ 1.5 | fixed }}", "week 5."]
)
def test_a_version_code_and_an_address_are_no_measurements(said: str) -> None:
    assert typed("README.md", said) == []
