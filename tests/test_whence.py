"""Where things come from, in a small project with real bundles, real DVC and git, a real MLflow store, and real answers over HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from llm_from_scratch import bundle, registry, tokenizer, tracking
from llm_from_scratch.evaluation.promotion import Scores
from llm_from_scratch.serving.app import create_app
from llm_from_scratch.serving.embedding import SharedEmbedder
from llm_from_scratch.serving.responder import EMBEDDER, INDEX, MODEL, SERVING, Responder
from stages import whence
from tests.tiny import tiny_embedder, tiny_index, tiny_limits, tiny_model, tiny_quantized, tiny_tokenizer

ROOT = Path(__file__).parent.parent
SHA256 = "5e" * 32
LICENCE = "CC0-1.0 (four sentences)"
PARAMS = """\
sources:
  little: {kind: folder, path: var/text, members: [a.txt, b.txt]}
tokenize:
  tiny: {corpus: little, vocab_size: 300}
train:
  tiny: {tokens: tiny, learning_rate: 3e-2, model: {width: 32}}
quantize:
  tiny_int8: {model: tiny, scheme: int8}
index: {documents: little, embedder: encoder}
evaluate: {questions: 5}
"""
GRAPH = """\
stages:
  train:
    foreach: {tiny: {}}
    do:
      cmd: "false"
      params: ["train.${key}"]
      deps: [artifacts/tokens/tiny]
      outs: ["artifacts/models/${key}"]
"""
METRICS = {
    "ladder": {"tiny": {"val_bpb": 2.0}},
    "quantize": {"tiny_int8": {"val_bpb": 2.1}},
    "rag": {"none": {"accuracy": 0.25}},
    "served": {"model": "tiny_int8"},
}
LIMITS = tiny_limits(model="tiny_int8", maximum_waiting=8)


def run(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def commit(folder: Path, message: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    run(folder, "git", "add", "--all")
    run(folder, "git", *identity, "commit", "--quiet", "--message", message)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def sealed_corpus(folder: Path) -> str:
    with bundle.writing(folder) as partial:
        (partial / "documents.jsonl").write_text('{"text": "The cat is a small animal."}\n', encoding="utf-8")
        facts = {"origin": "four sentences", "licence": LICENCE, "sha256": [SHA256], "documents": 4}
        return bundle.seal(partial, "corpus", "download@little", **facts).digest


def sealed_tokens(folder: Path, corpus: str) -> str:
    with bundle.writing(folder) as partial:
        tiny_tokenizer(partial)
        (partial / "train.bin").write_bytes(b"\0\1" * 50)
        return bundle.seal(partial, "tokens", "tokenize@tiny", {"corpus": corpus}, tokenizer_digest=tokenizer.digest(partial)).digest


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw → tokens → model → quantized, and an index; the model recorded by DVC and committed."""
    root = tmp_path_factory.mktemp("project")
    made = root / "artifacts"
    corpus = sealed_corpus(made / "raw/little")
    tokens = sealed_tokens(made / "tokens/tiny", corpus)
    model = tiny_model(made / "models/tiny")
    words = tokenizer.digest(model)
    bundle.seal(model, "model", "train@tiny", {"tokens": tokens}, architecture="llama", tokenizer_digest=words)
    tiny_quantized(made / "models/tiny_int8", model)
    embedder = SharedEmbedder.open(tiny_embedder(made / "raw/encoder"))
    tiny_index(made / "index", embedder)
    bundle.seal(made / "index", "index", "index", {"corpus": corpus, "embedder": embedder.digest}, passages=4)

    digests = {name: bundle.read_manifest(made / "models" / name).digest for name in ("tiny", "tiny_int8")}
    (root / "reports/figures").mkdir(parents=True)
    (root / "reports/metrics.json").write_text(json.dumps(METRICS | {"digests": digests}), encoding="utf-8")
    (root / "reports/report.md").write_text("# Report\n", encoding="utf-8")
    (root / "reports/figures/quantization.png").write_bytes(b"a picture")
    (root / "params.yaml").write_text(PARAMS, encoding="utf-8")
    (root / "dvc.yaml").write_text(GRAPH, encoding="utf-8")
    (root / ".gitignore").write_text("/artifacts\n/var\n", encoding="utf-8")
    run(root, "git", "init", "--quiet")
    run(root, sys.executable, "-m", "dvc", "init", "--quiet")
    run(root, sys.executable, "-m", "dvc", "commit", "--quiet", "--force")
    commit(root, "recorded")
    return root


