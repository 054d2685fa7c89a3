"""The gate: what is wrong with a corpus is found, shown by row, and kept out."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter

from llm_from_scratch import bundle, tracking
from llm_from_scratch.data import documents, readers, validation
from llm_from_scratch.data.corpora import DownloadParams, Source
from llm_from_scratch.data.documents import Document
from llm_from_scratch.data.features import features, jaccard, luhn, personal, shingles
from llm_from_scratch.data.validation import CorpusError, Report, ValidationParams
from stages import download

for extra in ("great_expectations", "datasketch", "ftfy", "py3langid"):
    pytest.importorskip(extra)

LIMITS = {
    "warnings": ["near_duplicates", "pii"],
    "minimum_documents": 3,
    "minimum_characters": 20,
    "maximum_characters": 100_000,
    "maximum_duplicate_share": 0.0,
    "maximum_near_duplicate_share": 0.0,
    "near_duplicate_similarity": 0.8,
    "minimum_language_share": 0.5,
    "maximum_mojibake_share": 0.0,
    "maximum_control_share": 0.001,
    "maximum_pii_share": 0.0,
    "maximum_leaked_share": 0.0,
    "maximum_train_overlap": 0.2,
}
WORDS = (
    "the of and a to in is was for that with as on by it from at his are this which or be were had not her have an their one there who "
    "river mountain people city government music water history language during between under against without through because king house "
    "church north south small large early later known called found made after before where while several century island village"
)


def prose(seed: int, length: int = 120) -> str:
    """English words in a random order: no two seeds share a run of five."""
    rng, words = random.Random(seed), WORDS.split()
    return " ".join(rng.choice(words) for _ in range(length))


def corpus(*extra: Document) -> list[Document]:
    plain = [Document(f"plain-{seed}", "", prose(seed), "validation" if seed == 0 else "train") for seed in range(6)]
    return [*plain, *extra]


def check(tmp_path: Path, found: Sequence[Document], licence: str = "MIT", **limits: object) -> Report:
    source = SimpleNamespace(licence=licence, language="en", validation=0.2)
    return validation.validate(found, source, ValidationParams.model_validate(LIMITS | limits), tmp_path / "docs")


def failed(report: Report) -> set[str]:
    return {name for name, outcome in report.metric["checks"].items() if not outcome["passed"]}


# Features


def test_a_small_change_makes_a_near_duplicate_and_the_exact_jaccard_agrees() -> None:
    words = prose(1).split()
    changed = " ".join([*words[:60], "otter", *words[61:]])
    frame = features([Document("a", "", prose(1)), Document("b", "", changed), Document("c", "", prose(2))], "MIT", 0.9)

    # One word of 120 changes 5 of the 116 runs of five words: 111 are in both, 121 in either.
    assert jaccard(shingles(prose(1)), shingles(changed)) == pytest.approx(111 / 121)
    assert list(frame["near_duplicate_of"]) == ["", "a", ""]
    assert list(features([Document("a", "", prose(1)), Document("b", "", changed)], "MIT", 0.95)["near_duplicate_of"]) == ["", ""]


def test_near_duplicates_found_by_hashing_are_those_that_comparing_every_pair_finds() -> None:
    rng = random.Random(3)
    texts = [prose(seed, 200) for seed in range(30)]
    for seed in range(30):
        words = texts[seed].split()
        for _ in range(seed % 6):
            words[rng.randrange(len(words))] = "otter"
        texts.append(" ".join(words))
    frame = features([Document(str(place), "", text) for place, text in enumerate(texts)], "MIT", 0.8)

    runs = [shingles(text) for text in texts]
    for place in range(len(texts)):
        alike = [str(other) for other in range(place) if texts[other] != texts[place] and jaccard(runs[other], runs[place]) >= 0.8]
        if not frame["duplicate_of"][place]:
            assert frame["near_duplicate_of"][place] == (alike[0] if alike else "")


def test_a_held_out_copy_of_a_training_text_is_a_leak_and_a_copy_within_a_split_is_not() -> None:
    frame = features(
        [
            Document("train", "", prose(1), "train"),
            Document("same", "", prose(1), "validation"),
            Document("nearly", "", prose(1) + " otter", "validation"),
            Document("again", "", prose(2), "validation"),
            Document("again-2", "", prose(2), "validation"),
        ],
        "MIT",
        0.8,
    )
    assert list(frame["leaked_from"]) == ["", "train", "train", "", ""]
    assert list(frame["duplicate_of"]) == ["", "train", "", "", "again"]


def test_a_poem_inside_a_training_collection_overlaps_though_it_is_no_near_duplicate() -> None:
    poem = prose(7, 60)
    collection = f"{prose(8, 2000)} {poem} {prose(9, 2000)}"
    frame = features([Document("collection", "", collection, "train"), Document("poem", "", poem, "validation")], "MIT", 0.8)

    assert list(frame["leaked_from"]) == ["", ""]
    assert list(frame["train_overlap"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to jane.doe+x@mail.example.org or bob@example.com", "2 email"),
        ("call +1 (415) 555-0132 or 415-555-0199", "2 phone"),
        ("her number is 078-05-1120", "1 ssn"),
        ("paid with 4111 1111 1111 1111", "1 card"),
        ("a number of the wrong sum, 4111 1111 1111 1112", ""),
        ("the host 192.168.0.1 answered", "1 ip"),
        ("in 1984, population 1,234,567, ISBN-like 12-34, 300.400.500.600, act 3.2.1", ""),
    ],
)
def test_personal_data_is_counted_by_kind_and_never_repeated(text: str, kinds: str) -> None:
    assert personal(text) == kinds


def test_luhns_sum_worked_by_hand() -> None:
    # 7992739871 with check digit 3, Luhn's own example: 3+2+7+6+9+6+7+4+9+9+5 doubles to 70.
    assert luhn("79927398713")
    assert not any(luhn(f"7992739871{digit}") for digit in "012456789")


def test_language_and_wrong_encodings_are_seen() -> None:
    german = "Der schnelle braune Fuchs springt über den faulen Hund, und alle Kinder im Dorf freuen sich darüber sehr."
    mangled = "The café’s naïve façade — a “début”.".encode().decode("cp1252", errors="replace")
    frame = features([Document("de", "", german), Document("bad", "", mangled), Document("en", "", prose(1))], "MIT", 0.8)

    assert list(frame["language"])[0::2] == ["de", "en"]
    assert frame["mojibake"][1] > 0
    assert list(frame["mojibake"])[0::2] == [0, 0]


# The gate


def test_a_sound_corpus_passes_and_its_metric_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = check(tmp_path, corpus()), check(tmp_path, corpus())

    assert first.passed
    assert first.failures == []
    assert json.dumps(first.metric) == json.dumps(second.metric)
    assert first.metric["validation_documents"] == 1
    assert "gate" in (tmp_path / "docs/index.html").read_text(encoding="utf-8")


BROKEN = {
    "length": Document("short", "", "too short"),
    "ids": Document("plain-1", "", prose(50)),
    "control": Document("bell", "", prose(51, 20) + "\x07"),
    "mojibake": Document("cafe", "", prose(52) + " cafÃ© â€” naÃ¯ve"),
    "duplicates": Document("twin", "", prose(2)),
    "leaked": Document("copy", "", prose(3), "validation"),
    "overlap": Document("excerpt", "", " ".join(prose(4).split()[:60]), "validation"),
}


def test_each_fault_fails_its_check_and_shows_its_row(tmp_path: Path) -> None:
    report = check(tmp_path, corpus(*BROKEN.values()))
    shown = {(failure.check, failure.id) for failure in report.failures}

    assert not report.passed
    assert {(name, document.id) for name, document in BROKEN.items()} <= shown
    assert failed(report) == set(BROKEN)


def test_faults_of_the_whole_corpus_are_shown_without_a_row(tmp_path: Path) -> None:
    train_only = [Document(document.id, "", document.text, "train") for document in corpus()]
    report = check(tmp_path, train_only, licence=" ", minimum_documents=7)

    assert failed(report) == {"documents", "splits", "licence"}
    assert "documents (critical): documents=6" in {str(failure) for failure in report.failures}


def test_a_warning_is_reported_and_does_not_stop_the_line(tmp_path: Path) -> None:
    letter = Document("letter", "", prose(60) + " yours, jane@example.org")
    warned = check(tmp_path, corpus(letter))
    stopped = check(tmp_path, corpus(letter), warnings=[])

    assert warned.passed
    assert [str(failure) for failure in warned.failures] == ["pii (warning): id=letter pii=1 email"]
    assert not stopped.passed


def test_a_share_is_of_documents_and_the_limit_itself_passes(tmp_path: Path) -> None:
    twins = corpus(BROKEN["duplicates"])  # one of seven

    assert check(tmp_path, twins, maximum_duplicate_share=1 / 7).passed
    assert not check(tmp_path, twins, maximum_duplicate_share=0.14).passed


# The stage


def stage_params(mirror: Path, lines: str) -> SimpleNamespace:
    (mirror / "letters.jsonl").write_text(lines, encoding="utf-8")
    source = {
        "kind": "url",
        "url": "http://127.0.0.1:9/letters.jsonl",
        "sha256": sha256(lines.encode()).hexdigest(),
        "members": [],
        "reader": "jsonl",
        "licence": "CC0-1.0",
        "language": "en",
        "validation": 0.3,
    }
    settings = {
        "fetch": ["letters"],
        "mirror": str(mirror),
        "attempts": 1,
        "backoff_seconds": 0.0,
        "timeout_seconds": 5.0,
        "validate": LIMITS,
    }
    table = {"letters": TypeAdapter(Source).validate_python(source)}
    return SimpleNamespace(sources=table, download=DownloadParams.model_validate(settings))


def json_lines(*texts: str) -> str:
    return "".join(json.dumps({"title": f"Letter {number}", "text": text}) + "\n" for number, text in enumerate(texts))


def test_the_stage_seals_a_validated_corpus_and_the_same_source_gives_the_same_bundle(tmp_path: Path) -> None:
    params = stage_params(tmp_path, json_lines(*(prose(seed) for seed in range(8))))
    manifests = []
    for root in (tmp_path / "one", tmp_path / "two"):
        download.run(params, "letters", root)
        manifests.append(bundle.verify(root / "artifacts/raw/letters", "corpus"))

    assert manifests[0] == manifests[1]
    facts = manifests[0].facts
    assert (manifests[0].made_by, facts["documents"], facts["licence"]) == ("download@letters", 8, "CC0-1.0")
    held_out = list(documents.read_documents(tmp_path / "one/artifacts/raw/letters", "validation"))
    assert facts["validation_share"] == pytest.approx(len(held_out) / 8, abs=0.05)
    assert json.loads((tmp_path / "one/artifacts/logs/download/letters/metrics.json").read_text())["passed"]


def test_the_stage_says_what_it_does_and_leaves_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking.connect(uri, rebuild="tuesday", revision="", digests={})
    try:
        download.run(stage_params(tmp_path, json_lines(*(prose(seed) for seed in range(8)))), "letters", tmp_path)
    finally:
        tracking.connect("", "", "", {})
    assert "letters: checking 8 documents" in capsys.readouterr().err
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (run,) = [run for run in found if run.info.run_name == "download@letters"]
    assert run.data.metrics["documents"] == 8
    assert run.data.params["licence"] == "CC0-1.0"


def test_the_stage_places_nothing_when_a_critical_check_fails_and_shows_the_rows(tmp_path: Path) -> None:
    params = stage_params(tmp_path, json_lines(*(prose(seed) for seed in range(6)), "short", prose(2)))

    with pytest.raises(CorpusError) as caught:
        download.run(params, "letters", tmp_path)
    headline, *rows = str(caught.value).splitlines()
    assert headline.startswith("corpus letters failed ")
    assert "nothing was placed" in headline
    assert "  length (critical): id=letter-6 characters=5" in rows
    assert "  duplicates (critical): id=letter-7 duplicate_of=letter-2" in rows
    assert list((tmp_path / "artifacts/raw").iterdir()) == []
    assert (tmp_path / "artifacts/logs/download/letters/data_docs/index.html").is_file()


def test_a_source_of_files_is_kept_as_files(tmp_path: Path) -> None:
    params = stage_params(tmp_path, "weights")
    params.sources["letters"] = params.sources["letters"].model_copy(update={"reader": "files", "validation": 0.0})
    download.run(params, "letters", tmp_path)

    folder = tmp_path / "artifacts/raw/letters"
    assert bundle.verify(folder, "corpus").facts["documents"] == 0
    assert (folder / "files/letters.jsonl").read_text() == "weights"
    with pytest.raises(ValueError, match="it holds files rather than text"):
        list(documents.read_documents(folder))


def test_readers_and_gate_agree_that_two_works_with_a_common_part_are_two_works(tmp_path: Path) -> None:
    for name, text in (
        ("first_gut.txt", prose(1, 400)),
        ("second_gut.txt", prose(2, 400) + prose(1, 20)),
        ("third_gut.txt", prose(3, 400)),
    ):
        (tmp_path / name).write_text(text)
    works = readers.read("gutenberg", tmp_path, 0.4)

    assert check(tmp_path, works).passed
