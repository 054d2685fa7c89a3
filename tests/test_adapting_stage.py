"""The stage of fine-tuning as a whole: preference files of people through every method, and real kills in the middle of each."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch import bundle
from llm_from_scratch.data.chat import RecordError
from llm_from_scratch.data.documents import Document, with_splits, write_documents
from llm_from_scratch.data.preferences import read_preferences
from llm_from_scratch.evaluation.splits import answerable, split_preferences
from llm_from_scratch.tokenizer import load
from tests.adapting_child import SHARE, run
from tests.test_alignment import DPO, GRPO, PPO, REWARD
from tests.test_finetune import LORA, SFT
from tests.tiny import SENTENCES, tiny_model

SECTIONS = {"sft": SFT, "lora": LORA, "reward": REWARD, "dpo": DPO, "ppo": PPO, "grpo": GRPO}


def section(name: str, corpus: str) -> dict[str, Any]:
    return SECTIONS[name] | {"records": corpus}


def metrics_of(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "artifacts/logs/finetune" / name / "metrics.json").read_text(encoding="utf-8"))
    return found


# Preference files of people


def peoples_lines() -> list[dict[str, Any]]:
    """In two shapes: texts to go on with, and dialogues as hh-rlhf has them. The longest of each is more than a context holds."""
    animals = ("cat", "dog", "owl", "fox", "hen", "bee", "ant", "cow")
    texts = [{"prompt": f"The {one} is", "chosen": " a small animal.", "rejected": " a star."} for one in animals]
    asked = [f"\n\nHuman: What is the {one}?\n\nAssistant:" for one in (*animals, "animal that lives with people " * 9)]
    return [*texts, *({"chosen": f"{one} A small animal.", "rejected": f"{one} Water."} for one in asked)]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a base and a file of preferences, after the stage has made a reward model of them."""
    root = tmp_path_factory.mktemp("people")
    tiny_model(root / "artifacts/models/base")
    corpus = root / "artifacts/raw/people"
    corpus.mkdir(parents=True)
    (corpus / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in peoples_lines()), encoding="utf-8")
    bundle.seal(corpus, "corpus", "download@people")
    run(root, section("reward", "people"))
    return root


def test_a_reward_model_learns_from_a_file_of_preferences_and_is_measured_on_prompts_that_it_does_not_know(taught: Path) -> None:
    learned, held_out = split_preferences(taught / "artifacts/raw/people", SHARE)
    assert read_preferences(taught / "artifacts/models/reward/pairs.jsonl") == learned
    found = metrics_of(taught, "reward")
    assert found["pairs_held_out"] + found["records"] + found["records_skipped"] == len(peoples_lines()) - 1 + found["records_skipped"]
    assert found["records"] == len(learned) - found["records_skipped"]
    assert 0 <= found["accuracy"] <= 1
    assert "best_of" not in found  # nobody wrote these answers but people
    assert held_out


@pytest.mark.parametrize("name", ["dpo", "ppo", "grpo"])
def test_a_policy_is_trained_by_a_file_of_preferences_and_prompts_that_are_too_long_are_left_out(taught: Path, name: str) -> None:
    run(taught, section(name, "people"))
    manifest = bundle.verify(taught / "artifacts/models" / name, "model")
    assert manifest.parents["guide"] == bundle.verify(taught / "artifacts/models/reward").digest
    found = metrics_of(taught, name)
    assert found["kl_before"] == pytest.approx(0, abs=1e-4)
    assert {"gold", "learned", "kl", "distinct_2", "val_ppl"} <= found.keys()

    learned, _ = split_preferences(taught / "artifacts/raw/people", SHARE)
    if name == "dpo":
        assert found["records"] == metrics_of(taught, "reward")["records"]
    else:
        assert found["records"] == len(answerable(learned, load(taught / "artifacts/models/base"), 64 - 6))
    rows = json.loads((taught / "artifacts/logs/finetune" / name / "answers.json").read_text(encoding="utf-8"))
    assert len(rows) == 2
    assert all(row.keys() == {"prompt", "before", "after", "gold_before", "gold"} for row in rows)


