"""A real MLflow store on sqlite: versions of real bundles, when the champion moves, the way back, and what a version answers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from llm_from_scratch import bundle, registry, tokenizer, tracking
from llm_from_scratch.evaluation.promotion import Rule, Scores
from llm_from_scratch.finetune import lora
from llm_from_scratch.finetune.lora import LoraParams
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.quantize import load_bundle
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.registry.places import brought_back
from pipelines import bento, champion, dvc
from tests.tiny import SENTENCES, tiny_embedder, tiny_index, tiny_model

RULE = Rule(minimum_gain=0.01, minimum_units=20, resamples=500, confidence=0.95, seed=1)
NAME = "llm-from-scratch-tiny"
TINY = "artifacts/models/tiny"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [tiny_model(folder / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, whose tables MLflow takes seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def store(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    uri = f"sqlite:///{tmp_path}/var/mlflow.db"
    tracking.connect(uri, rebuild="tuesday", revision="abc123", digests={})
    shutil.copyfile(tables, tmp_path / "var" / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    tracking.connect("", "", "", {})


def candidate(root: Path, source: Path, better: float = 0.0, spread: float = 0.0) -> registry.Candidate:
    """The bundle of `source` in its place under `root`, `better` than 2 bits a byte on each of 60 units, give or take `spread`."""
    shutil.rmtree(root / TINY, ignore_errors=True)
    shutil.copytree(source, root / TINY)
    off = np.random.default_rng(0).normal(better, spread, 60)
    scores = Scores("val_bpb", {f"u{place}": (2.0 + place / 10 - gain, 1.0) for place, gain in enumerate(off.tolist())})
    (root / "scores.json").write_text(scores.to_json())
    made = registry.Candidate(
        NAME, root, TINY, bundle.read_manifest(root / TINY).digest, "# tiny\n\nA card.", {"val_bpb": 2.0}, {}, {}, root
    )
    return replace(made, facts={"kind": "model", "made_by": "train@tiny", "asked": "chat"}, scores=root / "scores.json")


def offered(root: Path, source: Path, better: float = 0.0, spread: float = 0.0) -> tuple[str, registry.Decision]:
    number = registry.register(candidate(root, source, better, spread))
    return number, registry.promote(NAME, number, RULE)


def aliases(store: MlflowClient) -> dict[str, str]:
    return {alias: str(number) for alias, number in store.get_registered_model(NAME).aliases.items()}


def test_a_challenger_inside_the_noise_stays_one_and_a_real_gain_takes_over(
    store: MlflowClient, tmp_path: Path, models: list[Path]
) -> None:
    assert offered(tmp_path, models[0]) == ("1", registry.Decision(True, "the first version"))
    number, luck = offered(tmp_path, models[1], better=0.02, spread=0.3)
    assert (number, luck.promoted) == ("2", False)
    assert "inside the noise" in luck.reason
    assert aliases(store) == {"champion": "1", "challenger": "2"}

    number, skill = offered(tmp_path, models[2], better=0.2, spread=0.3)
    assert (number, skill.promoted) == ("3", True)
    assert aliases(store) == {"champion": "3", "previous": "1"}
    version = store.get_model_version(NAME, "3")
    assert version.tags["decision"] == f"promoted: {skill.reason}"
    assert version.description == f"# tiny\n\nA card.\n\n## Promotion\n\nPromoted: {skill.reason}."


def test_the_same_bundle_is_one_version_and_never_beats_itself(store: MlflowClient, tmp_path: Path, models: list[Path]) -> None:
    offered(tmp_path, models[0])
    assert offered(tmp_path, models[0], better=0.5) == ("1", registry.Decision(False, "is the champion already"))
    assert len(store.search_model_versions(f"name = '{NAME}'")) == 1


def test_a_champion_that_is_scored_anew_is_compared_by_its_new_scores(store: MlflowClient, tmp_path: Path, models: list[Path]) -> None:
    offered(tmp_path, models[0])
    offered(tmp_path, models[0], better=0.3)
    assert not offered(tmp_path, models[1], better=0.2, spread=0.01)[1].promoted


def test_a_champion_that_nothing_was_asked_keeps_the_scores_it_has(store: MlflowClient, tmp_path: Path, models: list[Path]) -> None:
    """Its next challenger would share no unit with it, and none would ever take over."""
    offered(tmp_path, models[0])
    unasked = candidate(tmp_path, models[0])
    unasked.scores.write_text(Scores("val_bpb", {}).to_json())
    assert registry.register(unasked) == "1"
    assert offered(tmp_path, models[1], better=0.2, spread=0.01)[1].promoted


def test_a_champion_from_before_scores_were_kept_stays_and_the_way_to_move_it_is_named(
    store: MlflowClient, tmp_path: Path, models: list[Path]
) -> None:
    store.create_registered_model(NAME)
    store.create_model_version(NAME, tmp_path.as_uri(), tags={"digest": "old"})
    store.set_registered_model_alias(NAME, "champion", "1")
    _, decision = offered(tmp_path, models[0])
    assert not decision.promoted
    assert f"python -m pipelines rollback {NAME} --to 2 makes this one champion by hand" in decision.reason
    registry.rollback(NAME, "2")
    assert aliases(store)["champion"] == "2"


def test_rollback_goes_back_step_by_step_and_no_rule_takes_up_what_was_left(
    store: MlflowClient, tmp_path: Path, models: list[Path]
) -> None:
    for place, model in enumerate(models):
        offered(tmp_path, model, better=0.2 * place, spread=0.01)
    assert aliases(store) == {"champion": "3", "previous": "2"}

    assert registry.rollback(NAME).startswith(f"{NAME}: champion moved from version 3 to version 2, bundle ")
    assert aliases(store) == {"champion": "2", "previous": "1"}
    registry.rollback(NAME)
    assert aliases(store) == {"champion": "1"}
    with pytest.raises(ValueError, match="never had another champion; name a version with --to, of 1, 2, 3"):
        registry.rollback(NAME)

    number, decision = offered(tmp_path, models[2], better=0.4, spread=0.01)
    assert (number, decision.promoted) == ("3", False)
    assert "rolled back on purpose" in decision.reason
    registry.rollback(NAME, "3")
    assert aliases(store) == {"champion": "3", "previous": "1"}


def test_rollback_of_what_is_not_there_names_what_is(store: MlflowClient, tmp_path: Path, models: list[Path]) -> None:
    offered(tmp_path, models[0])
    for name, number, complaint in (
        ("tiny", "", f"no registered model tiny; there is {NAME}"),
        (NAME, "7", "has no version 7; there is 1"),
        (NAME, "1", "version 1 is the champion already"),
    ):
        with pytest.raises(ValueError, match=complaint):
            registry.rollback(name, number)


def test_a_store_that_cannot_be_asked_is_not_taken_for_one_without_a_champion(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.champion_of("base") is None

    def busy(self: MlflowClient, name: str, alias: str) -> None:
        raise MlflowException("database is locked")

    monkeypatch.setattr(MlflowClient, "get_model_version_by_alias", busy)
    with pytest.raises(ValueError, match="locked"):
        registry.promote("base", "1", RULE)


def test_a_version_answers_through_mlflow_and_holds_no_weights(store: MlflowClient, tmp_path: Path, models: list[Path]) -> None:
    """A megabyte would be the weights of the smallest rung; the real ones are hundreds of those."""
    import mlflow

    offered(tmp_path, models[0])
    opened = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    asked = [SENTENCES[0], "What is a dog?"]
    answers = opened.predict(asked, params={"max_tokens": 8})
    assert len(answers) == 2
    assert all(isinstance(text, str) and text for text in answers)
    assert opened.predict(asked, params={"max_tokens": 8}) == answers
    assert opened.predict(asked, params={"max_tokens": 2}) != answers

    signature = opened.metadata.signature
    assert [str(column.type) for column in signature.inputs] == ["DataType.string"]
    assert {param.name for param in signature.params} == {"max_tokens", "temperature", "seed"}
    kept = [file for file in (tmp_path / "var" / "mlruns").rglob("*") if file.is_file()]
    assert {"MLmodel", "input_example.json", "scores.json", "pyfunc.py"} <= {file.name for file in kept}
    assert sum(file.stat().st_size for file in kept) < 100_000
    assert not [file for file in kept if file.suffix in {".safetensors", ".bin", ".pkl"}]


def test_an_adapters_version_answers_as_its_base_with_the_adapter_beside_it(
    store: MlflowClient, tmp_path: Path, models: list[Path]
) -> None:
    """Its base comes from where it was registered, and by its digest."""
    import mlflow

    base = cast(Rung, load_bundle(models[0]))
    detour = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "down_proj"], "chat_tokens": False}
    attached = lora.attach(base, LoraParams.model_validate(detour), seed=1)
    with torch.no_grad():
        for name, weight in attached.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    words = tokenizer.load(models[0])
    made, digest = candidate(tmp_path, models[0]), bundle.read_manifest(models[0]).digest
    with bundle.writing(tmp_path / "artifacts/models/lora") as partial:
        words.save(partial)
        lora.save_adapter(attached, partial, TINY)
        bundle.seal(partial, "adapter", "finetune@lora", {"base": digest}, tokenizer=tokenizer.digest(partial))
    sealed = bundle.read_manifest(tmp_path / "artifacts/models/lora").digest
    made = replace(made, folder="artifacts/models/lora", digest=sealed, beside={"base": TINY})
    registry.promote(NAME, registry.register(made), RULE)

    sampling = Sampling(max_tokens=12, temperature=0.0)
    asked = [{"role": "user", "content": text} for text in SENTENCES]
    by_engine, by_base = (
        ["".join(piece.text for piece in engine.chat([said], sampling)).strip() for said in asked]
        for engine in (Engine(attached.eval(), words), Engine.open(models[0]))
    )
    opened = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    assert opened.predict(list(SENTENCES), params={"max_tokens": 12}) == by_engine
    assert by_engine != by_base, "else the adapter was left out of both"

    shutil.rmtree(tmp_path / TINY)
    with pytest.raises(bundle.BundleError, match=f"holds no bundle, wanted {digest[:12]}…; python -m pipelines restore {digest[:12]}"):
        mlflow.pyfunc.load_model(f"models:/{NAME}@champion")


def test_a_version_whose_bundle_was_replaced_names_the_way_back(store: MlflowClient, tmp_path: Path, models: list[Path]) -> None:
    import mlflow

    offered(tmp_path, models[0])
    old = bundle.read_manifest(models[0]).digest
    candidate(tmp_path, models[1])
    with pytest.raises(bundle.BundleError, match=f"wanted {old[:12]}…; python -m pipelines restore {old[:12]} brings it back"):
        mlflow.pyfunc.load_model(f"models:/{NAME}@champion")


def test_a_rolled_back_champion_comes_out_of_dvcs_cache(
    store: MlflowClient, tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dvc.output("init", "--no-scm", "--quiet")
    digests = []
    for place, model in enumerate(models[:2]):
        candidate(tmp_path, model)
        dvc.output("add", "--quiet", TINY)
        (listed,) = [line for line in (tmp_path / f"{TINY}.dvc").read_text().splitlines() if "md5:" in line and ".dir" in line]
        tracking.connect(tracking.connected().uri, "tuesday", "abc123", {TINY: listed.split()[-1]})
        offered(tmp_path, model, better=0.2 * place, spread=0.01)
        digests.append(bundle.read_manifest(model).digest)

    said = champion.rollback(tmp_path, "tiny", "")
    assert said == f"{NAME}: champion moved from version 2 to version 1, bundle {digests[0][:12]}…, in var/bundles/{digests[0][:16]}"
    assert bundle.verify(brought_back(tmp_path, digests[0])).digest == digests[0]
    assert champion.champion_bundle(tmp_path, NAME) == brought_back(tmp_path, digests[0])
    assert bundle.read_manifest(tmp_path / TINY).digest == digests[1], "the workspace stays as it is"
    assert champion.restored(tmp_path, digests[1][:12]) == tmp_path / TINY

    shutil.rmtree(brought_back(tmp_path, digests[0]))
    shutil.rmtree(tmp_path / ".dvc/cache/files")
    with pytest.raises(
        ValueError, match="neither there nor in DVC's cache; dvc pull gets it from a remote, git checkout abc123 && dvc repro"
    ):
        champion.champion_bundle(tmp_path, NAME)


def test_a_rollback_whose_files_are_gone_moves_nothing(store: MlflowClient, tmp_path: Path, models: list[Path]) -> None:
    for place, model in enumerate(models[:2]):
        offered(tmp_path, model, better=0.2 * place, spread=0.01)
    with pytest.raises(ValueError, match="neither there nor in DVC's cache"):
        champion.rollback(tmp_path, "tiny", "")
    assert aliases(store) == {"champion": "2", "previous": "1"}


def test_what_is_served_as_champion_is_what_the_registry_says(
    store: MlflowClient, tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=f"{champion.SERVED} has no champion; python -m pipelines promote makes one"):
        bento.champions(tmp_path)
    made = candidate(tmp_path, models[0])
    for name in (champion.SERVED, champion.RETRIEVER):
        registry.promote(name, registry.register(replace(made, name=name)), RULE)
    assert bento.champions(tmp_path) == (tmp_path / TINY, tmp_path / TINY)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match="no MLFLOW_TRACKING_URI, so no registry"):
        bento.champions(tmp_path)


def test_an_index_is_a_version_that_finds(store: MlflowClient, tmp_path: Path) -> None:
    from llm_from_scratch.registry.opening import open_version
    from llm_from_scratch.retrieval.embed import Embedder

    embedder = Embedder.open(tiny_embedder(tmp_path / "artifacts/raw/minilm"))
    tiny_index(tmp_path / "artifacts/index", embedder)
    digest = bundle.read_manifest(tmp_path / "artifacts/index").digest
    beside = {"embedder": {"folder": "artifacts/raw/minilm", "digest": embedder.digest}}
    config = {"root": str(tmp_path), "folder": "artifacts/index", "digest": digest, "asked": "query", "beside": beside}
    assert open_version(config)(["river water sea"], {}) == [SENTENCES[2]]
    config["beside"] = {"embedder": {**beside["embedder"], "digest": hashlib.sha256(json.dumps(config).encode()).hexdigest()}}
    with pytest.raises(bundle.BundleError, match="python -m pipelines restore"):
        open_version(config)
