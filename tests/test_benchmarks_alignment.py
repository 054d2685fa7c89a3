"""The benchmarks of alignment run from end to end at toy size. What they measure there means nothing, but what they count must be right."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llm_from_scratch import bundle
from llm_from_scratch.data.documents import Document, with_splits, write_documents
from llm_from_scratch.data.preferences import read_preferences
from stages.__main__ import read_yaml
from tests import adapting_child
from tests.test_alignment import REWARD
from tests.tiny import SENTENCES, tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the benchmarks read of a folder where make repro has run; its judge likes lengths, as gibberish has no sentiment."""
    root = tmp_path_factory.mktemp("project")
    params: Any = read_yaml(ROOT / "params.yaml")
    params["finetune"]["reward"]["judge"] = {"kind": "length", "characters": 40}
    with (root / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(params, file)
    tiny_model(root / "artifacts/models/base")
    corpus = root / "artifacts/raw/wikipedia"
    corpus.mkdir(parents=True)
    made = [Document(f"{number}", "", f"{number}: {SENTENCES[number % 4]} {SENTENCES[number % 3]}") for number in range(80)]
    write_documents(corpus / "documents.jsonl", with_splits(made, 0.4))
    bundle.seal(corpus, "corpus", "download@wikipedia")
    adapting_child.run(root, REWARD | {"records": "wikipedia", "prompts": 20})
    return root


def started(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def quick(name: str, project: Path, out: Path, *options: str) -> dict[str, Any]:
    """The table that `python -m benchmarks.NAME --quick` writes, as JSON."""
    done = started(name, "--quick", "--project", str(project), "--out", str(out), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (out / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert str(project) not in text
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_each_policy_has_a_row_with_the_middle_and_the_extremes_of_its_seeds(project: Path, tmp_path: Path) -> None:
    before = {path: bundle.verify(path).digest for path in (project / "artifacts/models").iterdir()}
    facts = quick("alignment", project, tmp_path, "--seeds", "1", "2", "--policies", "dpo", "grpo")
    rows = {row["policy"]: row for row in facts["rows"]}
    assert list(rows) == ["dpo", "grpo"]
    assert facts["settings"]["seeds"] == [1, 2]
    assert facts["settings"]["prompts"] == 8
    for row in rows.values():
        median, low, high = (float(part) for part in row["kl"].replace("(", "").replace(")", "").replace("…", "").split())
        assert low <= median <= high
        assert float(row["before"].split()[0]) == pytest.approx(float(rows["dpo"]["before"].split()[0]))  # one start for all
    assert {path: bundle.verify(path).digest for path in (project / "artifacts/models").iterdir()} == before


@pytest.mark.slow
def test_each_reward_model_has_its_row_its_curves_and_what_is_finished_is_not_made_again(project: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    facts = quick("overoptimization", project, tmp_path, "--pairs", "4", "0", "--keep", str(kept))
    pairs = read_preferences(project / "artifacts/models/reward/pairs.jsonl")
    assert [row["pairs"] for row in facts["rows"]] == [4, pytest.approx(0.9 * len(pairs), abs=2)]
    for run in json.loads(kept.read_text(encoding="utf-8")):
        assert len(run["policy"]) == 3  # the start, and a look every other of four steps
        assert run["policy"][0]["kl"] == pytest.approx(0, abs=1e-4)
        assert [point["n"] for point in run["best_of"]] == [1, 2, 4, 8]
        assert run["best_of"][0]["gold"] == pytest.approx(0, abs=1e-9)  # in deviations from the start's own mean
        proxy = [point["learned"] for point in run["best_of"]]
        assert proxy == sorted(proxy)
    picture = (tmp_path / "overoptimization.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert width == 836  # a column for each reward model
    assert height == 616

    finished = kept.read_bytes()
    quick("overoptimization", project, tmp_path, "--pairs", "4", "0", "--keep", str(kept))
    assert kept.read_bytes() == finished
    assert (tmp_path / "overoptimization.png").read_bytes() == picture


def test_a_folder_where_nothing_was_built_is_named_in_one_line(tmp_path: Path) -> None:
    for name, wanted in (("alignment", "base"), ("overoptimization", "reward")):
        done = started(name, "--project", str(tmp_path))
        assert done.returncode == 1
        assert done.stderr.strip() == f"no artifacts/models/{wanted} in {tmp_path.name}; run make repro there first"