def test_one_bad_preference_stops_it_all_and_is_named(taught: Path) -> None:
    corpus = taught / "artifacts/raw/broken"
    corpus.mkdir()
    lines = [*peoples_lines()[:4], {"prompt": "The cat", "chosen": " sleeps"}]
    (corpus / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    bundle.seal(corpus, "corpus", "download@broken")
    digest = bundle.verify(taught / "artifacts/models/reward").digest
    with pytest.raises(RecordError, match=r"mine\.jsonl: 1 of 5 records are bad: line 5: wanted an object with chosen and rejected"):
        run(taught, section("reward", "broken"))
    assert bundle.verify(taught / "artifacts/models/reward").digest == digest


def test_a_file_of_which_nothing_is_left_to_measure_on_is_refused_in_one_line(taught: Path) -> None:
    said = r"0 of 17 prompts of the preferences in people are held out, .*; change sources\.people\.validation, now 0\.0, or give more"
    with pytest.raises(ValueError, match=said):
        split_preferences(taught / "artifacts/raw/people", 0.0)
    learned, _ = split_preferences(taught / "artifacts/raw/people", SHARE)
    with pytest.raises(ValueError, match=r"none of \d+ prompts has at most 2 tokens, .*; lower answer_tokens"):
        answerable(learned, load(taught / "artifacts/models/base"), 2)


# Kills


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a base, documents, and a reward model, from which every method can start."""
    root = tmp_path_factory.mktemp("killed")
    tiny_model(root / "artifacts/models/base")
    corpus = root / "artifacts/raw/animals"
    corpus.mkdir(parents=True)
    made = [
        Document(
            f"{number}", f"Thing {number}", SENTENCES[number % 4].replace("is", "was" if number % 3 else "is") * 2, "a thing", "Things"
        )
        for number in range(40)
    ]
    write_documents(corpus / "documents.jsonl", with_splits(made, SHARE))
    bundle.seal(corpus, "corpus", "download@animals")
    run(root, section("reward", "animals"))
    return root


LONG = {"steps": 80, "evaluate_every": 1000, "checkpoint_every": 4}


def start(root: Path, name: str) -> ForkServerProcess:
    """Forked from a server that has all of this loaded already, so that no run spends seconds on importing it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.__module__])
    process = context.Process(target=run, args=(root, section(name, "animals") | LONG))
    process.start()
    return process


def newest(root: Path) -> int:
    return max((int(path.name) for path in root.glob("runs/*/[0-9]*") if re.fullmatch(r"\d+", path.name)), default=0)


def beside(project: Path, root: Path, name: str) -> Path:
    """A root of its own over what `name` starts from."""
    (root / "artifacts/models").mkdir(parents=True)
    (root / "artifacts/raw").symlink_to(project / "artifacts/raw")
    for parent in {"base", "reward"} - {name}:
        (root / "artifacts/models" / parent).symlink_to(project / "artifacts/models" / parent)
    return root


def outcome(root: Path, name: str) -> tuple[str, str]:
    """sha256 of the weights, and of the manifest over everything in the bundle."""
    folder = root / "artifacts/models" / name
    [weights] = folder.glob("*model.safetensors")
    return bundle.file_digest(weights), bundle.verify(folder).digest


SLOWER = [pytest.param(name, marks=pytest.mark.long) for name in ("sft", "lora", "reward", "dpo", "grpo")]


@pytest.mark.parametrize("name", ["ppo", *SLOWER])
def test_a_stage_killed_in_the_middle_ends_in_the_bits_of_one_that_was_left_alone(name: str, project: Path, tmp_path: Path) -> None:
    """SIGKILL, which no code sees coming, twice: after the first save, and after a later one."""
    whole, killed = beside(project, tmp_path / "whole", name), beside(project, tmp_path / "killed", name)
    process = start(whole, name)
    process.join()
    assert process.exitcode == 0
    draw = random.Random(3)
    for _ in range(2):
        before, process = newest(killed), start(killed, name)
        while newest(killed) <= before:
            assert process.is_alive(), "the run ended before it could be killed"
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (killed / "artifacts/models" / name).exists()

    process = start(killed, name)
    process.join()
    assert process.exitcode == 0
    assert metrics_of(whole, name)["resumed_at"] == 0
    assert metrics_of(killed, name)["resumed_at"] >= 8
    assert outcome(killed, name) == outcome(whole, name)
    assert not any((killed / "runs").iterdir())