@pytest.fixture(autouse=True)
def without_store(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "store" not in request.fixturenames:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """The project, to be changed."""
    return shutil.copytree(project, tmp_path / "copy")


def chain(root: Path, thing: str) -> whence.Link:
    return whence.find(whence.opened(root), thing)


def follow(link: whence.Link, *roles: str) -> whence.Link:
    for role in roles:
        link = link.parents[role]
    return link


def test_a_quantized_model_is_followed_to_the_licence_and_sha256_of_its_source(project: Path) -> None:
    served = chain(project, "tiny_int8")
    model, source = follow(served, "model"), follow(served, "model", "tokens", "corpus")

    assert [served.what, model.what, source.what] == ["artifacts/models/tiny_int8", "artifacts/models/tiny", "artifacts/raw/little"]
    assert [served.facts["made_by"], model.facts["made_by"], source.facts["made_by"]] == [
        "quantize@tiny_int8",
        "train@tiny",
        "download@little",
    ]
    assert (source.facts["licence"], source.facts["sha256"]) == (LICENCE, [SHA256])
    assert model.facts["tokenizer"] == follow(model, "tokens").facts["tokenizer"] == tokenizer.digest(project / "artifacts/models/tiny")
    assert model.facts["digest"] == bundle.read_manifest(project / "artifacts/models/tiny").digest
    assert source.parents == {}


def test_the_tree_names_each_step_below_what_was_made_from_it(project: Path) -> None:
    lines = list(whence.told(chain(project, "tiny_int8")))
    heads = [line for line in lines if " · " in line]

    assert heads == [
        "artifacts/models/tiny_int8 · quantized",
        "  model ← artifacts/models/tiny · model",
        "    tokens ← artifacts/tokens/tiny · tokens",
        "      corpus ← artifacts/raw/little · corpus",
    ]
    assert any(line.split() == ["sha256", SHA256] for line in lines)


def test_params_are_those_that_dvc_recorded_and_not_those_of_today(copy: Path) -> None:
    recorded = chain(copy, "artifacts/models/tiny").facts
    assert recorded["params"] == {"tokens": "tiny", "learning_rate": 0.03, "model": {"width": 32}}
    assert recorded["params_from"] == "dvc.lock"

    first = subprocess.run(["git", "rev-parse", "HEAD"], cwd=copy, check=True, capture_output=True, text=True).stdout.strip()
    (copy / "params.yaml").write_text(PARAMS.replace("3e-2", "5e-2"), encoding="utf-8")
    commit(copy, "changed, and not built")
    later = chain(copy, "artifacts/models/tiny").facts
    assert later["params"] == recorded["params"]
    assert later["params_from"] == "dvc.lock, and params.yaml has others now"
    assert later["commit"] == recorded["commit"] == first


def test_a_model_that_dvc_does_not_know_says_so_and_has_the_params_of_today(copy: Path) -> None:
    model = tiny_model(copy / "artifacts/models/tiny", seed=1)
    facts = chain(copy, str(model)).facts

    assert "of which dvc.lock knows nothing" in facts["dvc"]
    assert facts["params_from"] == "params.yaml as it is now"
    assert "commit" not in facts


def test_digests_their_beginnings_and_those_of_files_lead_to_the_same_bundle(project: Path) -> None:
    made = bundle.read_manifest(project / "artifacts/models/tiny")
    names = (made.digest, made.digest[:7], f"fp_{made.digest[:12]}", made.files["model.safetensors"], "artifacts/models/tiny/config.json")

    assert {chain(project, name).what for name in (*names, "artifacts/models/tiny")} == {"artifacts/models/tiny"}
    assert chain(project, SHA256[:20]).what == "artifacts/raw/little"


def test_a_parent_that_is_not_here_is_said_to_be_missing_with_the_next_step(copy: Path) -> None:
    tokens = bundle.read_manifest(copy / "artifacts/tokens/tiny").digest
    shutil.rmtree(copy / "artifacts/tokens/tiny")
    gone = follow(chain(copy, "tiny_int8"), "model", "tokens")

    assert (gone.what, gone.kind) == (tokens, "not here")
    assert "dvc repro train@tiny" in gone.facts["next"]


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        ("tinny", r"nothing here is called 'tinny'; wanted a bundle \(encoder, index, little, tiny, tiny_int8\)"),
        ("tiny", r"tiny is in 2 bundles, artifacts/models/tiny, artifacts/tokens/tiny; name one by its folder"),
        ("fp_000000000000", r"no bundle here has the digest 000000000000…; dvc checkout"),
        ("reports/figures/other.png", r"other.png: no figure that evaluate draws"),
    ],
)
def test_what_cannot_be_found_is_one_line_with_the_next_step(copy: Path, thing: str, said: str) -> None:
    (copy / "reports/figures/other.png").write_bytes(b"a picture")
    with pytest.raises(ValueError, match=said) as caught:
        chain(copy, thing)
    assert "\n" not in str(caught.value)


