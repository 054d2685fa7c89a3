"""The benchmark of reading runs from end to end at toy size, each variant with the ingredient that it says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reading import CURVE, Recipe, exercises, familiar, variants
from llm_from_scratch import bundle, config
from llm_from_scratch.data.documents import Document, with_splits, write_documents
from llm_from_scratch.training.plan import TrainParams
from stages import tokenize
from stages.__main__ import read_yaml
from tests.test_tokenizing import params

ROOT = Path(__file__).parent.parent


def entries() -> list[Document]:
    return [
        Document(
            f"e{number}",
            f"Thing {number}",
            f"Thing {number} is a wooden thing of the north. It was carried through {number} valleys.",
            description=f"Wooden thing of kind {number}",
            topic="Arts",
        )
        for number in range(80)
    ]


def test_every_variant_differs_from_the_recipe_of_its_time_in_what_it_is_named_for() -> None:
    rung = config.parse(read_yaml(ROOT / "params.yaml"), "params.yaml").train["base"]
    assert isinstance(rung, TrainParams)
    whole, others = Recipe(rung, exercises), variants(Recipe(rung, exercises))
    assert list(others)[: len(CURVE)] == list(CURVE)
    assert others["recipe"] == whole
    ours = others.pop("half the time")
    assert ours.rung.steps * 2 == rung.steps
    assert all(other != ours for other in others.values())
    assert {other.rung.steps for name, other in others.items() if name not in CURVE} == {ours.rung.steps}
    assert others["text alone"].rung.lessons is not None
    assert not others["text alone"].rung.lessons.some

    def taught(recipe: Recipe) -> float:
        lessons = recipe.rung.lessons
        assert lessons is not None
        return lessons.first + (recipe.rung.steps - lessons.first) * lessons.share

    assert taught(others["lessons not first"]) == pytest.approx(taught(ours)), "as many, but elsewhere"


def test_lessons_without_strangers_are_those_with_one_passage() -> None:
    alone, all_of_them = familiar(entries()), exercises(entries())
    assert 0.5 < len(alone) / len(all_of_them) < 0.9
    assert all(record["messages"][0]["content"].count("Thing") <= 2 for record in alone)


@pytest.mark.long
def test_every_variant_has_its_row_and_what_is_finished_is_not_made_again(tmp_path: Path):
    project = tmp_path / "project"
    with bundle.writing(project / "artifacts/raw/wikipedia") as folder:
        write_documents(folder / "documents.jsonl", with_splits(entries(), 0.3))
        bundle.seal(folder, "corpus", "download@wikipedia")
    told = {"corpus": "wikipedia", "vocabulary_from": "wikipedia", "kind": "bpe", "vocab_size": 300, "lessons": True}
    tokenize.run(params(wikipedia_bpe=told), "wikipedia_bpe", project)
    shutil.copy(ROOT / "params.yaml", project)

    def started(*names: str) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.reading", "--quick", "--project", str(project), "--out", str(tmp_path)]
        command += ["--keep", str(tmp_path / "kept.json"), *(["--variants", *names] if names else [])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        return [row["variant"] for row in json.loads((tmp_path / "reading.json").read_text(encoding="utf-8"))["rows"]]

    assert started("text alone", "recipe") == ["recipe", "text alone"]
    assert (tmp_path / "reading.png").exists()
    kept = (tmp_path / "kept.json").read_bytes()
    assert started("recipe") == ["recipe", "text alone"]
    assert (tmp_path / "kept.json").read_bytes() == kept
    assert str(project) not in (tmp_path / "reading.md").read_text(encoding="utf-8")
