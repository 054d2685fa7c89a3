"""The real dvc.yaml at toy size, in a clone of its own: all of it, again for nothing, and after a change no more than needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch import bundle
from pipelines import certify, dvc

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(1500)]  # on a busy core the toy graph takes ten minutes
DOWNSTREAM_OF_BASE = {
    "train@base",
    *(f"quantize@base_{scheme}" for scheme in ("bf16", "int8", "int8_dynamic", "int8_weight", "nf4")),
    *("quantize@chat_int8", "quantize@chat_int8_weight"),
    *(f"finetune@{name}" for name in ("sft", "lora", "qlora", "reward", "dpo", "ppo", "grpo")),
    "evaluate",
}


def run(clone: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {
        **dvc.environment(),
        "PYTHONPATH": str(clone / "src"),
        "MLFLOW_TRACKING_URI": "sqlite:///var/mlflow.db",
        "REBUILD_ID": "test",
    }
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False, timeout=1400)
    assert not check or done.returncode == 0, f"{' '.join(command[-4:])}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def git(clone: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=clone, check=True, capture_output=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tree as it is now, uncommitted changes too, in a repository of its own. What this checkout has downloaded is its mirror."""
    folder = tmp_path_factory.mktemp("graph") / "clone"
    mirror = certify.collected(ROOT / "var" / "downloads", folder.parent / "mirror")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    git(folder.parent, "init", "--quiet", "--initial-branch=main", "clone")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "as it is")
    os.environ["LLM_MIRROR"] = str(mirror)
    yield folder
    del os.environ["LLM_MIRROR"]


@pytest.fixture(scope="module")
def built(clone: Path) -> Path:
    run(clone, sys.executable, "-m", "pipelines", "experiment", "smoke")
    return clone


def test_every_key_that_is_promised_is_measured(built: Path) -> None:
    metrics = json.loads((built / "reports" / "metrics.json").read_text())
    for rung in ("ngram", "bigram", "mlp", "attention", "gpt", "gpt_bpe", "base"):
        assert {"val_loss", "val_bpb", "val_ppl", "tok_per_s"} <= set(metrics["ladder"][rung]), rung
    for name in ("base_int8", "base_nf4", "chat_int8"):
        assert {"size_mb", "p50_ms", "kl", "val_bpb"} <= set(metrics["quantize"][name]), name
    for condition in ("none", "random", "retrieved", "oracle"):
        assert {"accuracy", "f1"} <= set(metrics["rag"][condition]), condition
    assert {"sft", "lora", "qlora"} <= set(metrics["finetune"])
    assert {"accuracy", "calibration", "best_of"} <= set(metrics["alignment"]["reward"])
    for policy in ("dpo", "ppo", "grpo"):
        assert {"gold", "gold_before", "learned", "kl", "val_ppl", "distinct_2"} <= set(metrics["alignment"][policy]), policy
    assert metrics["served"]["model"] in {"sft", "chat_int8", "chat_int8_weight"}


def test_every_measurement_is_documented(built: Path) -> None:
    metrics = json.loads((built / "reports" / "metrics.json").read_text())
    rows = [row.split("|")[1] for row in (ROOT / "docs" / "metrics.md").read_text().splitlines() if row.startswith("| `")]
    keys = [key for row in rows for cell in re.findall(r"`([a-z]+\.[^`]+)`", row) for key in spelled_out(cell)]
    known = [re.compile(re.sub(r"<[^>]+>", "[^.]+", key.replace(".", r"\."))) for key in keys]
    for leaf in leaves(metrics):
        plain = re.sub(r"_(fp32|before)$", "", leaf)
        assert any(pattern.fullmatch(name) for pattern in known for name in (leaf, plain)), f"docs/metrics.md does not speak of {leaf}"