def test_an_answer_of_a_report_whose_model_was_rebuilt_is_told_apart(copy: Path) -> None:
    before = bundle.read_manifest(copy / "artifacts/models/tiny").digest
    tiny_model(copy / "artifacts/models/tiny", seed=1)
    with pytest.raises(ValueError, match=r"is tiny of reports/metrics\.json, but the one here is another"):
        chain(copy, f"fp_{before[:12]}")
    assert follow(chain(copy, "reports/report.md"), "artifacts/models/tiny").kind == "not here"


def test_a_damaged_bundle_is_shown_in_its_place_and_the_command_fails(copy: Path) -> None:
    weights = copy / "artifacts/models/tiny/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    done = command(copy, "tiny_int8")

    assert done.returncode == 1
    assert "artifacts/raw/little · corpus" in done.stdout
    assert done.stderr.startswith("whence tiny_int8: ")
    assert "model.safetensors: sha256 is" in done.stderr.splitlines()[-1]


def test_the_command_tells_people_and_programs_the_same(project: Path) -> None:
    people, programs = command(project, "index"), command(project, "index", "--json")
    told = json.loads(programs.stdout)

    assert people.stdout.splitlines()[0] == f"{told['what']} · {told['kind']}" == "artifacts/index · index"
    assert told["parents"]["corpus"]["facts"]["licence"] == LICENCE
    assert told["facts"]["params"] == {"documents": "little", "embedder": "encoder"}


def command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shown = [sys.executable, "-m", "stages", "whence", *arguments]
    code = f"import sys; sys.argv[1:] = {shown[3:]!r}; from stages.__main__ import main; sys.exit(main())"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PATH": "/usr/bin:/bin", "MLFLOW_TRACKING_URI": ""}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False)


# The report.


def test_a_figure_leads_to_the_bundles_whose_numbers_it_draws(project: Path) -> None:
    figure = chain(project, "reports/figures/quantization.png")

    assert (figure.kind, figure.facts["made_by"], figure.facts["keys"]) == ("figure", "evaluate", ["quantize"])
    assert figure.facts["commit"]
    assert follow(figure, "artifacts/models/tiny_int8", "model", "tokens", "corpus").facts["sha256"] == [SHA256]


def test_a_page_leads_to_all_that_its_template_speaks_of(project: Path) -> None:
    page = chain(project, "reports/report.md")

    assert set(page.parents) == {"artifacts/models/tiny", "artifacts/models/tiny_int8", "artifacts/index"}
    assert set(page.facts["keys"]) == {"ladder", "quantize", "rag", "served", "digests"}


def test_every_figure_and_page_of_the_committed_report_is_known() -> None:
    here = whence.opened(ROOT)
    listed = subprocess.run(
        ["git", "ls-files", "reports", *whence.PAGES, str(whence.POSTS)], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    pages = [Path(name) for name in listed.splitlines() if "benchmarks" not in name and Path(name).stem not in whence.BESIDE]

    assert len(pages) > 30
    assert [page for page in pages if page.stem not in ("week_07",) and not whence.keys_of(here, page)] == []
    assert whence.keys_of(here, Path("reports/weeks/week_02.md")) == ["tokenize", "ladder.mlp", "ladder.bigram", "ladder.ngram", "mixture"]


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("drills.md", "python -m drills"),
        ("drills.json", "python -m drills"),
        ("certificate.md", "python -m pipelines certify"),
        ("digests.json", "python -m stages digests"),
    ],
)
def test_what_is_written_beside_the_graph_names_its_command(file: str, command: str) -> None:
    """It used to be evaluate's, or a page without a template."""
    said = whence.find(whence.opened(ROOT), f"reports/{file}")

    assert (said.facts["made_by"], said.parents) == (command, {})
    assert ("made_on" in said.facts) == (not file.startswith("drills"))


