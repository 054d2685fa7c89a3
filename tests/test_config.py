"""params.yaml is checked before any work, and each mistake is named with the path a person wrote."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llm_from_scratch import config
from stages import __main__ as command

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def changed(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(tree)
    *above, last = path.split(".")
    place = made
    for step in above:
        place = place[step]
    place[last] = value
    return made


def test_the_shipped_params_are_sound(shipped: dict[str, Any]) -> None:
    assert config.parse(shipped, "params.yaml").serve.model in {entry["model"] for entry in shipped["quantize"].values()}


@pytest.mark.parametrize("profile", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_is_an_overlay_of_sound_params(shipped: dict[str, Any], profile: Path) -> None:
    def laid(under: Any, over: Any) -> Any:
        if not isinstance(over, dict):
            return over
        assert set(over) <= set(under), f"{profile.name} names {set(over) - set(under)}, which params.yaml has not"
        return {**under, **{key: laid(under[key], value) for key, value in over.items()}}

    config.parse(laid(shipped, YAML(typ="safe", pure=True).load(profile)), profile.name)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("train.base.learning_rate", "fast", "params.yaml: train.base.learning_rate: expected a number, got 'fast'"),
        ("train.base.stepz", 3, "params.yaml: train.base.stepz: unknown key; check its spelling or take it out"),
        ("train.base.steps", 2.5, "params.yaml: train.base.steps: expected a whole number, got 2.5"),
        ("train.base.steps", True, "params.yaml: train.base.steps: expected a whole number, got True"),
        ("train.base.model.width", "wide", "params.yaml: train.base.model.width: expected a whole number, got 'wide'"),
        ("train.ngram.model.order", "six", "params.yaml: train.ngram.model.order: expected a whole number, got 'six'"),
        ("train.base.tokens", "nowhere", "params.yaml: train.base.tokens: no 'nowhere'; there is shakespeare_char, "),
        ("serve.model", "lora", "params.yaml: serve.model: no 'lora'; there is ngram, "),
        ("finetune.lora.model", "lora", "params.yaml: finetune.lora.model: no 'lora'; there is ngram, "),
        ("download.fetch", ["shakespear"], "params.yaml: download.fetch.0: no 'shakespear'; there is shakespeare, "),
        ("sources.wikipedia.kind", "ftp", "params.yaml: sources.wikipedia"),
        ("finetune.sft.records", "nowhere", "params.yaml: finetune.sft.records: no 'nowhere'; there is shakespeare, "),
        ("evaluate", None, "params.yaml: evaluate: expected a mapping, got None"),
    ],
)
def test_a_mistake_is_named_with_its_path(shipped: dict[str, Any], path: str, value: Any, line: str) -> None:
    with pytest.raises(config.ParamsError) as error:
        config.parse(changed(shipped, path, value), "params.yaml")
    assert any(said.startswith(line) for said in str(error.value).splitlines()), str(error.value)


def test_a_missing_key_is_named(shipped: dict[str, Any]) -> None:
    tree = copy.deepcopy(shipped)
    del tree["train"]["base"]["steps"]
    with pytest.raises(config.ParamsError, match=r"params.yaml: train.base.steps: missing"):
        config.parse(tree, "params.yaml")


def test_all_mistakes_are_told_at_once(shipped: dict[str, Any]) -> None:
    tree = changed(changed(shipped, "train.base.learning_rate", "fast"), "index.batch", "big")
    with pytest.raises(config.ParamsError) as error:
        config.parse(tree, "params.yaml")
    assert len(str(error.value).splitlines()) == 2


def test_a_stage_refuses_bad_params_in_one_line_before_any_work(shipped: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(changed(shipped, "train.base.learning_rate", "fast"), file)
    run = subprocess.run(
        [sys.executable, "-m", "stages", "train", "base", "--params", str(tmp_path / "params.yaml")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.strip() == "train base: params.yaml: train.base.learning_rate: expected a number, got 'fast'"
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_params_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"train: \xff\n")
    with pytest.raises(ValueError, match=r"^params.yaml: .*can't decode byte 0xff"):
        command.read_yaml(tmp_path / "params.yaml")


def test_broken_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("train: {base: [1, 2\n")
    run = subprocess.run(
        [sys.executable, "-m", "stages", "train", "base", "--params", str(tmp_path / "params.yaml")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert len(run.stderr.strip().splitlines()) == 1
    assert "params.yaml" in run.stderr


@pytest.mark.parametrize(("stage", "known"), [("download", "shakespeare, "), ("train", "ngram, ")])
def test_a_name_that_params_have_not_is_answered_with_those_they_have(stage: str, known: str) -> None:
    with pytest.raises(ValueError, match=f"no 'nobody' in params.yaml; {stage} has {known}"):
        command.run(stage, "nobody", ROOT / "params.yaml")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a : b"), "train base: a : b"),
        (OSError(28, "No space"), "train base: [Errno 28] No space; make room, then the same command goes on"),
        (OSError(30, "Read-only"), "train base: [Errno 30] Read-only; make it writable, then the same command goes on"),
    ],
    ids=["as it was said", "disk full", "read-only disk"],
)
def test_an_error_is_one_line_for_a_person(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(command, "run", fail)
    monkeypatch.setattr(sys, "argv", ["stages", "train", "base"])
    assert command.main() == 1
    assert capsys.readouterr().err == f"{line}\n"


def test_code_without_git_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.git_revision(tmp_path) == ""


def test_help_is_instant() -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stages", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage: python -m stages" in run.stdout
    assert "torch" not in run.stderr