def spelled_out(key: str) -> list[str]:
    """`a.{b,c}` as a.b and a.c."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", key)
    return [found[1] + part + found[3] for part in found[2].split(",")] if found else [key]


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key


def test_every_model_is_sealed_and_the_numbers_carry_its_digest(built: Path) -> None:
    metrics = json.loads((built / "reports" / "metrics.json").read_text())
    for name, digest in metrics["digests"].items():
        assert bundle.verify(built / "artifacts" / "models" / name).digest == digest


def test_all_tokenizers_of_a_corpus_hold_out_the_same_bytes(built: Path) -> None:
    facts = [bundle.read_manifest(built / "artifacts" / "tokens" / name).facts for name in ("shakespeare_char", "shakespeare_bpe")]
    assert facts[0]["val_sha256"] == facts[1]["val_sha256"]


def test_the_report_speaks_of_this_run_and_its_pictures_exist(built: Path) -> None:
    report = (built / "reports" / "report.md").read_text()
    metrics = json.loads((built / "reports" / "metrics.json").read_text())
    assert f"{metrics['ladder']['gpt']['val_bpb']:.3f}" in report
    for page in [built / "README.md", built / "SUMMARY.md", *(built / "reports").rglob("*.md")]:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)\)", prose):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name} links to {link}"
    assert len(list((built / "reports" / "weeks").glob("week_*.md"))) == 12


def test_a_second_run_has_nothing_to_do(built: Path) -> None:
    said = run(built, *dvc.command("repro")).stdout
    assert "Running stage" not in said
    assert "up to date" in said


def test_a_changed_rate_reruns_only_what_stands_on_it(built: Path) -> None:
    said = run(built, *dvc.command("status")).stdout
    assert "up to date" in said
    params = built / "params.yaml"
    text = params.read_text()
    place = text.index("learning_rate", text.index("\n  base:"))
    params.write_text(text[:place] + re.sub(r"learning_rate: [\d.e-]+", "learning_rate: 0.0123", text[place:], count=1))
    try:
        said = run(built, *dvc.command("status")).stdout
        assert re.findall(r"^(\S+):$", said, re.MULTILINE) == ["train@base"]
        stale = run(built, *dvc.command("repro", "--dry", "--force-downstream")).stdout
        assert set(re.findall(r"^Running stage '(.+)':", stale, re.MULTILINE)) == DOWNSTREAM_OF_BASE
    finally:
        params.write_text(text)


def test_every_stage_left_a_nested_run_and_its_datasets(built: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{built}/var/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "llm-from-scratch"]
    runs = {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("rebuild test")
    assert {"train@base", "quantize@base_nf4", "finetune@lora", "index", "evaluate"} <= set(runs)
    assert {found.data.tags["mlflow.parentRunId"] for found in runs.values()} == {parent.info.run_id}
    (tokens,) = runs["train@base"].inputs.dataset_inputs
    assert tokens.dataset.digest in (built / "dvc.lock").read_text()
    assert {"val_loss", "val_bpb", "val_ppl"} <= set(runs["train@base"].data.metrics)


def test_finished_models_are_registered_with_their_card_and_one_is_champion(built: Path) -> None:
    from mlflow import MlflowClient

    run(built, sys.executable, "-m", "pipelines", "promote")
    uri = f"sqlite:///{built}/var/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    for name in ("base", "sft", "lora", "chat_int8"):
        champion = client.get_model_version_by_alias(f"llm-from-scratch-{name}", "champion")
        assert champion.tags["digest"] == bundle.read_manifest(built / "artifacts" / "models" / name).digest
        assert champion.description.startswith(f"# {name}\n")
    retriever = client.get_model_version_by_alias("llm-from-scratch-retriever", "champion")
    assert retriever.tags["digest"] == bundle.read_manifest(built / "artifacts" / "index").digest
    assert retriever.description.startswith("# retriever\n")
    again = run(built, sys.executable, "-m", "pipelines", "promote").stdout
    assert set(re.findall(r"version (\d+.*)", again)) == {"1 is the champion already"}, "the same bundles are the same versions"
    kept = [file for file in (built / "var" / "mlruns").rglob("versions/*/*/*") if file.is_file()]
    assert sum(file.stat().st_size for file in kept) < 10**6, "a version holds no weights"


def test_what_is_registered_answers_through_mlflow(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{built}/var/mlflow.db")
    questions = ["What is a river?", "Who is Ada Lovelace?"]
    for name in ("sft", "served", "retriever", "reward"):
        answers = mlflow.pyfunc.load_model(f"models:/llm-from-scratch-{name}@champion").predict(questions)
        assert len(answers) == 2
        assert all(isinstance(answer, str) for answer in answers)


def test_dvc_compares_and_draws_what_evaluate_left(built: Path) -> None:
    shown = json.loads(run(built, *dvc.command("metrics", "show", "--json")).stdout)
    kept = shown[""]["data"]["reports/headline.json"]["data"]
    assert kept["ladder"].keys() == {"ngram", "bigram", "mlp", "attention", "gpt", "gpt_bpe", "base"}
    drawn = json.loads(run(built, *dvc.command("plots", "show", "--json")).stdout)
    assert not drawn.get("errors")
    assert len(drawn["data"]) == (built / "dvc.yaml").read_text().count("template:")


@pytest.mark.long
def test_a_sweep_leaves_comparable_runs_in_mlflow_and_a_table_of_dvcs(built: Path) -> None:
    from mlflow import MlflowClient

    (built / "profiles" / "grids" / "toy.yaml").write_text("train: {base: {learning_rate: [0.011, 0.022]}}")
    said = run(built, sys.executable, "-m", "pipelines", "sweep", "toy", "train@base", "--name", "tried").stdout
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| tried-")]
    assert [row[0] for row in rows] == ["| tried-1", "| tried-2"]
    assert {"0.011", "0.022"} <= {cell.strip(" |") for row in rows for cell in row}

    client = MlflowClient(tracking_uri=f"sqlite:///{built}/var/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "llm-from-scratch"]
    runs = client.search_runs([experiment.experiment_id], "tags.rebuild = 'tried' and tags.stage = 'train'")
    assert {run.data.tags["experiment"]: run.data.params["learning_rate"] for run in runs} == {"tried-1": "0.011", "tried-2": "0.022"}
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs}) == 1
    assert all("val_bpb" in run.data.metrics for run in runs)


def test_training_killed_in_the_middle_goes_on_and_leaves_no_half_bundle(built: Path) -> None:
    before = bundle.read_manifest(built / "artifacts" / "models" / "base").files["model.safetensors"]
    shutil.rmtree(built / "artifacts" / "models" / "base")
    command = [sys.executable, "-m", "stages", "train", "base"]
    environment = {**dvc.environment(), "PYTHONPATH": str(built / "src"), "MLFLOW_TRACKING_URI": ""}
    process = subprocess.Popen(command, cwd=built, env=environment, start_new_session=True)
    runs = built / "runs"
    deadline = time.monotonic() + 120
    while not any(runs.glob("*/[0-9]*/manifest.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (built / "artifacts" / "models" / "base").exists()
    run(built, *command)
    assert json.loads((built / "artifacts" / "logs" / "train" / "base" / "metrics.json").read_text())["resumed_at"] > 0
    assert bundle.verify(built / "artifacts" / "models" / "base").files["model.safetensors"] == before
    assert not list((built / "artifacts").rglob("*.partial"))


@pytest.mark.parametrize(
    ("folder", "file"), [("models/base", "model.safetensors"), ("tokens/wikipedia_bpe", "train.bin"), ("index", "faiss.index")]
)
def test_a_damaged_output_is_refused_by_name_and_mended_by_the_command_it_names(built: Path, folder: str, file: str) -> None:
    path = built / "artifacts" / folder / file
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    stage = {"models/base": ("quantize", "base_int8"), "tokens/wikipedia_bpe": ("train", "base"), "index": ("evaluate",)}[folder]
    done = run(built, sys.executable, "-m", "stages", *stage, check=False)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert file in line
    mend = line.split("rebuild it with: dvc ")[1].split()
    run(built, *dvc.command(*mend))
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(whole).digest()  # bytes as such take pytest minutes to compare
    bundle.verify(built / "artifacts" / folder)


@pytest.mark.parametrize(
    "drills",
    [("read-only", "two rebuilds"), pytest.param((), marks=pytest.mark.long)],
    ids=["two of them", "all"],
)
def test_drills_lose_nothing(built: Path, tmp_path: Path, drills: tuple[str, ...]) -> None:
    only = ["--only", *drills] if drills else []
    run(built, sys.executable, "-m", "drills", "--built", str(built), "--out", str(tmp_path), *only)
    rows = json.loads((tmp_path / "drills.json").read_text())["rows"]
    assert len(rows) >= len(drills)
    assert {row["what is lost"] for row in rows if not row["what you see"].startswith("not held")} <= {
        f"nothing: {count} of {count} digests equal" for count in range(1, 5)
    }


def test_the_readme_is_filled_from_the_run(built: Path) -> None:
    run(built, sys.executable, "-m", "stages", "readme")
    metrics = json.loads((built / "reports" / "metrics.json").read_text())
    assert f"**{metrics['ladder']['gpt']['val_bpb']:.3f}**" in (built / "README.md").read_text()


@pytest.mark.long
def test_a_folder_of_ones_own_takes_the_place_of_wikipedia_and_nothing_is_trained_again(built: Path) -> None:
    from tests.test_rag import write_pdf

    notes = built.parent / "notes"
    notes.mkdir()
    for number in range(12):
        (notes / f"room_{number}.txt").write_text(f"The key of room {number} hangs behind the door with {number} knocks.\n" * 2)
    (notes / "boiler.md").write_text("# Boiler\n\nThe boiler stands in the cellar, behind the red door.\n")
    write_pdf(notes / "manual.pdf", ["Press the green button twice.", "The filter is washed in June, by hand and without soap."])

    said = run(
        built, sys.executable, "-m", "pipelines", "experiment", "own_documents", "--", "-S", f"sources.text_folder.path={notes}"
    ).stdout
    run(built, sys.executable, "-m", "stages", "readme")

    assert set(re.findall(r"^Running stage '(.+)':", said, re.MULTILINE)) == {"download@text_folder", "index", "evaluate"}
    passages = (built / "artifacts" / "index" / "passages.jsonl").read_text()
    assert all(name in passages for name in ("boiler.md", "manual.pdf", "room_3.txt"))
    metrics = json.loads((built / "reports" / "metrics.json").read_text())
    assert metrics["rag"] == metrics["retrieval"] == {}
    for page in ("reports/report.md", "reports/weeks/week_11.md", "README.md"):
        assert "No questions were asked" in (built / page).read_text(), page