# MLflow.


@pytest.fixture
def store(copy: Path) -> Iterator[Path]:
    """Two finished runs of the model's node, the newer one with another learning rate; and the model registered."""
    (copy / "var").mkdir()
    tokens = whence.content(copy / "artifacts/tokens/tiny")
    tracking.connect(f"sqlite:///{copy}/var/mlflow.db", "tuesday", "abc123", {"artifacts/tokens/tiny": tokens})
    params: dict[str, Any] = {"tokens": "tiny", "learning_rate": 0.03, "model": {"width": 32}}
    for rate in (0.03, 0.05):
        with tracking.stage_run("train", "tiny", params | {"learning_rate": rate}, ["artifacts/tokens/tiny"]) as log:
            log(0, {"val_bpb": rate})
    digest = bundle.read_manifest(copy / "artifacts/models/tiny").digest
    (copy / "scores.json").write_text(Scores("val_bpb", {"a": (2.0, 1.0)}).to_json())
    made = {"name": "llm-from-scratch-tiny", "root": copy, "folder": "artifacts/models/tiny", "digest": digest, "card": "# card"}
    registry.register(registry.Candidate(**made, metrics={}, facts={"asked": "text"}, beside={}, scores=copy / "scores.json"))
    yield copy
    tracking.connect("", "", "", {})


def test_mlflow_names_the_run_that_read_the_same_with_the_same_params_and_the_registered_version(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = follow(chain(store, "tiny_int8"), "model")
    run = model.facts["mlflow"].split()[1]

    assert model.facts["mlflow"] == f"run {run} of rebuild tuesday, code abc123"
    assert tracking._client().get_run(run).data.params["learning_rate"] == "0.03"
    assert model.facts["registered"] == ["llm-from-scratch-tiny version 1 of rebuild tuesday, code abc123"]


def test_a_store_that_is_broken_is_said_in_a_line_and_the_chain_is_whole(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "var").mkdir()
    (copy / "var/mlflow.db").write_bytes(b"this is no database" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy}/var/mlflow.db")
    served = chain(copy, "tiny_int8")
    tracking.connect("", "", "", {})

    assert served.facts["mlflow"].startswith("cannot be asked: ")
    assert follow(served, "model", "tokens", "corpus").facts["licence"] == LICENCE


def test_whence_makes_no_store_where_there_is_none(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "mlflow" not in chain(copy, "tiny_int8").facts
    assert not (copy / "var").exists()


# From an answer.


def test_what_an_answer_bears_leads_to_the_chain_of_its_model_and_of_what_it_read(project: Path, tmp_path: Path) -> None:
    made = project / "artifacts"
    parts = {MODEL: made / "models/tiny_int8", INDEX: made / "index", EMBEDDER: made / "raw/encoder"}
    for part, folder in parts.items():
        shutil.copytree(folder, tmp_path / part)
    digests = {part: bundle.read_manifest(folder).digest for part, folder in parts.items()}
    (tmp_path / SERVING).write_text(json.dumps({"serve": LIMITS.model_dump(), "digests": digests}), encoding="utf-8")

    with TestClient(create_app(Responder.open(tmp_path))) as client:
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "What is a cat?"}]}
        said = client.post("/v1/chat/completions", json=asked)
        read = client.post("/ask", json={"question": "What is a cat?"})
        listed = client.get("/v1/models").json()["data"]

    assert chain(project, said.json()["system_fingerprint"]).what == "artifacts/models/tiny_int8"
    served = chain(project, said.headers["X-Bundle-Digest"])
    assert follow(served, "model", "tokens", "corpus").facts["sha256"] == [SHA256]
    assert follow(chain(project, read.headers["X-Index-Digest"]), "corpus").facts["licence"] == LICENCE
    assert [chain(project, model["digest"]).what for model in listed] == ["artifacts/models/tiny_int8", "artifacts/raw/encoder"]
